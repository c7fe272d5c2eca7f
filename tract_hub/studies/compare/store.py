"""Finished runs on disk: each one file, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tract_hub.errors import SettingsError
from tract_hub.studies.compare.records import Arm, RunRecord
from tract_hub.studies.files import make_folder, write_atomically

REPORT = "report.html"
RESULT_FILES = ("compare.png", "table.md", "results.json", "results.csv", REPORT)


def to_json(data: Any, indent: int | None = 1) -> str:
    """Return JSON for people and programs, with no value that is not JSON."""
    return json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


class Store:
    """The folder of one comparison.

    ``identity.json`` holds everything that a run's numbers depend on; runs made under another
    identity are refused, so results never mix settings.

    Args:
        folder: created when the first thing is written.
        identity: JSON-ready settings, data and versions.

    Raises:
        SettingsError: the folder has runs of another identity.

    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity = json.loads(to_json(identity))
        found = self._found_identity()
        if found is not None and found != self.identity:
            raise SettingsError(
                f"{folder} holds runs made with other settings "
                f"({_difference(found, self.identity)}); pass another --out, or delete that folder"
            )

    def _found_identity(self) -> Any:
        return _read_json(self.folder / "identity.json")

    def open(self) -> None:
        """Make the folder, and mark whose it is.

        Raises:
            StudyError: it cannot be written.

        """
        make_folder(self.folder / "runs")
        write_atomically(self.folder / "identity.json", to_json(self.identity))

    def load(self, arm: Arm, seed: int) -> RunRecord | None:
        """Return a finished run, or None when it has yet to be made."""
        data = _read_json(self._path(arm, seed))
        try:
            record = RunRecord.from_json(data)
        except (KeyError, TypeError, ValueError):
            return None
        return record if (record.arm, record.seed) == (arm, seed) else None

    def has(self, arm: Arm, seed: int, weights: bool) -> bool:
        """Tell whether a run is finished, and its weights are there where these are asked for."""
        kept = not weights or self.weights_of(arm, seed).is_file()
        return kept and self.load(arm, seed) is not None

    def weights_of(self, arm: Arm, seed: int) -> Path:
        """Return where the weights of a run are kept, if they are."""
        return self._path(arm, seed).with_suffix(".safetensors")

    def save(self, record: RunRecord) -> None:
        """Keep a finished run, on one line: its filters are thousands of numbers."""
        write_atomically(self._path(record.arm, record.seed), to_json(record.to_json(), None))

    def load_timing(self, arms: Iterable[Arm]) -> dict[str, Any] | None:
        """Return the step times of these arms if they were measured together."""
        return self._about(arms, "timing.json")

    def save_timing(self, timing: Mapping[str, Any]) -> None:
        """Keep the step times."""
        write_atomically(self.folder / "timing.json", to_json(timing))

    def load_contributions(self, arms: Iterable[Arm]) -> dict[str, Any] | None:
        """Return what single images gave to the first layer in these arms, if it was measured."""
        return self._about(arms, "contributions.json")

    def save_contributions(self, contributions: Mapping[str, Any]) -> None:
        """Keep what single images gave to the first layer."""
        write_atomically(self.folder / "contributions.json", to_json(contributions, None))

    def has_report(self) -> bool:
        """Tell whether an earlier command wrote a report."""
        return (self.folder / REPORT).exists()

    def _about(self, arms: Iterable[Arm], name: str) -> dict[str, Any] | None:
        """Return a measurement of several arms if it was of these."""
        found = _read_json(self.folder / name)
        wanted = [str(arm) for arm in arms]
        return found if isinstance(found, dict) and found.get("arms") == wanted else None

    def forget_results(self) -> None:
        """Remove an earlier command's results: what lies there must be the last command's."""
        for name in RESULT_FILES:
            (self.folder / name).unlink(missing_ok=True)

    def write_result(self, name: str, content: str | bytes) -> Path:
        """Write one of ``RESULT_FILES`` and return its path."""
        path = self.folder / name
        write_atomically(path, content)
        return path

    def _path(self, arm: Arm, seed: int) -> Path:
        return self.folder / "runs" / f"{arm.slug}-seed{seed}.json"


def _read_json(path: Path) -> Any:
    """Return a file's JSON; None where there is no file, or it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _difference(found: Any, wanted: Any) -> str:
    """Name the first few values that differ, with both of them."""
    before, now = _flat(found), _flat(wanted)
    keys = [key for key in {*before, *now} if before.get(key) != now.get(key)]
    # What a user chose first; the rest often follows from it.
    keys.sort(key=lambda key: (not key.startswith("settings."), key))
    few = [f"{key} {before.get(key)!s:.40} there, {now.get(key)!s:.40} now" for key in keys[:3]]
    return "; ".join(few) + (" …" if len(keys) > 3 else "")


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {prefix: data}
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat
