from __future__ import annotations

import itertools
import json

import pytest
import torch

from tests.studies.comparisons import ONE_SEED, TINY, TRACT, compare, tiny_study
from tract_hub.studies.compare import run as compare_module
from tract_hub.studies.compare.progress import Progress
from tract_hub.studies.compare.records import RunRecord
from tract_hub.studies.compare.snapshots import snapshot_epochs
from tract_hub.studies.compare.training import fresh_model, train_run


@pytest.mark.parametrize(
    ("epochs", "numbers", "kept"),
    [
        (15, 256, (0, 1, 3, 4, 5, 7, 8, 10, 11, 12, 14, 15)),
        (1, 256, (0, 1)),
        (2, 256, (0, 1, 2)),
        (100, 16 * 768, (0, 14, 29, 43, 57, 71, 86, 100)),
        (10, 10**6, (0, 10)),
    ],
)
def test_snapshots_are_even_with_the_start_and_the_end(epochs, numbers, kept):
    assert snapshot_epochs(epochs, numbers) == kept


def test_a_run_keeps_its_filters_from_start_to_end():
    study = tiny_study(epochs=3)
    kept = train_run(study, TRACT, 0, Progress()).filters
    assert kept.epochs == (0, 1, 2, 3)
    start = fresh_model(study, TRACT, 0).get_parameter(study.stems[0].weight_name)[list(kept.rows)]
    torch.testing.assert_close(torch.tensor(kept.values[0]), start.detach(), rtol=1e-4, atol=1e-9)
    snapshots = [torch.tensor(rows) for rows in kept.values]
    steps = [(b - a).abs().max().item() for a, b in itertools.pairwise(snapshots)]
    assert min(steps) > 1e-4  # each is of its own epoch
    assert all(value == float(f"{value:.5g}") for value in _flat(kept.values))


def _flat(values):
    return [x for item in values for x in _flat(item)] if isinstance(values, list) else [values]


def test_a_diverged_run_ends_with_the_epoch_that_diverged():
    study = tiny_study(epochs=30, optimizer="sgd", lr=1e30, schedule="constant")
    record = train_run(study, TRACT, 0, Progress())
    assert record.diverged_at == 1
    assert record.filters.epochs == (0, 1)
    again = RunRecord.from_json(json.loads(json.dumps(record.to_json(), allow_nan=False)))
    assert again.filters.epochs == (0, 1)


def test_runs_of_the_form_without_snapshots_are_not_taken(tmp_path):
    out = tmp_path / "out"
    assert compare(*TINY, *ONE_SEED, "--out", str(out)) == 0
    run = out / "runs" / "ordinary-seed0.json"
    whole = run.read_text()
    older = json.loads(whole)
    older["filters"]["values"] = older["filters"]["values"][-1]
    del older["filters"]["epochs"]
    run.write_text(json.dumps(older))
    assert compare(*TINY, *ONE_SEED, "--out", str(out)) == 0
    assert json.loads(run.read_text())["filters"] == json.loads(whole)["filters"]


def test_a_folder_of_an_older_format_is_refused(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    identity = compare_module._store(tiny_study(out=out)).identity
    assert identity.pop("format") == 2
    (out / "identity.json").write_text(json.dumps(identity))
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    assert compare(*TINY, "--out", str(out)) == 2
    assert "(format None there, 2 now)" in capsys.readouterr().err
