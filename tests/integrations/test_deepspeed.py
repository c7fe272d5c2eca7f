"""``scope="global"`` under DeepSpeed, through Accelerate and over gloo, where it is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_accumulated_steps_are_those_of_the_whole_batch(stage: int) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    script = "tests.integrations.deepspeed_process"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "ACCELERATE_USE_CPU": "1",
    }
    process = subprocess.run(
        [*launcher, "--standalone", "-m", script, str(stage), "2"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    (line,) = [line for line in process.stdout.splitlines() if line.startswith("[{")]
    for step in json.loads(line):
        assert max(step.values()) < 1e-5, step
