from __future__ import annotations

import math

import pytest

from tests.studies.comparisons import TRACT, record
from tract_hub.errors import UnpairedRunsError
from tract_hub.studies.compare.aggregate import (
    compare_runs,
    curve_over,
    first_epoch_at_least,
)
from tract_hub.studies.compare.records import ORDINARY
from tract_hub.studies.compare.tables import gain_table

TIMING = {
    "seconds": {"ordinary": 0.010, "TrAct λ=0.1": 0.011},
    "overhead": {"ordinary": 1.0, "TrAct λ=0.1": 1.1},
    "overhead_quartiles": {"ordinary": [1.0, 1.0], "TrAct λ=0.1": [1.0, 1.2]},
}


@pytest.mark.parametrize(
    ("curve", "target", "epoch"),
    [
        ([0.1, 0.5, 0.9], 0.5, 2),
        ([0.1, 0.5, 0.9], 0.51, 3),
        ([0.6, 0.5, 0.9], 0.55, 1),
        ([0.1, 0.5, 0.9], 0.91, None),
        ([], 0.0, None),
    ],
)
def test_first_epoch_is_the_first_that_is_high_enough(curve, target, epoch):
    assert first_epoch_at_least(curve, target) == epoch


def test_curve_has_mean_and_sample_deviation_by_epoch():
    curve = curve_over([[0.1, 0.4], [0.3, 0.8]])
    assert curve.mean == pytest.approx((0.2, 0.6))
    assert curve.spread == pytest.approx((math.sqrt(0.02), math.sqrt(0.08)))


def test_epochs_to_reach_use_the_mean_curves_and_the_ordinary_arms_own_first_epoch():
    runs = [
        record(ORDINARY, 0, [0.2, 0.5, 0.7, 0.6]),  # mean .2 .5 .6 .6: itself there at 3
        record(ORDINARY, 1, [0.2, 0.5, 0.5, 0.6]),
        record(TRACT, 0, [0.4, 0.7, 0.7, 0.7]),  # mean .4 .6 .65 .7: there at 2
        record(TRACT, 1, [0.4, 0.5, 0.6, 0.7]),
    ]
    comparison = compare_runs(runs, TIMING)
    ordinary, tract = comparison.arms
    assert comparison.target == pytest.approx(0.6)
    assert (ordinary.reached, tract.reached) == (3, 2)
    assert tract.ratio == pytest.approx(2 / 3)
    assert tract.reached_by_seed == {0: 2, 1: 3}
    assert tract.gain == pytest.approx({0: 0.1, 1: 0.1})
    assert (tract.step_seconds, tract.overhead) == (0.011, 1.1)


def test_an_arm_that_stays_below_did_not_reach():
    runs = [record(ORDINARY, 0, [0.2, 0.6]), record(TRACT, 0, [0.2, 0.5])]
    _, tract = compare_runs(runs, TIMING).arms
    assert (tract.reached, tract.ratio, tract.reached_by_seed) == (None, None, {0: None})


def test_a_diverged_seed_is_named_and_not_averaged():
    runs = [
        record(ORDINARY, 0, [0.2, 0.6]),
        record(ORDINARY, 1, [0.4, 0.8]),
        record(TRACT, 0, [0.2, 0.7]),
        record(TRACT, 1, [0.0], diverged_at=1, batches="fewer"),
    ]
    _, tract = compare_runs(runs, TIMING).arms
    assert tract.seeds == (0,)
    assert tract.diverged == {1: 1}
    assert tract.accuracy.mean == (0.2, 0.7)
    assert set(tract.gain) == {0}


def test_nothing_is_to_be_reached_when_the_ordinary_arm_diverged():
    runs = [record(ORDINARY, 0, [0.1], diverged_at=1), record(TRACT, 0, [0.2, 0.7])]
    comparison = compare_runs(runs, TIMING)
    assert comparison.target is None
    assert comparison.arms[1].reached is None
    assert comparison.arms[1].gain == {}


@pytest.mark.parametrize(("on_gpu", "times"), [(False, []), (True, [("10.00 ms", "11.00 ms")])])
def test_times_are_shown_of_a_gpu_only_and_ratios_always(on_gpu, times):
    comparison = compare_runs([record(ORDINARY, 0, [0.6]), record(TRACT, 0, [0.7])], TIMING)
    rows = gain_table(comparison, on_gpu).rows
    assert [tuple(cells) for name, *cells in rows if name == "step time"] == times
    assert ("step time ratio", "", "1.100 (1.000 to 1.200)") in rows


def test_an_ordinary_arm_alone_has_no_gain_to_show():
    table = gain_table(compare_runs([record(ORDINARY, 0, [0.6])], TIMING))
    assert table.title == "What came of it"
    assert [name for name, *_ in table.rows if "gain" in name or "ratio" in name] == []
    assert ("final accuracy", "60.0 %") in table.rows


@pytest.mark.parametrize("what", ["start", "batches"])
def test_arms_that_are_no_pair_are_refused(what):
    runs = [record(ORDINARY, 0, [0.2, 0.6]), record(TRACT, 0, [0.2, 0.7], **{what: "another"})]
    with pytest.raises(UnpairedRunsError, match="seed 0"):
        compare_runs(runs, TIMING)
