"""The half hour on a GPU, tried on a CPU with tiny models and data, and stopped in between."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tract_hub.studies import table
from tract_hub.studies.compare import check_identity, prepare

SCRIPTS = Path(__file__).parents[1] / "scripts/gpu"


def test_the_command_does_all_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # other tests train in this process
    monkeypatch.syspath_prepend(SCRIPTS)
    run = pytest.importorskip("run")
    training = sys.modules["training"]
    command = ["--smoke", "--out", str(tmp_path)]
    settings = training.studies("", tmp_path, smoke=True)[0]
    longest = training.runs(settings, smoke=True)[-1]
    experiment = prepare(settings)
    check_identity(settings.out, experiment)
    assert not training.train_one(experiment, longest, end=0.0)
    assert len(table.read(settings.out / "runs.jsonl")) == 1  # it stopped after an epoch
    try:
        assert run.main(command) == 0
        before = {path: path.read_text() for path in tmp_path.rglob("*.jsonl")}
        assert run.main([*command, "--minutes", "0"]) == 0  # nothing is left to do
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert {path: path.read_text() for path in tmp_path.rglob("*.jsonl")} == before
    rows = [json.loads(line) for line in (tmp_path / "costs.jsonl").read_text().splitlines()]
    measured = {(row["precision"], row["compiled"], row["arm"]) for row in rows if "ms" in row}
    ways = (("bf16", False), ("fp32", False), ("bf16", True))
    assert measured >= {(*way, arm) for way in ways for arm in ("ordinary", "tract_hub")}
    page = (tmp_path / "README.md").read_text()
    for part in ("skipped, 0 failed", "| tract_hub |", "TFLOP/s", "| TrAct λ=0.1 | 3 | 3 | 2 |"):
        assert part in page, part
    for recipe in ("narrow-resnet18", "small-vit"):
        runs = table.read(tmp_path / recipe / "runs.jsonl")
        assert len(runs) == 2 * (1 + 2 + 3 + 2 + 3)
        assert not list((tmp_path / recipe / "state").glob("*"))
