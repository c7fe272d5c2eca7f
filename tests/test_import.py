"""``import tract_hub`` brings in torch, and next to nothing beyond it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NOT_NEEDED = (
    "timm",
    "transformers",
    "accelerate",
    "torchvision",
    "torch.distributed.fsdp",
    "datasets",
    "matplotlib",
    "sklearn",
    "rich",
    "typer",
)
LOOK = """
import json, sys, time, torch
there, began = set(sys.modules), time.perf_counter()
import tract_hub
tract_hub.enable, tract_hub.disable, tract_hub.status, tract_hub.locate
seconds = time.perf_counter() - began
print(json.dumps({"seconds": seconds, "brought": sorted(set(sys.modules) - there)}))
"""


def fresh(code: str) -> str:
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return run.stdout


@pytest.fixture(scope="module")
def imports() -> list[dict[str, Any]]:
    return [json.loads(fresh(LOOK)) for _ in range(3)]


@pytest.mark.parametrize("name", NOT_NEEDED)
def test_what_only_some_need_is_not_imported(imports: list[dict[str, Any]], name: str) -> None:
    assert name not in imports[0]["brought"]


def test_it_takes_little_time_beyond_torch(imports: list[dict[str, Any]]) -> None:
    assert min(each["seconds"] for each in imports) < 0.3
