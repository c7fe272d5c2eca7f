from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.studies.comparisons import record
from tract_hub.studies.compare import plots
from tract_hub.studies.compare.aggregate import compare_runs
from tract_hub.studies.compare.plots import draw, filter_images
from tract_hub.studies.compare.records import ORDINARY, Arm

LAMS = (0.05, 0.1, 0.2)


def drawn(monkeypatch, arms) -> Figure:
    runs = [record(arm, seed, [0.2, 0.5 + seed / 10]) for arm in arms for seed in (0, 1)]
    ones = {str(arm): 1.0 for arm in arms}
    quartiles = {str(arm): [1.0, 1.0] for arm in arms}
    times = {"seconds": ones, "overhead": ones, "overhead_quartiles": quartiles}
    kept = []

    class Kept(Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            kept.append(self)

    monkeypatch.setattr(plots, "Figure", Kept)
    assert draw(compare_runs(runs, times), runs, "title", 10).startswith(b"\x89PNG")
    return kept[0]


@pytest.mark.parametrize("count", [1, 3])
def test_every_arm_has_a_curve_a_legend_entry_and_a_row_of_filters(monkeypatch, count):
    arms = [ORDINARY, *(Arm(lam) for lam in LAMS[:count])]
    figure = drawn(monkeypatch, arms)
    accuracy, loss = figure.subfigs[0].axes
    entries = [text.get_text() for text in figure.subfigs[0].legends[0].get_texts()]
    assert [entry.split(" (")[0] for entry in entries if "seeds" in entry] == [
        str(arm) for arm in arms
    ]
    curves = [line for line in accuracy.lines if "seeds" in line.get_label()]
    assert len({line.get_color() for line in curves}) == len(arms)
    assert len({line.get_marker() for line in curves}) == len(arms)
    assert len({line.get_linestyle() for line in curves}) == len(arms)
    for axes in (accuracy, loss):
        assert axes.get_xlabel() == "epoch"
        assert axes.get_ylabel()
        assert len(axes.collections) == len(arms)  # the bands
    assert len(figure.subfigs[1].axes) == len(arms)


@pytest.mark.parametrize(
    ("shape", "picture"),
    [
        ((3, 4, 4), (4, 4, 3)),
        ((1, 4, 4), (4, 4)),
        ((4, 5, 5), (5, 20)),
        ((48,), (4, 4, 3)),
        ((16,), (4, 4)),
        ((7,), (1, 7)),
        ((3, 2, 4, 4), (4, 4, 3)),
        ((1, 9), (1, 9)),
    ],
)
def test_filters_of_any_stem_become_pictures(shape, picture):
    values = np.random.default_rng(0).normal(size=shape)
    image = filter_images([values.tolist()])[0]
    assert image.shape == picture
    assert image.min() >= 0
    assert image.max() <= 1


def test_a_filter_of_zeros_is_middle_grey():
    assert (filter_images([[[[0.0]]]])[0] == 0.5).all()
