"""The console command: help, errors in one line, and the small commands."""

import json
import subprocess
import sys

import pytest
import torch

import tract_hub
from tract_hub.cli import COMMANDS, main
from tract_hub.method.calls import LinearCall
from tract_hub.studies.inspect import added_flops
from tract_hub.studies.settings import RECIPES, Compare


def said(capsys, *words):
    """Run a command; return its exit status and everything that it printed."""
    with pytest.raises(SystemExit) as exit_:
        main(list(words))
    return exit_.value.code, "".join(capsys.readouterr())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_option(command, capsys):
    status, text = said(capsys, command, "--help")
    assert status == 0
    if command == "compare":
        for name in Compare.__dataclass_fields__:
            assert f"--{name.replace('_', '-')}" in text
        for recipe in RECIPES:
            assert recipe in text


def test_version_and_start(capsys):
    assert said(capsys, "--version") == (0, f"tract-hub {tract_hub.__version__}\n")
    assert said(capsys, "--help")[0] == 0
    assert said(capsys)[0] == 2


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("compar", "did you mean compare"),
        ("compare --lam 0", "--lam must be greater than 0 and finite, got 0"),
        ("compare --recipe digit", "did you mean digits"),
        ("compare --data nowhere/at/all", "no folder or file"),
        ("compare --model resnet18x", "did you mean resnet18"),
        ("compare --precision fp16 --device cpu", "needs a GPU"),
        ("compare --batch-size 5000 --device cpu", "more than the 1347 training images"),
        ("compare --lamm 0.1", "--lam"),
        ("bench --cases resnet", "did you mean resnet"),
        ("inspect resnet18x", "did you mean resnet18"),
        ("audit timm --only nothing*", "a pattern is vit_*"),
    ],
)
def test_wrong_words_get_one_sentence(words, answer, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, text = said(capsys, *words.split())
    assert status == 2
    assert answer in text
    assert "Traceback" not in text


def test_bench_measures_ratios(capsys, tmp_path):
    words = "bench --cases mlp-28 --budget 1 --no-memory --out"
    assert said(capsys, *words.split(), str(tmp_path))[0] == 0
    (case,) = json.loads((tmp_path / "bench.json").read_text())["cases"]
    low, middle, high = case["tract_hub"]
    assert 0.5 < low <= middle <= high < 50
    assert case["turns"] >= 3
    assert "| mlp-28 | 64 |" in (tmp_path / "bench.md").read_text()


def test_inspect_counts_the_share_at_a_batch(capsys):
    shares = []
    for batch in ("1", "128"):
        words = ["inspect", "resnet18", "--json", "--batch-size", batch]
        status, text = said(capsys, *words)
        assert status == 0
        (layer,) = json.loads(text)["first_layers"]
        assert layer["weight"] == "conv1.weight"
        shares.append(layer["share"])
    assert 0.005 < shares[1] < shares[0] < 0.1


@pytest.mark.parametrize(("rows", "flops"), [(20, 20 * 10 * 10), (4, 4 * 10 * 4)])
def test_the_smaller_of_both_matrices_is_counted(rows, flops):
    call = LinearCall("linear", torch.zeros(rows, 10), torch.zeros(3, 10))
    side = min(rows, 10)
    assert added_flops(call, 1.0) == pytest.approx(flops + side**3 / 3 + 2 * 10 * side * 3)


def test_audit_goes_on_where_it_stopped(tmp_path):
    words = [sys.executable, "-m", "tract_hub", "audit", "timm", "--only", "test_vit?"]
    partial = tmp_path / "timm.partial.jsonl"
    words += ["--out", str(tmp_path)]
    subprocess.run(words, check=True)
    models = json.loads((tmp_path / "timm.json").read_text())["models"]
    assert {model["result"] for model in models} == {"exact"}
    versions = json.loads((tmp_path / "timm.json").read_text())["versions"]
    kept = {**models[0], "result": "multiple"}
    partial.write_text("\n".join(map(json.dumps, ({"versions": versions}, kept))) + '\n{"cut')
    subprocess.run(words, check=True)
    again = json.loads((tmp_path / "timm.json").read_text())["models"]
    assert again == [kept, *models[1:]]
