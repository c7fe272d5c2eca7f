"""What ``--help`` prints can be read on a screen: 24 lines of 80 columns, or 50 of 100."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from tract_hub import launch
from tract_hub.cli import COMMANDS, _app

SMALL, LARGE = {"COLUMNS": "80", "LINES": "24"}, {"COLUMNS": "100", "LINES": "50"}
# compare has an option for everything that a study can vary: two large screens, or four small ones.
SCREENS = {"compare": (4, 2), "bench": (2, 1)}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_on_a_screen(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for size, screens in zip((SMALL, LARGE), SCREENS.get(command, (1, 1)), strict=True):
        for name, value in size.items():
            monkeypatch.setenv(name, value)
        lines = help_of(command).rstrip().splitlines()
        assert len(lines) > 10
        assert len(lines) <= int(size["LINES"]) * screens
        assert max(map(len, lines)) <= int(size["COLUMNS"])


def help_of(command: str) -> str:
    if command == "launch":  # it hands its arguments to a program with a parser of its own
        return launch._parser().format_help()
    done = CliRunner().invoke(_app(), [*command.split(), "--help"])
    assert done.exit_code == 0
    return done.output
