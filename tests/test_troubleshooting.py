"""docs/troubleshooting.md has an entry for every message, and none for what is no message."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.messages import messages, texts

PAGE = Path(__file__).parent.parent / "docs" / "troubleshooting.md"
ROWS = re.findall(r"^\| (`.*?`) \|(.*?)\| (.*) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
ENTRIES = [entry for row in ROWS for entry in re.findall(r"`([^`]+)`", row[0])]
MESSAGES = {text: at for text, at in messages().items() if text.strip("…: ")}


def test_the_messages_are_found() -> None:
    """Of each way to make one: a text, a function that returns it, a warning."""
    assert len(MESSAGES) > 90
    for part in ("stems is empty", "so it takes indices, not pixels", "forward ran in eval mode"):
        assert any(part in message for message in MESSAGES)


@pytest.mark.parametrize("message", MESSAGES, ids=MESSAGES.values())
def test_a_message_has_its_entry(message: str) -> None:
    assert any(entry in message for entry in ENTRIES), (
        f"add a row to docs/troubleshooting.md for “{message}”"
    )


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_is_part_of_a_message(entry: str) -> None:
    assert len(re.findall(r"\w", entry)) >= 7, "too short to tell messages apart"
    assert any(entry in text for text in texts()), "no text of the package has this"


def test_every_entry_says_what_to_do() -> None:
    assert ROWS
    assert all(remedy for _, _, remedy in ROWS)
