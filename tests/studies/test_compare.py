"""``compare`` as a user runs it: one table, resumable, and an answer first."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pandas as pd
import pytest

from tests.studies.conftest import SMALL
from tract_hub.errors import SettingsError
from tract_hub.studies import table
from tract_hub.studies.compare import compare, finished
from tract_hub.studies.settings import Compare, recipe_of

COMMAND = [sys.executable, "-m", "tract_hub", "compare", "--device", "cpu"]
COMMAND += "--image-size 8 --max-train 128 --max-test 100 --epochs 2 3 --lr 0.2 --seeds 1".split()


def rows_of(folder):
    return table.read(folder / "runs.jsonl").drop(columns="seconds")


def test_a_row_an_epoch_and_an_answer(small):
    rows = rows_of(small)
    assert len(rows) == 2 * 3 * 2  # arms, seeds, epochs
    assert set(rows["arm"]) == {"ordinary", "TrAct λ=0.1"}
    assert rows["accuracy"].between(0, 1).all()
    page = (small / "report.html").read_text(encoding="utf-8")
    at = [page.index(part) for part in ('class="verdict"', "<img", "<table", "<pre>")]
    assert at == sorted(at)
    assert (small / "compare.png").stat().st_size > 10_000


def test_the_same_command_again_trains_nothing(small, capsys):
    before = (small / "runs.jsonl").read_bytes()
    compare(replace(SMALL, out=small))
    assert (small / "runs.jsonl").read_bytes() == before
    assert "seeds" in capsys.readouterr().out


def test_other_seeds_are_added_and_other_settings_refused(small, tmp_path):
    with pytest.raises(SettingsError, match="batch_size 64, not 32"):
        compare(replace(SMALL, out=small, batch_size=32))


def test_both_arms_of_a_seed_start_alike_and_the_order_of_runs_does_not_matter(small, tmp_path):
    compare(replace(SMALL, out=tmp_path, first_seed=2, seeds=1))
    ours, theirs = rows_of(tmp_path), rows_of(small)
    theirs = theirs[theirs["seed"] == 2].reset_index(drop=True)
    assert ours.drop(columns="study").equals(theirs.drop(columns="study"))


def test_lengths_rates_and_arms(tmp_path, capsys):
    settings = replace(
        SMALL, out=tmp_path, seeds=1, epochs=(1,), ordinary_epochs=(2,), lr=(0.001, 0.2)
    )
    compare(replace(settings, rescaled=True, stem_lr=(3.0,), max_train=128))
    done = finished(tmp_path)
    grid = {("ordinary", n, lr, 0) for n in (1, 2) for lr in (0.001, 0.2)}
    assert grid <= done
    others = {key[:2] for key in done - grid}
    assert others == {
        (arm, 1) for arm in ("TrAct λ=0.1", "TrAct λ=0.1 rescaled", "ordinary, first layer lr ×3")
    }
    assert "against 2 of ordinary training" in capsys.readouterr().out
    assert (tmp_path / "lengths.png").stat().st_size > 10_000
    verdicts = pd.read_csv(tmp_path / "table.csv")["verdict"]
    assert verdicts.str.endswith(".").all()


def test_a_diverged_training_ends_and_is_told(tmp_path, capsys):
    compare(replace(SMALL, out=tmp_path, lr=(1e30,)))
    assert rows_of(tmp_path)["loss"].isna().any()
    assert "says nothing about TrAct" in capsys.readouterr().out


def killed_and_resumed(folder, kills, rng):
    """Run the command until it ends, killing it at random moments."""
    left = kills
    while True:
        process = subprocess.Popen([*COMMAND, "--out", str(folder)], stdout=subprocess.PIPE)
        if not left:
            assert process.wait() == 0
            return
        left -= 1
        for _ in range(rng.randint(3, 10)):  # somewhere in the training
            process.stdout.readline()
        time.sleep(rng.random() / 5)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def check_kills(tmp_path, kills):
    rng = random.Random(0)
    killed_and_resumed(tmp_path / "whole", 0, rng)
    killed_and_resumed(tmp_path / "killed", kills, rng)
    assert rows_of(tmp_path / "killed").equals(rows_of(tmp_path / "whole"))


def test_kill_9_changes_nothing(tmp_path):
    check_kills(tmp_path, 2)


@pytest.mark.soak
def test_twenty_kills_change_nothing(tmp_path):
    check_kills(tmp_path, 20)


def test_half_a_line_is_no_row(small, tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_bytes((small / "runs.jsonl").read_bytes() + b'{"study": "cut')
    assert rows_of(tmp_path).equals(rows_of(small))
    table.append(path, json.loads((small / "runs.jsonl").read_text().splitlines()[0]))
    assert rows_of(tmp_path).equals(rows_of(small))


def test_recipes_are_chosen_by_what_is_given():
    assert recipe_of([]).recipe == "digits"
    assert recipe_of(["--model", "resnet18"]).recipe == "own"
    assert recipe_of(["--recipe=cifar-vit", "--data", "x"]).recipe == "cifar-vit"
    with pytest.raises(SettingsError, match="did you mean cifar-vit"):
        recipe_of(["--recipe", "cifarvit"])


@pytest.mark.parametrize(
    ("name", "value"), [("lam", (0.0,)), ("seeds", 0), ("epochs", ()), ("lr", (float("nan"),))]
)
def test_values_that_make_no_sense_are_refused(name, value):
    with pytest.raises(SettingsError, match=f"--{name} "):
        Compare(**{name: value})
