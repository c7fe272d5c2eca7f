"""What a launched script may do, and what the launcher then says and returns."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn
from torch.optim import Optimizer

from tract_hub.errors import TractError
from tract_hub.launch import main

SMALL = Path(__file__).parent / "scripts" / "small.py"


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch):
    """Undo what a process would take with it, and check that the launcher undid the rest."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    call, init = nn.Module.__call__, Optimizer.__init__
    yield
    assert nn.Module.__call__ is call
    assert Optimizer.__init__ is init


def launch(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[object, str]:
    """Return the exit status and what the launcher printed: one line or none."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) <= 1, lines
    return stop.value.code, "".join(lines).removeprefix("tract_hub.launch: ")


@pytest.mark.parametrize(
    ("what", "options", "status", "says"),
    [
        ("one", "", 0, "λ=0.1 on stem.weight of model (Net): 3 of 3 optimizer steps used it"),
        ("named", "", 0, "on stem.weight of net/model (Net)"),
        ("evaluates_halfway", "", 0, "1 of 2 optimizer steps used it"),
        ("exits_well", "", 0, "1 of 1 optimizer steps used it"),
        ("exits", "", 7, "1 of 1 optimizer steps used it"),
        ("folds", "", 0, "of 3 × model (Net): 6 of 6"),
        ("parts", "", 0, "on 0.weight of backbone (Sequential): 1 of 1"),
        ("closure", "", 0, "on stem.weight of model (Net): 1 of 1"),
        ("empty_step", "", 0, "on stem.weight of model (Net): 1 of 1"),
        ("enables", "", 0, "λ=0.5 on stem.weight"),
        ("enables", "--lam 0.5", 0, "λ=0.5 on stem.weight"),
        (
            "enables",
            "--lam 0.1",
            3,
            "enabled TrAct on model (Net) with lam=0.5, and --lam says 0.1",
        ),
        ("one", "--model model", 0, "3 of 3"),
        ("one", "--model Net", 0, "3 of 3"),
        ("one", "--model stem", 0, "3 of 3"),
        ("one", "--model modle", 3, "trains no model 'modle' but model (Net): did you mean model?"),
        ("one", "--model head", 3, "no layer of head reads the pixels"),
        (
            "adversaries",
            "",
            3,
            "generator (Generator) and discriminator (Net): say which",
        ),
        ("adversaries", "--model discriminator", 0, "of discriminator (Net): 2 of 2"),
        ("adversaries", "--model Generator", 0, "on stem.weight of generator (Generator): 2 of 2"),
        ("adversaries", "--model generater", 3, "did you mean generator"),
        ("words", "", 3, "was called in training mode on images"),
        ("nothing_at_all", "", 3, "made no torch optimizer"),
        ("evaluates", "", 3, "was called in training mode on images"),
        ("frozen", "", 3, "stem.weight reads the pixels, but is frozen or in no optimizer"),
        ("fickle", "", 3, "0 of 1 optimizer steps used it"),
        ("unsupported", "", 3, "Net: 'stem.weight' reads the pixels, but"),
        ("swallows", "", 3, "Net: 'stem.weight' reads the pixels, but"),
        ("one", "--scope global", 0, "λ=0.1, scope global, on stem.weight of model (Net): 3 of 3"),
        ("enables", "--scope global", 3, "with scope=rank, and --scope says global"),
    ],
)
def test_a_script(capsys, what, options, status, says):
    got, line = launch(capsys, *options.split(), SMALL, what)
    assert says in line
    assert got == status


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
    with pytest.raises(TractError, match="mine"):
        main([str(script)])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no/such/script.py"], "there is no script no/such/script.py"),
        (["-m", "no.such.module"], "there is no module no.such.module"),
        ([SMALL.parent], "there is no __main__.py in the folder"),
        (["--lam", "0", SMALL, "one"], "lam must be a finite number greater than 0, got 0"),
    ],
)
def test_a_wrong_command_is_one_line_and_status_2(capsys, arguments, says):
    status, line = launch(capsys, *arguments)
    assert status == 2
    assert says in line


SEES = """
import sys, torch
from pathlib import Path
import neighbour
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
