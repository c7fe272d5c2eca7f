"""Files that are whole or not there, whatever ends the process that writes them."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from tract_hub.errors import StudyError


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, where they are not there.

    Raises:
        StudyError: it cannot be made.

    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, never sees half of it.

    Args:
        path: in an existing folder.
        content: text (as UTF-8) or bytes.

    Raises:
        StudyError: it cannot be written; what was there before is there still.

    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    data = content.encode() if isinstance(content, str) else content
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise _unwritable(path, error) from error


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, made if need be, whole or not at all.

    Raises:
        StudyError: it cannot be written; the lines before are there still.

    """
    try:
        with path.open("ab", buffering=0) as file:
            before, left = file.tell(), f"{line}\n".encode()
            try:
                while left:  # a disk that runs full takes a part
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(before)
                raise
    except OSError as error:
        raise _unwritable(path, error) from error


def written(folder: Path, *names: str) -> str:
    """Say where results are: what every command that writes them ends with."""
    return f"written to {os.fspath(folder)}: {', '.join(names)}"


def _unwritable(path: Path, error: OSError) -> StudyError:
    return StudyError(
        f"{path} cannot be written: {error.strerror}; see to that, or pass another --out, and run "
        "the same command again"
    )
