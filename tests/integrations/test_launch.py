"""What a launched script may do, what the launcher says and returns, and what it trains."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import tract_hub
from tests.oracle import closed_form, layer_rows, relative_error
from tract_hub.launch import main

SCRIPTS = Path(__file__).parent / "scripts"
ROOT = SCRIPTS.parents[2]
SMALL = SCRIPTS / "small.py"
PYTHON = [sys.executable]
LAUNCH = ["-m", "tract_hub.launch", "--lam", "0.2"]
ACCELERATE = [*PYTHON, "-m", "accelerate.commands.launch", "--cpu"]
TORCHRUN = [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(autouse=True)
def as_before():
    """Check that the launcher undid what it did to the process."""
    before = (nn.Module.__call__, Optimizer.__init__, list(sys.argv), list(sys.path))
    yield
    assert (nn.Module.__call__, Optimizer.__init__, sys.argv, sys.path) == before


def launch(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[object, str]:
    """Return the exit status and the last line that the launcher printed."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    return stop.value.code, lines[-1].removeprefix("tract_hub.launch: ") if lines else ""


NOISE = "may be noise, as another optimizer trains another model; if it is images, pass"
USED = "2 of 2 optimizer steps used it"
CASES = [
    ("one", "", 0, "TrAct λ=0.1 on stem.weight of Net: 3 of 3 optimizer steps used it"),
    ("one", "--lam 0.3 --damping relative", 0, "TrAct relative λ=0.3 on stem.weight of Net"),
    ("one", "--scope global", 0, "λ=0.1, scope global, on stem.weight of Net: 3 of 3"),
    ("two_phases", "", 0, "on stem.weight of Net: 3 of 3"),
    ("named", "", 0, "on net.stem.weight of Wrapper: 1 of 1"),
    ("vectors", "", 0, "on 0.weight of Sequential: 1 of 1"),
    ("vectors_in_folds", "", 0, "on 0.weight of 3 × Sequential: 3 of 3"),
    ("autoencoder", "", 0, "TrAct λ=0.1 on 0.weight of Sequential: 1 of 1"),
    ("teacher", "", 0, "on stem.weight of Net: 1 of 1"),
    ("evaluates_halfway", "", 0, "1 of 2 optimizer steps used it"),
    ("exits_well", "", 0, "1 of 1 optimizer steps used it"),
    ("exits", "", 7, "1 of 1 optimizer steps used it"),
    ("folds", "", 0, "of 3 × Net: 6 of 6"),
    ("parts", "", 0, "on 0.weight of Sequential: 1 of 1"),
    ("closure", "", 0, "on stem.weight of Net: 1 of 1"),
    ("swapped", "", 0, "on stem.weight of Net: 2 of 2"),
    ("empty_step", "", 0, "on stem.weight of Net: 1 of 1"),
    ("enables", "", 0, "λ=0.5 on stem.weight"),
    ("enables", "--lam 0.1", 3, "Net: the script itself enables TrAct on it: leave --lam out"),
    ("one", "--model Net", 0, "3 of 3"),
    ("declared", "--model net", 0, "on stem.weight of Net: 1 of 1"),
    ("one", "--model stem", 0, "3 of 3"),
    ("one", "--model modle", 3, "trains no model 'modle', but Net"),
    ("one", "--model head", 3, "no layer of head reads the pixels"),
    (
        "gan",
        "",
        0,
        f"of Net: {USED}; not on Generator: its input (2, 16) {NOISE} --model Generator",
    ),
    ("gan", "--model Generator", 0, f"on stem.weight of Generator: {USED}"),
    ("gan_of_two_critic_steps", "", 0, f"of Net: {USED}; not on Generator: its input (2, 16)"),
    ("dcgan", "", 0, f"of Net: {USED}; not on Generator: its input (2, 16, 1, 1) {NOISE}"),
    ("upsampling", "", 0, f"of Net: {USED}; not on Generator: 'stem.weight' reads the pixels"),
    ("translation", "", 0, f"of Generator: {USED}; TrAct λ=0.1 on stem.weight of Net: {USED}"),
    ("translation", "--model Net", 0, f"TrAct λ=0.1 on stem.weight of Net: {USED}"),
    ("words", "", 3, "no module with parameters that a torch optimizer of this process holds"),
    ("nothing_at_all", "", 3, "no module with parameters that a torch optimizer of this process"),
    ("trains_in_eval_mode", "", 3, "Net: it is trained in eval mode"),
    ("frozen", "", 3, "stem.weight reads the pixels, but is frozen or in no optimizer"),
    ("fickle", "", 3, "0 of 1 optimizer steps used it"),
    ("unsupported", "", 3, "Net: 'stem.weight' reads the pixels, but"),
    ("swallows", "", 3, "Net: 'stem.weight' reads the pixels, but"),
]


@pytest.mark.parametrize(("what", "options", "status", "says"), CASES)
def test_a_script(capsys, what, options, status, says):
    got, line = launch(capsys, *options.split(), SMALL, what)
    assert says in line
    assert got == status


def test_a_launched_script_sees_that_tract_is_applied(capsys, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, tract_hub\n"
        "model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "model(torch.randn(2, 3, 8, 8)).sum().backward()\n"
        "optimizer.step()\n"
        "print(tract_hub.status(model)[0].applied)\n"
    )
    with pytest.raises(SystemExit):
        main([str(script)])
    assert capsys.readouterr().out.strip() == "True"


def test_a_run_without_tract_ends_before_its_first_step(capsys):
    with pytest.raises(SystemExit):
        main([str(SMALL), "words"])
    assert "went on" not in capsys.readouterr().out


def test_an_exception_of_the_script_is_passed_on(capsys):
    with pytest.raises(RuntimeError, match="the disk is full"):
        main([str(SMALL), "raises"])
    assert "1 of 1 optimizer steps used it" in capsys.readouterr().err


def test_an_error_of_tract_that_the_script_makes_itself_is_its_own(tmp_path):
    script = tmp_path / "own.py"
    script.write_text("import tract_hub; raise tract_hub.TractError('mine')")
    with pytest.raises(tract_hub.TractError, match="mine"):
        main([str(script)])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no/such/script.py"], "there is no script no/such/script.py"),
        ([SCRIPTS], "there is no script"),
        (["--lam", "0", SMALL, "one"], "lam must be a finite number greater than 0, got 0"),
        (["--scope", "rank", SMALL, "one"], "invalid choice: 'rank'"),
        ([], "required: script"),
    ],
)
def test_a_wrong_command_is_said_with_status_2(capsys, arguments, says):
    status, line = launch(capsys, *arguments)
    assert status == 2
    assert says in line


SEES = """
import sys, neighbour
print(__name__, __file__, sys.argv[1:], sys.modules["__main__"].__dict__ is globals())
"""


@pytest.mark.parametrize("as_module", [False, True])
def test_a_script_sees_what_python_would_show_it(as_module, tmp_path, monkeypatch, capsys):
    (tmp_path / "sees.py").write_text(SEES)
    (tmp_path / "neighbour.py").write_text("")
    monkeypatch.delitem(sys.modules, "neighbour", raising=False)
    if as_module:
        monkeypatch.chdir(tmp_path)
    script = ["-m", "sees"] if as_module else [str(tmp_path / "sees.py")]
    with pytest.raises(SystemExit):
        main([*script, "--lam", "a b", "--", "-m"])
    assert capsys.readouterr().out == (
        f"__main__ {tmp_path / 'sees.py'} ['--lam', 'a b', '--', '-m'] True\n"
    )


# Real scripts as real processes: their first layer moves by the closed form, all else as before.


def run(*command: object) -> subprocess.CompletedProcess[str]:
    """Run a command as a process of its own, in a neutral folder."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    words = [str(word) for word in command]
    return subprocess.run(
        words, env=environment, cwd="/", capture_output=True, text=True, timeout=120
    )


def our_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("tract_hub.launch: ")]


def ordinary(script: str, out: Path, *arguments: object) -> dict[str, Any]:
    """Run the same script here, as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, str(out), *(str(word) for word in arguments)])
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    return torch.load(out)


def moved(saved: dict[str, Any]) -> dict[str, Tensor]:
    return {name: saved["after"][name] - value for name, value in saved["before"].items()}


def expected_move(saved: dict[str, Any], stem: str, layer: nn.Module) -> Tensor:
    with torch.no_grad():
        layer.weight.copy_(saved["before"][stem])
    return closed_form(moved(saved)[stem], layer_rows(layer, saved["images"]), 0.2)


HF_STEM = "vit.embeddings.patch_embeddings.projection.weight"
HF_LAYER = nn.Conv2d(3, 16, 4, stride=4)
TIMM = ("timm_loop.py", "patch_embed.proj.weight", nn.Conv2d(3, 64, 16, stride=16))
PROCESSES: dict[str, tuple[list[str], tuple[str, str, nn.Module], list[str], float]] = {
    "timm": (PYTHON, TIMM, ["--grad-accum-steps", "2"], 1e-4),
    "timm, amp, compiled": (PYTHON, TIMM, ["--amp", "--compile"], 2e-2),  # bfloat16
    "Trainer": (ACCELERATE, ("hf_trainer.py", HF_STEM, HF_LAYER), [], 1e-4),
    "Accelerate": (ACCELERATE, ("accelerate_loop.py", HF_STEM, HF_LAYER), [], 1e-4),
}


@pytest.mark.parametrize("case", PROCESSES)
def test_a_launched_script_makes_the_step_of_the_closed_form(case, tmp_path):
    launcher, (script, stem, layer), options, tolerance = PROCESSES[case]
    out = tmp_path / "weights.pt"
    launched = run(*launcher, *LAUNCH, SCRIPTS / script, out, *options)
    assert launched.returncode == 0, launched.stderr
    (line,) = our_lines(launched.stderr)
    assert f"λ=0.2 on {stem} of" in line and "1 of 1 optimizer steps used it" in line
    got = moved(torch.load(out))
    plain = ordinary(script, out, *(word for word in options if word != "--compile"))
    expected = {**moved(plain), stem: expected_move(plain, stem, layer)}
    assert relative_error(moved(plain)[stem], expected[stem]) > 0.1
    for name, change in got.items():
        assert relative_error(change, expected[name]) < tolerance, name


@pytest.mark.parametrize("options", [[], ["--shard"]], ids=["DDP", "FSDP2"])
def test_torchrun_trains_every_rank_and_prints_one_line(options, tmp_path):
    out = tmp_path / "weights.pt"
    launched = run(*TORCHRUN, *LAUNCH, SCRIPTS / "torchvision_loop.py", out, *options)
    assert launched.returncode == 0, launched.stderr
    (line,) = our_lines(launched.stderr)
    assert "λ=0.2 on features.0.weight of" in line and "1 of 1" in line
    got = moved(torch.load(out))
    stem, layer = "features.0.weight", nn.Conv2d(3, 96, 7, stride=2)
    plain = [ordinary("torchvision_loop.py", out, "--seed", seed) for seed in (0, 1)]
    moves = [expected_move(saved, stem, layer) for saved in plain]
    assert relative_error(got[stem], (moves[0] + moves[1]) / 2) < 1e-4


def test_every_rank_of_torchrun_fails_where_nothing_was_enabled():
    launched = run(*TORCHRUN, *LAUNCH, SMALL, "nothing_at_all")
    assert len(our_lines(launched.stderr)) == 1
    assert "exitcode  : 3" in launched.stderr
