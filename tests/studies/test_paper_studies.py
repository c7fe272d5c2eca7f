"""The studies of the paper: their files, their statistics, and one of them from end to end."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from tests.studies.conftest import ROOT
from tract_hub.cli import main
from tract_hub.studies.compare.recipes import build_settings

STUDIES = ROOT / "scripts" / "studies"
sys.path.insert(0, str(STUDIES))

import run as run_module  # noqa: E402
import study as study_module  # noqa: E402
import trainings as trainings_module  # noqa: E402
from speedup import interval, lines_of, ratio_interval, shorter_schedules  # noqa: E402
from study import Part, known, load_study  # noqa: E402
from trainings import Run, Trained  # noqa: E402

SMALLER = [
    name
    for name in known()
    if "\nreduced:" in (STUDIES / "settings" / f"{name}.yaml").read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", known())
@pytest.mark.parametrize("reduced", [False, True])
def test_every_part_of_every_study_can_be_asked_for(name, reduced, monkeypatch) -> None:
    if reduced and name not in SMALLER:
        pytest.skip("has nothing smaller")
    study = load_study(name, reduced=reduced)
    for part in study.parts:
        options = dict(part.options)
        recipe = options.pop("recipe")
        if study.by == "compare":
            fields = {key.replace("-", "_"): value for key, value in options.items()}
            fields.pop("classes", None)  # text that the command line reads
            given = {"epochs": part.epochs, "lams": part.lams, "seeds": part.seeds}
            assert build_settings(recipe, fields | given).epochs == part.epochs
        else:
            monkeypatch.syspath_prepend(str(STUDIES.parent / "recipes"))
            from recipe import load_recipe

            changes = [f"{key}={value}" for key, value in options.items()]
            assert load_recipe(recipe, changes, smoke=False).batch_size > 0


def test_a_budget_shortens_every_part_alike_and_says_so() -> None:
    whole, short = load_study("fig3"), load_study("fig3", budget=0.05)
    assert [part.epochs for part in short.parts] == [p.epochs // 20 for p in whole.parts]
    assert {part.lams for part in short.parts} == {part.lams for part in whole.parts}
    assert short.scale == "the paper's models and data, 5.0% of the paper's epochs"


def test_a_smaller_study_claims_no_share_of_the_papers_epochs() -> None:
    smaller = load_study("fig3", budget=0.1, reduced=True)
    assert smaller.scale == "smaller models and fewer images, 5 and 10 epochs"


def test_the_learning_rate_follows_the_length() -> None:
    rates = {p.published: p.options["lr"] for p in load_study("fig3").parts if p.name == "Adam"}
    assert rates == {100: 1e-2, 200: 1e-2, 400: 1e-3, 800: 1e-3}


@pytest.mark.parametrize(
    ("name", "reduced", "says"),
    [("fig33", False, "there is no study fig33: there is default"), ("table2", True, "shorten it")],
)
def test_what_is_no_study_is_refused(name, reduced, says) -> None:
    with pytest.raises(ValueError, match=says):
        load_study(name, reduced=reduced)


def trained(name: str, epochs: int, curves: dict[float | None, list[list[float]]]) -> Trained:
    """A part whose runs have these accuracies, a list a seed; a NaN at the end diverged."""
    lams = tuple(lam for lam in curves if lam is not None)
    seeds = tuple(range(len(curves[None])))
    part = Part(name, epochs, epochs, lams, seeds, {})
    runs = [
        Run(lam, seed, tuple(values), math.isnan(values[-1]))
        for lam, rows in curves.items()
        for seed, values in enumerate(rows)
    ]
    return Trained(part, tuple(runs), dict.fromkeys(lams, 1.1), {}, "")


def test_an_interval_is_that_of_students_t() -> None:
    found = interval([1.0, 2.0, 4.0])
    half = 4.302653 * np.std([1, 2, 4], ddof=1) / math.sqrt(3)  # of a table, two degrees of freedom
    assert (found.mean, found.low, found.high) == pytest.approx((7 / 3, 7 / 3 - half, 7 / 3 + half))
    assert math.isnan(interval([1.0]).low)
    ratio = ratio_interval([0.5, 2.0, 1.0])
    assert ratio.mean == pytest.approx(1.0) and ratio.low * ratio.high == pytest.approx(1.0)


def test_a_line_pairs_seeds_and_counts_epochs_to_the_ordinary_end() -> None:
    ordinary = [[0.2, 0.4, 0.6, 0.6], [0.1, 0.2, 0.3, 0.5], [0.1, 0.3, 0.5, 0.4]]
    tract = [[0.3, 0.6, 0.6, 0.7], [0.1, 0.5, 0.6, 0.6], [0.1, 0.4, 0.5, 0.5]]
    first, second = lines_of([trained("a", 4, {None: ordinary, 0.1: tract})], None)
    assert (first.lam, first.gain, first.verdict, first.reached) == (None, None, "", 0)
    assert second.gain is not None and second.gain.mean == pytest.approx(0.1)
    assert (second.reached, second.verdict) == (3, "better")
    # Epoch 2 against 3, 2 against 4, and 2 against 3: there 0.4 is passed by 0.5 at epoch 3.
    assert second.epoch_ratio is not None
    assert second.epoch_ratio.mean == pytest.approx((2 / 3 * 2 / 4 * 2 / 3) ** (1 / 3))
    assert second.time_ratio is not None
    assert second.time_ratio.mean == pytest.approx(1.1 * second.epoch_ratio.mean)


@pytest.mark.parametrize(
    ("tract", "verdict", "reached", "diverged"),
    [
        ([[0.2, 0.2], [0.3, 0.31], [0.25, 0.24]], "worse", 0, 0),
        ([[0.5, 0.62], [0.6, 0.5], [0.6, 0.6]], "no difference shown", 3, 0),
        ([[0.5, 0.62], [0.6, math.nan], [0.5, 0.61]], "better", 2, 1),
    ],
)
def test_what_does_not_help_is_said(tract, verdict, reached, diverged) -> None:
    ordinary = [[0.3, 0.5], [0.4, 0.6], [0.3, 0.49]]
    line = lines_of([trained("a", 2, {None: ordinary, 0.1: tract})], None)[1]
    assert (line.verdict, line.reached, line.diverged) == (verdict, reached, diverged)
    assert (line.epoch_ratio is None) == (reached < 3)


def test_a_reference_part_is_met_at_its_own_length_and_by_seed() -> None:
    plain = trained("plain", 4, {None: [[0.5], [0.6]]})
    other = trained("other", 4, {None: [[0.6], [0.65]], 0.1: [[0.7], [0.75]]})
    longer = trained("plain", 8, {None: [[0.9], [0.9]]})
    lines = lines_of([plain, longer, other], "plain")
    over = [line.over_reference.mean for line in lines if line.part == "other"]
    assert over == pytest.approx([0.075, 0.175])


def test_a_shorter_schedule_is_set_against_longer_ones_of_the_same_part() -> None:
    short = trained("a", 4, {None: [[0.4], [0.5]], 0.1: [[0.6], [0.7]]})
    long = trained("a", 8, {None: [[0.5], [0.7]], 0.1: [[0.8], [0.8]]})
    (found,) = shorter_schedules([short, long, trained("b", 8, {None: [[0.1], [0.1]]})])
    assert (found.epochs, found.ordinary_epochs, found.lam) == (4, 8, 0.1)
    assert found.gain.mean == pytest.approx(0.05)


TINY = {
    "title": "A tiny study",
    "data": "cifar10",
    "seeds": [0, 1],
    "epochs": [20, 40],
    "against": "plain",
    "parts": {
        "plain": {"recipe": "digits-vit"},
        "bytes": {"recipe": "digits-vit", "normalise": "bytes", "epochs": [40]},
    },
}
QUICK = (
    "--image-size 8 --model-arg patch_size=4 --model-arg embed_dim=16 --model-arg depth=1 "
    "--model-arg num_heads=2 --batch-size 32 --max-train 64 --max-test 32 --device cpu"
).split()


OPTIONS = "tiny --data digits --budget 0.05".split()


def in_this_process(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
    """Spare the seconds that a process takes to import what is imported here already."""
    assert command[:3] == [sys.executable, "-m", "tract_hub"]
    try:
        main(command[3:])
    except SystemExit as stop:
        return subprocess.CompletedProcess(command, int(stop.code or 0))
    return subprocess.CompletedProcess(command, 0)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a runner of a study of two parts and two lengths, shortened to 1 and 2 epochs."""
    monkeypatch.setattr(study_module, "SETTINGS", tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY, sort_keys=False))
    # "digits" is the name of a data set, and no path.
    monkeypatch.setattr(run_module, "_check_data", lambda *_: None)
    monkeypatch.setattr(trainings_module.subprocess, "run", in_this_process)
    app = run_module.typer.Typer()
    app.command()(run_module.main)

    def call(*options: str, out: Path = tmp_path / "out"):
        given = [*OPTIONS, "--out", str(out), *options, "--", *QUICK]
        return CliRunner().invoke(app, given)

    return call


def test_a_study_trains_all_parts_once_and_writes_what_it_found(tiny, tmp_path) -> None:
    assert (done := tiny()).exit_code == 0, done.output
    folder = tmp_path / "out" / "tiny"
    found = json.loads((folder / "study.json").read_text())
    arms = [(line["part"], line["epochs"], line["lam"]) for line in found["lines"]]
    lengths = [("plain", 1), ("plain", 2), ("bytes", 2)]
    assert arms == [(*part, lam) for part in lengths for lam in (None, 0.1)]
    assert len(found["runs"]) == 3 * 2 * 2 and found["format"] == 1
    (short,) = found["shorter_schedules"]
    assert (short["epochs"], short["ordinary_epochs"]) == (1, 2)
    page = (folder / "table.md").read_text()
    for words in ("# A tiny study", "5.0% of the study's epochs", "; over plain: ", "run.py tiny"):
        assert words in page
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")

    runs = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*-seed*.json")}
    next(iter(runs)).unlink()
    assert tiny().exit_code == 0
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*-seed*.json")}
    changed = [path for path in runs if again[path] != runs[path]]
    assert changed == [next(iter(runs))], "only what was missing is trained again"

    from summary import summarise

    (line,) = [row for row in summarise(tmp_path / "out").splitlines() if "| bytes |" in row]
    assert line.startswith("| tiny | bytes | 2 | +")
    (folder / "study.json").write_text(
        (folder / "study.json").read_text().replace('"format": 1', '"format": 0')
    )
    with pytest.raises(ValueError, match="is of another format than 1"):
        summarise(tmp_path / "out")

    # A part whose runs another version made is refused, and its results are not merged.
    identity = next((tmp_path / "out").glob("*bytes*/identity.json"))
    identity.write_text(identity.read_text().replace('"timm": "', '"timm": "0.'))
    shutil.rmtree(folder)
    refused = tiny()
    assert refused.exit_code == 2 and not folder.exists()


IN_A_PROCESS = """
import pathlib, sys
folder, studies = sys.argv.pop(1), sys.argv.pop(1)
sys.path.insert(0, studies)
import run, study
study.SETTINGS, run._check_data = pathlib.Path(folder), lambda *_: None
run.typer.run(run.main)
"""


def kill_after(process: subprocess.Popen[bytes], out: Path, runs: int, wait: float) -> None:
    """Kill a study and what it has started, a while after so many runs are finished."""
    deadline = time.monotonic() + 200
    while len(finished(out)) < runs and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(wait)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def finished(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("runs/*-seed*.json")}


def results_of(out: Path) -> object:
    """Return what a study found, but for what it took."""
    found = json.loads((out / "tiny" / "study.json").read_text())
    for line in found["lines"]:
        line.pop("time_ratio")
    return found


def test_a_study_killed_again_and_again_ends_as_the_uninterrupted_one(tiny, tmp_path) -> None:
    whole, killed, draw = tmp_path / "out", tmp_path / "killed", random.Random(0)
    assert tiny().exit_code == 0
    kept: dict[Path, bytes] = {}
    for runs in (1, 5):  # four are the first part's
        command = [sys.executable, "-c", IN_A_PROCESS, str(tmp_path), str(STUDIES), *OPTIONS]
        options = ["--out", str(killed), "--", *QUICK]
        process = subprocess.Popen([*command, *options], cwd=ROOT, start_new_session=True)
        kill_after(process, killed, runs, draw.uniform(0, 0.1))
        assert kept.items() <= finished(killed).items(), "trained again"
        kept = finished(killed)
        assert runs <= len(kept) < 12 and not (killed / "tiny").exists()
    assert tiny(out=killed).exit_code == 0
    assert kept.items() <= finished(killed).items() and len(finished(killed)) == 12
    assert results_of(killed) == results_of(whole)


def test_results_of_unlike_parts_are_refused() -> None:
    run_module._check_alike([{"versions": {"torch": "1"}}, {"versions": {"torch": "1"}}])
    with pytest.raises(run_module.typer.BadParameter, match="trained with another versions"):
        run_module._check_alike([{"versions": {"torch": "1"}}, {"versions": {"torch": "2"}}])


@pytest.mark.parametrize(("name", "data"), [("table2", None), ("fig3", "nowhere")])
def test_missing_data_are_refused_with_the_command_that_fetches_them(name, data) -> None:
    with pytest.raises(run_module.typer.BadParameter, match=r"fetch them: .*expected: ") as refused:
        run_module._check_data(load_study(name), data)
    assert ("image-net.org" if name == "table2" else "hf download") in str(refused.value)
