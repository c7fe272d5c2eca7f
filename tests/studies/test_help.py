"""What ``--help`` prints can be read on a screen: 24 lines of 80 columns."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from tract_hub import launch
from tract_hub.cli import COMMANDS, _app

SCREEN = 24
# compare has an option for everything that a study can vary; each takes one line, in six groups.
LONGER = {"compare": 63}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_on_a_screen(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = help_of(command).rstrip().splitlines()
    assert len(lines) > 10
    assert len(lines) <= LONGER.get(command, SCREEN)
    assert max(map(len, lines)) <= 80


def help_of(command: str) -> str:
    if command == "launch":  # it hands its arguments to a program with a parser of its own
        return launch._parser().format_help()
    done = CliRunner().invoke(_app(), [*command.split(), "--help"])
    assert done.exit_code == 0
    return done.output
