"""What is imported when: torch for the first call, and next to nothing beyond it."""

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
there, began = set(sys.modules), time.process_time()
import tract_hub
tract_hub.enable, tract_hub.disable, tract_hub.status, tract_hub.locate
seconds = time.process_time() - began  # whatever else the machine does
print(json.dumps({"seconds": seconds, "brought": sorted(set(sys.modules) - there)}))
"""
HELP = """
import sys
from tract_hub.cli import main
try:
    main([*sys.argv[1:], "--help"])
finally:
    print("torch" in sys.modules)
"""


def fresh(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
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


@pytest.mark.parametrize("command", ["", "inspect", "compare", "audit", "bench"])
def test_help_does_not_wait_for_torch(command: str) -> None:
    printed = fresh(HELP, *command.split())
    assert f"tract-hub {command}" in printed
    assert printed.splitlines()[-1] == "False"
