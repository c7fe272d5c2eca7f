"""``tract-hub bench`` on a model small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import tract_hub
from tract_hub.cli import main
from tract_hub.errors import StudyError
from tract_hub.studies.bench import cases, memory
from tract_hub.studies.bench.arms import Setup, Stepper
from tract_hub.studies.bench.cases import Case
from tract_hub.studies.bench.report import OWN, failures, markdown, memory_table, steps_table
from tract_hub.studies.bench.steps import time_case
from tract_hub.studies.interleaved import Ratio, interleave, ratio


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("resnet18", 32, 2, small_stem=True, arguments={"channels": (8, 8, 8, 8)})
    monkeypatch.setitem(cases.CASES, "cpu", {"tiny": case})


def bench(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments])
    return int(stopped.value.code or 0)


def test_the_time_added_is_measured_and_written(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--budget", "0", "--no-memory", "--out", str(tmp_path)) == 0
    assert capsys.readouterr().out.endswith(f"written to {tmp_path}: bench.md, bench.json\n")
    arms = json.loads((tmp_path / "bench.json").read_text())["cases"]["tiny"]
    assert arms["ordinary"]["ratio"] == {"median": 1.0, "first": 1.0, "third": 1.0}
    assert arms["tract_hub"]["ratio"]["median"] > 0
    assert "error" in arms["torch_tract"] or arms["torch_tract"]["seconds"] > 0
    assert "| tiny |" in (tmp_path / "bench.md").read_text()


def test_an_interrupted_benchmark_promises_no_resumption(
    tiny: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tract_hub.studies.bench.run.time_case", interrupt)
    assert bench("--no-memory", "--out", str(tmp_path)) == 130
    assert capsys.readouterr().err.endswith("tract-hub: interrupted\n")


@pytest.mark.parametrize("here", [False, True])
def test_the_clock_inside_the_step_is_of_the_device_that_it_runs_on(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here)  # it does not matter
    assert bench("--budget", "0", "--no-memory", "--out", str(tmp_path)) == 0
    own = json.loads((tmp_path / "bench.json").read_text())["cases"]["tiny"]["tract_hub"]["own"]
    assert 0 < own < 1
    report = (tmp_path / "bench.md").read_text()
    assert f"| {OWN} |" in report
    assert "by their own clock" in report


def test_what_was_not_clocked_is_left_out_of_the_table(
    tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Module, "compile", lambda model: None)  # takes a minute
    setup = Setup(torch.device("cpu"), compiled=True)
    timed = {"tiny": time_case(cases.CASES["cpu"]["tiny"], setup, budget=0.0)}
    assert timed["tiny"]["tract_hub"]["own"] is None
    table = steps_table(timed)
    assert table[0] == ["case", "torch_tract", "tract_hub"]
    assert [len(line) for line in table] == [3, 3]
    assert "clock" not in markdown("", table, None)


def test_why_an_arm_cannot_run_is_said_once_below_the_table() -> None:
    measured = {"seconds": 0.01, "ratio": Ratio(1.0, 0.9, 1.1), "rounds": 100}
    failed = {"error": "RuntimeError: no bfloat16"}
    case = {
        "ordinary": measured,
        "torch_tract": failed,
        "tract_hub": {**measured, "own": None},
    }
    cases = {"small": case, "large": case}
    table = steps_table(cases, absolute=True)
    assert table[1] == ["small", "10.00 ms", "cannot run", "+0.0% ± 3.1% (-10.0% to +10.0%)"]
    why = "torch_tract cannot run: RuntimeError: no bfloat16 (small, large)"
    assert failures(cases) == [why]
    assert markdown("", table, None, failures(cases)).count(why) == 1


def test_an_unknown_case_or_device_is_one_line(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--cases", "resnet", "--out", str(tmp_path)) == 2
    assert "there is no case 'resnet'; there is tiny" in capsys.readouterr().err
    assert bench("--device", "abacus", "--out", str(tmp_path)) == 2
    assert "no device 'abacus'" in capsys.readouterr().err


def test_memory_is_not_measured_where_the_system_does_not_tell_it(
    tiny: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    exists = Path.exists
    elsewhere = Path("/proc/self/status")
    monkeypatch.setattr(Path, "exists", lambda path: path != elsewhere and exists(path))
    assert bench("--out", str(tmp_path / "bench")) == 2
    assert "peak memory is measured on Linux only: add --no-memory" in capsys.readouterr().err
    assert not (tmp_path / "bench").exists()


def test_a_batch_too_large_for_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "BATCHES", (10**9,))  # 600 TB
    with pytest.raises(StudyError, match="ordinary did not survive a batch of 1000000000 images"):
        memory.peak_memory()


def test_turns_are_taken_in_reverse_every_second_round() -> None:
    order: list[str] = []
    timers = [lambda name=name: order.append(name) or len(order) for name in "abc"]
    assert interleave(timers, 2) == [[1, 2, 3], [6, 5, 4]]
    assert order == list("abccba")


def test_the_arms_step_with_the_same_weights_and_images_and_leave_the_ordinary_model_so(
    tiny: None,
) -> None:
    case, setup = cases.CASES["cpu"]["tiny"], Setup(torch.device("cpu"))
    ordinary = Stepper(case, "ordinary", setup)
    ours = Stepper(case, "tract_hub", setup, ordinary)
    assert ours.images is ordinary.images
    pairs = zip(ordinary.model.parameters(), ours.model.parameters(), strict=True)
    assert all(one is other for one, other in pairs)
    assert tract_hub.status(ours.model)
    assert not tract_hub.status(ordinary.model)


def test_the_median_is_as_sure_as_the_rounds_are_many() -> None:
    shares = {"ratio": Ratio(1.1, 1.05, 1.15), "rounds": 100}
    table = steps_table({"tiny": {"torch_tract": shares, "tract_hub": {**shares, "own": None}}})
    assert table[1][1] == "+10.0% ± 1.6% (+5.0% to +15.0%)"


def test_nothing_added_has_no_minus() -> None:
    shares = {"ratio": Ratio(0.9998, 0.98, 1.0), "rounds": 100}
    table = steps_table({"tiny": {"torch_tract": shares, "tract_hub": {**shares, "own": None}}})
    assert table[1][1].startswith("+0.0% ± ")
    assert table[1][1].endswith("(-2.0% to +0.0%)")


def test_ratios_are_of_the_same_round() -> None:
    assert ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]).median == 3.0


def test_memory_is_what_is_added_to_the_ordinary_peak() -> None:
    peaks = {"ordinary": {64: 1000.0}, "tract_hub": {64: 1030.4}}
    assert memory_table(peaks) == [["batch", "tract_hub"], ["64", "+30 MiB"]]
