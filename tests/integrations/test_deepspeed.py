"""Under DeepSpeed, over gloo, where it is installed: "global" up to ZeRO-2, "local" in ZeRO-3."""

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
    (line,) = [line for line in process.stdout.splitlines() if line.startswith('{"steps')]
    found = json.loads(line)
    assert len(found["steps"]) == (0 if stage == 3 else 2)
    for step in found["steps"]:
        assert max(step.values()) < 1e-5, step
    if stage in (1, 2):  # the step that nobody finished
        assert "tract_hub.finish(model)" in found["message"]
