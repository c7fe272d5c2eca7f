"""The one table of results: a row an epoch, appended to a file of JSON lines.

Columns: study, arm, epochs (length of the training), lr, seed, epoch (from 1), loss (mean of the
epoch's training steps; null: not finite), accuracy and balanced_accuracy (on the test images, 0 to
1), seconds (of training in this epoch), correct (which test images were right; see :func:`pack`).
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from tract_hub.errors import StudyError

RUN = ["arm", "epochs", "lr", "seed"]
COLUMNS = ["study", *RUN, "epoch", "loss", "accuracy", "balanced_accuracy", "seconds", "correct"]


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row, whole or not at all; several processes may append to one file."""
    line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    with _written(path), path.open("ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        # A process that was killed may have left half a line.
        cut = end > 0 and file.read(1) != b"\n"
        file.write(b"\n" + line if cut else line)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the rows of any file of JSON lines; of none, if it is not there."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError):  # half a line of a killed process
            rows.append(json.loads(line))
    return rows


def read(path: Path) -> pd.DataFrame:
    """Return the table, each epoch of a run once.

    An interrupted run may have trained its last epoch again: the later row stands.
    """
    table = pd.DataFrame(rows_of(path), columns=COLUMNS)
    table = table.drop_duplicates([*RUN, "epoch"], keep="last")
    return table.astype({"loss": float}).sort_values([*RUN, "epoch"], ignore_index=True)


def pack(array: npt.NDArray[Any]) -> str:
    """Return an array as text: of booleans a tenth of a byte each, of labels two bytes or less."""
    numbers = np.packbits(array) if array.dtype == np.bool_ else array.astype(np.uint16)
    return base64.b85encode(zlib.compress(numbers.tobytes(), 9)).decode()


def unpack(text: str, bits: int | None = None) -> npt.NDArray[Any]:
    """Return so many booleans, or the labels, that :func:`pack` was given."""
    data = zlib.decompress(base64.b85decode(text))
    if bits is None:
        return np.frombuffer(data, dtype=np.uint16)
    return np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=bits).astype(np.bool_)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, never sees half of it; make its folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _written(path):
        try:
            with temporary.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def markdown(frame: pd.DataFrame) -> str:
    """Write a table of texts as Markdown."""
    lines = [list(frame.columns), ["---"] * frame.shape[1], *frame.to_numpy().tolist()]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Make a file's folder, and say what to do where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise StudyError(
            f"{path} cannot be written: {error.strerror}; see to that, or pass another --out, and "
            "run the same command again"
        ) from error
