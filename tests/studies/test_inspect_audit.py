"""The commands ``inspect`` and ``audit``."""

import json

import pytest
import torch

from tract_hub.cli import main
from tract_hub.errors import TractError
from tract_hub.studies.audit.run import run_audit


def run(*arguments):
    with pytest.raises(SystemExit) as exited:
        main(list(arguments))
    return exited.value.code


def test_inspect_says_in_words_what_it_found(capsys) -> None:
    assert run("inspect", "resnet10t") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "conv1.0.weight" in lines
    assert "  layer   Conv2d 3×3, stride 2, padding 1; 27 input features" in lines
    assert "  pixels  reach it directly" in lines
    assert any(line.startswith("  TrAct   adds ") for line in lines)


@pytest.mark.parametrize("name", ["microsoft/resnet-50", "./nowhere"])
def test_inspect_takes_no_name_with_a_slash_for_one_mistyped(name, capsys) -> None:
    assert run("inspect", name) == 2
    assert "nothing is downloaded" in capsys.readouterr().err


def test_without_a_command_the_help_is_all_that_is_printed(capsys) -> None:
    assert run() == 2
    printed = capsys.readouterr()
    assert "Commands" in printed.out + printed.err
    assert "tract-hub: " not in printed.err


@pytest.mark.parametrize("name", ["repvgg_a0", "torchvision:raft_small", "vit"])
def test_inspect_prints_json(name, capsys) -> None:
    assert run("inspect", name, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["first_layers"]
    for layer in data["first_layers"]:
        assert 0 < layer["cost"]["share"] < 0.1
        assert layer["cost"]["bytes"] >= 16 * layer["in_features"] ** 2


def test_cost_is_the_count_by_hand(capsys) -> None:
    assert run("inspect", "resnet18", "--json") == 0
    (layer,) = json.loads(capsys.readouterr().out)["first_layers"]
    n, outputs = 147, 64
    # Lines of 2 images, and 3 below the last, times the first 2 kernel rows times all 7.
    products = 2 * 112 * (112 + 3) * (2 * n // 7) * n
    assert layer["cost"]["flops"] == 2 * products + n**3 // 3 + 2 * n**2 * outputs
    assert layer["cost"]["bytes"] == 2 * n**2 * torch.float64.itemsize  # the matrix, its factor


def test_inspect_names_the_nearest(capsys) -> None:
    assert run("inspect", "resnet5") == 2
    message = capsys.readouterr().err.strip()
    assert "resnet50" in message
    assert "\n" not in message


def test_audit_writes_tables_and_says_where(tmp_path, capsys) -> None:
    assert run("audit", "timm", "--only", "repvgg_a0*", "--out", str(tmp_path)) == 0
    assert capsys.readouterr().out.endswith(f"written to {tmp_path}: timm.md, timm.json\n")
    models = json.loads((tmp_path / "timm.json").read_text(encoding="utf-8"))["models"]
    results = {model["name"]: model["result"] for model in models}
    assert results["repvgg_a0"] == "multiple"
    assert results["repvgg_a0[reparameterized]"] == "exact"
    assert "| default | 0 | 1 |" in (tmp_path / "timm.md").read_text(encoding="utf-8")
    assert not (tmp_path / "timm.partial.jsonl").exists()


def test_audit_goes_on_where_it_stopped_and_keeps_to_its_versions(tmp_path) -> None:
    partial = tmp_path / "timm.jsonl"
    run_audit("timm", ["resnet10t"], partial, jobs=1, limit=60)
    with partial.open("a", encoding="utf-8") as file:
        file.write('{"name": "resnet18", "resu')  # interrupted
    lines = partial.read_text(encoding="utf-8").splitlines()
    (record,) = run_audit("timm", ["resnet10t"], partial, jobs=1, limit=60)
    assert record == json.loads(lines[1])
    partial.write_text('{"versions": {"timm": "0.1"}}\n', encoding="utf-8")
    with pytest.raises(TractError, match="other versions"):
        run_audit("timm", ["resnet10t"], partial, jobs=1, limit=60)


def test_time_limit_is_a_failure_not_an_end(tmp_path) -> None:
    (record,) = run_audit("timm", ["resnet10t"], tmp_path / "a.jsonl", jobs=1, limit=0.01)
    assert record["result"] == "failed"
    assert "not done after" in record["reason"]


def test_unknown_zoo(tmp_path) -> None:
    assert run("audit", "keras", "--out", str(tmp_path)) == 2
