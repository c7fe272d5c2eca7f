"""The verdict: coverage by simulation, speed by hand-made curves, sentences that are true."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from tract_hub.studies import table, verdict

IMAGES = 400


def simulated(rng, runs, seeds, images, effect, seed_sd, image_sd):
    """Paired correctness of made-up trainings: … × seeds × images, and nothing else known."""

    def draw(sizes):
        runs, seeds, images = sizes
        difficulty = rng.normal(0.5, 2, (runs, 1, images))
        of_image = effect + image_sd * rng.normal(size=(runs, 1, images))
        ordinary, ours = (
            difficulty
            + shift
            + seed_sd * rng.normal(size=(runs, seeds, 1))
            + 0.3 * rng.normal(size=(runs, seeds, images))
            for shift in (0, of_image)
        )
        correct = [rng.random(x.shape) < expit(4 * x) for x in (ours, ordinary)]
        return correct[0].astype(float) - correct[1]

    truth = draw((2000, 2, 1000)).mean() if effect or image_sd else 0.0
    return truth, draw((runs, seeds, images))


@pytest.mark.parametrize("seeds", [2, 3, 5, 12])
@pytest.mark.parametrize(
    ("effect", "seed_sd", "image_sd"), [(0.0, 0.1, 0.0), (0.2, 0.3, 0.1), (0.2, 0.1, 0.3)]
)
def test_intervals_cover_the_truth(seeds, effect, seed_sd, image_sd):
    rng = np.random.default_rng(seeds)
    truth, differences = simulated(rng, 2500, seeds, 300, effect, seed_sd, image_sd)
    variance = verdict.paired(differences)
    half = variance.half_width()
    # The simulation itself is sure to ± 0.9 points (2 of its deviations).
    assert 0.93 <= np.mean(abs(variance.mean - truth) <= half) <= 0.97
    if effect == 0:
        assert np.mean(variance.mean > half) <= 0.03, "helped, where nothing did"
        assert np.mean(variance.mean < -half) <= 0.03


def test_balanced_accuracy_counts_classes_alike():
    labels = np.array([7] * 90 + [3] * 10)
    differences = np.zeros((3, 100))
    differences[:, 90:] = 1.0
    assert verdict.paired(differences, labels).mean == pytest.approx(0.5)
    assert verdict.paired(differences).mean == pytest.approx(0.1)


def test_equal_runs_have_an_interval_still():
    interval = verdict.paired(np.zeros((3, 200))).interval()
    assert interval.low < 0 < interval.high
    assert interval.high < 0.02


def test_epochs_are_interpolated_and_never_left_out():
    curve = np.array([0.3, 0.5, 0.4, 0.9])
    assert verdict.epochs_to(curve, 0.4, 0.1) == pytest.approx(1.5)
    assert verdict.epochs_to(curve, 0.5, 0.1) == pytest.approx(2.0)
    assert verdict.epochs_to(curve, 0.7, 0.1) == pytest.approx(3.5)
    assert verdict.epochs_to(curve, 0.95, 0.1) == np.inf
    # A peak before a dip is what was reached.
    assert verdict.epochs_to(np.array([0.5, 0.2]), 0.5, 0.1) == pytest.approx(1.0)


def of_curves(*lines):
    accuracy = np.array(lines)
    seeds = tuple(range(len(accuracy)))
    return verdict.Curves(seeds, accuracy, np.zeros((*accuracy.shape, 1), dtype=bool))


def test_speed_is_paired_by_seed():
    ordinary = of_curves([0.2, 0.4, 0.6, 0.8], [0.1, 0.2, 0.3, 0.4], [0.2, 0.4, 0.6, 0.8])
    twice = of_curves([0.4, 0.8, 0.8, 0.8], [0.2, 0.4, 0.4, 0.4], [0.4, 0.8, 0.8, 0.8])
    ratio = verdict.epoch_ratio(twice, ordinary, 0.8, 0.0)
    assert ratio.mean == pytest.approx(0.5)
    assert not ratio.open


def test_a_level_that_is_not_reached_is_a_lower_bound():
    ordinary = of_curves([0.2, 0.8, 0.8], [0.4, 0.8, 0.8])
    slower = of_curves([0.2, 0.3, 0.4], [0.4, 0.8, 0.8])
    ratio = verdict.epoch_ratio(slower, ordinary, 0.95, 0.0)
    assert ratio.open
    assert ratio.high == np.inf
    assert ratio.mean >= (3 / 1.93) ** 0.5 * 0.99
    assert "or more" in ratio.ratio()


def rows_of(ordinary, ours, seeds, rng, epochs=3, images=IMAGES):
    """Rows of a study whose runs end with these shares of right images, alike in each epoch."""
    difficulty = rng.random(images)
    lines = []
    for seed in range(seeds):
        for arm, level in (("ordinary", ordinary), ("TrAct λ=0.1", ours)):
            for epoch in range(1, epochs + 1):
                noise = 0.1 * rng.normal(size=images)
                correct = difficulty + noise < level * epoch / epochs
                lines.append(("s", arm, epochs, 0.1, seed, epoch, 1.0, correct.mean(),
                              correct.mean(), 1.0, table.pack(correct)))  # fmt: skip
    return pd.DataFrame(lines, columns=table.COLUMNS)


CASES = {
    "helped": (0.7, 0.85, 5, "TrAct λ=0.1 helped: +"),
    "hurt": (0.85, 0.7, 5, "TrAct λ=0.1 hurt: −"),
    "equal": (0.8, 0.8, 6, "No difference shown after 3 epochs"),
    "chance": (0.1, 0.1, 3, "This comparison says nothing about TrAct: ordinary training ended"),
    "two seeds": (0.8, 0.8, 2, "2 seeds are few: give at least 3."),
    "one seed": (0.7, 0.85, 1, "One seed cannot tell"),
}


@pytest.mark.parametrize(("ordinary", "ours", "seeds", "said"), CASES.values(), ids=CASES)
def test_the_sentence_says_what_the_runs_show(ordinary, ours, seeds, said):
    rows = rows_of(ordinary, ours, seeds, np.random.default_rng(0))
    study = verdict.Study("accuracy", np.arange(IMAGES) % 10, {3: 0.1})
    (found,) = verdict.outcomes(rows, study, [("TrAct λ=0.1", 3)])
    assert said in found.sentence
    assert found.seeds == seeds
    if "shown" in said:
        assert "seeds would show" in found.sentence or "are unlikely" in found.sentence


def test_a_shorter_training_is_compared_with_longer_ones():
    rng = np.random.default_rng(1)
    rows = pd.concat([rows_of(0.6, 0.8, 4, rng, n) for n in (2, 4)])
    study = verdict.Study("accuracy", np.arange(IMAGES) % 10, {2: 0.1, 4: 0.1})
    found = verdict.outcomes(rows, study, [("TrAct λ=0.1", 4), ("TrAct λ=0.1", 2)])
    assert [(one.epochs, one.against) for one in found] == [(4, 4), (2, 2), (2, 4)]
    assert "against 4 of ordinary training" in found[2].sentence
