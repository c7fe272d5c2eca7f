"""``scope="global"`` among processes that talk to each other: real ones, over gloo.

Each world of processes starts once and goes through all checks of ``run_checks.py``; here stands
what must come out. Nothing may hang: a world has a time limit.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations.run_checks import CHECKS

ROOT = Path(__file__).parents[2]
LIMIT = 100  # seconds for a world
EXACT = 1e-5

WHOLE_BATCH = """
    ddp_one_backward ddp_enabled_after_wrapping ddp_accumulation
    ddp_accumulation_synchronising_each ddp_clipped_norm ddp_training ddp_unequal_shares
    ddp_empty_share ddp_uneven_forwards ddp_evaluation_by_one ddp_stem_unused_by_one
    ddp_loss_without_the_stem ddp_two_forwards_one_backward ddp_several_stems
    ddp_checkpointed ddp_checkpointed_reentrant ddp_skipped_step_zeroed_in_place ddp_grad_scaler
    ddp_local fsdp2_one_backward fsdp2_accumulation fsdp2_accumulation_synchronising_each
    fsdp2_training fsdp2_two_dimensions
""".split()

COMPILED = {"ddp_compiled_inside", "ddp_compiled_around"}  # with 2 processes only

World = dict[str, list[Any]]


def run_world(size: int, folder: Path, *checks: str, limit: float = LIMIT) -> int:
    """Run checks in processes of their own; return the exit status, that of a signal if hung."""
    command = [sys.executable, "-m", "tests.integrations.run_checks", str(size), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, *checks], cwd=ROOT, env=environment, start_new_session=True
    ) as process:
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.wait()


@pytest.fixture(scope="module", params=[2, 4], ids=["2 processes", "4 processes"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """What each process found, by check."""
    folder = tmp_path_factory.mktemp("world")
    left_out = COMPILED if request.param > 2 else set()
    checks = [name for name in CHECKS if name not in left_out]
    status = run_world(request.param, folder, *checks)
    files = [folder / f"rank{rank}.pt" for rank in range(request.param)]
    found = [torch.load(file) if file.exists() else {} for file in files]
    names = list(found[0])
    assert status == 0, f"ended with {status} in the check after {names[-1:]}"
    return {name: [results[name] for results in found] for name in names}


def numbers(found: Any) -> list[float]:
    """All numbers of a result; an error's text has none, and shows what it was."""
    if isinstance(found, (list, tuple)):
        return [number for part in found for number in numbers(part)]
    if isinstance(found, dict):
        return list(found.values())
    pytest.fail(str(found))


@pytest.mark.parametrize("check", WHOLE_BATCH)
def test_the_gradient_is_that_of_one_process_with_the_whole_batch(world: World, check: str) -> None:
    for process in world[check]:
        assert len(numbers(process)) >= 6  # the parameters
        assert max(numbers(process)) < EXACT, process


@pytest.mark.parametrize("world", [2], indirect=True)
@pytest.mark.parametrize("check", sorted(COMPILED))
def test_a_compiled_model_sums_its_rows_outside_of_the_graph(world: World, check: str) -> None:
    for process in world[check]:
        assert len(numbers(process)) == 6
        assert max(numbers(process)) < EXACT, process


@pytest.mark.parametrize(
    ("check", "kind"),
    [("accelerate_ddp", "DistributedDataParallel"), ("accelerate_fsdp2", "FSDPModule")],
)
def test_accelerate_needs_nothing_else(world: World, check: str, kind: str) -> None:
    for kinds, process in world[check]:
        assert kind in kinds
        assert max(numbers(process)) < EXACT, process


def test_a_number_that_is_not_finite_in_one_process_reaches_all_and_is_forgotten(
    world: World,
) -> None:
    for infected, later in world["ddp_not_finite_in_one"]:
        assert infected
        assert max(numbers(later)) < EXACT


def test_fsdp1_works_locally_and_is_refused_globally(world: World) -> None:
    for message, process in world["fsdp1_local"]:
        assert "pass scope='local'" in message
        assert max(numbers(process)) < EXACT, process


def test_a_step_whose_closure_runs_the_backward_has_to_finish_it(world: World) -> None:
    for message, process in world["ddp_closure"]:
        assert "tract_hub.finish(model)" in message
        assert max(numbers(process)) < EXACT, process


def test_processes_that_do_not_know_each_other_are_refused(tmp_path: Path) -> None:
    code = "from tests.integrations.processes import *; loss_of(build(), *batch())"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert process.returncode == 1
    assert "TractError" in process.stderr and "init_process_group" in process.stderr
