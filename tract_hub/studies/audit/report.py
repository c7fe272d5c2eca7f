"""The tables of an audit."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

from rich.table import Table

from tract_hub.studies.audit.model import Record
from tract_hub.studies.machine import in_words

RESULTS = ("exact", "multiple", "refused", "failed", "not built")
_MEANING = {
    "exact": "one first layer",
    "multiple": "several first layers",
    "refused": "an error that says why",
    "failed": "an error that should not be",
    "not built": "its own zoo cannot build it so",
}


def summary(records: Iterable[Record]) -> Table:
    """Count the results, for the terminal."""
    counts = _counts(records)
    table = Table("models", *RESULTS)
    for kind, row in counts.items():
        table.add_row(kind, *(str(row[result]) for result in RESULTS))
    return table


def markdown(
    zoo: str, date: str, versions: Mapping[str, str], records: list[Record], names: Iterable[str]
) -> str:
    """Write the report: counts, and every model that is not one plain first layer.

    Args:
        zoo: where the models are from.
        date: when they were audited.
        versions: of the packages.
        records: one a model.
        names: of all models of the zoo, audited or not.

    """
    lines = [f"# First layers found in {zoo}", "", f"{date}; {in_words(versions)}.", ""]
    lines += [f"| models | {' | '.join(RESULTS)} |", "|---" * (len(RESULTS) + 1) + "|"]
    for kind, row in _counts(records).items():
        lines.append(f"| {kind} | {' | '.join(str(row[result]) for result in RESULTS)} |")
    lines += ["", "; ".join(f"{name}: {meaning}" for name, meaning in _MEANING.items()) + ".", ""]
    lines += _left_out(records, names)
    lines += _declarations(records)
    for result in RESULTS[1:]:
        lines += _section(result, [r for r in records if r["result"] == result])
    return "\n".join(lines).rstrip() + "\n"


def _counts(records: Iterable[Record]) -> dict[str, Counter[str]]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        counts[_variant(record["name"])][record["result"]] += 1
    return dict(counts)


def _variant(name: str) -> str:
    return name.partition("[")[2].rstrip("]") or "default"


def _left_out(records: list[Record], names: Iterable[str]) -> Iterator[str]:
    """Say how many of each kind were not audited."""
    known = Counter(map(_variant, names))
    done = Counter(_variant(record["name"]) for record in records)
    for kind, count in known.items():
        if done[kind] < count:
            yield f"Not run: {count - done[kind]} of the {count} {kind} models."
            yield ""


def _declarations(records: list[Record]) -> Iterator[str]:
    """Say where the zoo's own declaration is not what the pixels showed."""
    other = [record for record in records if record.get("declared")]
    silent = [record["name"] for record in records if record.get("declared") == []]
    plain = [name for name in silent if _variant(name) == "default"]
    if plain:
        yield f"Found without a declaration by the zoo: {', '.join(plain)}."
        yield ""
    if len(silent) > len(plain):
        yield (
            f"In {len(silent) - len(plain)} variants the zoo's declaration is missing or names a "
            "layer that the variant does not have."
        )
        yield ""
    for record in other:
        yield f"- {record['name']}: declared {record['declared']}, found {record['stems']}"
    if other:
        yield ""


def _section(title: str, records: list[Record]) -> Iterator[str]:
    """List models under what they share: their first layers, or the reason."""
    if not records:
        return
    groups: dict[str, list[str]] = defaultdict(list)
    for record in records:
        shared = ", ".join(f"`{stem}`" for stem in record.get("stems", ()))
        groups[shared or record.get("reason", "")].append(record["name"])
    yield f"## {title.capitalize()} ({len(records)})"
    yield ""
    for shared, names in groups.items():
        yield f"- {shared}: {', '.join(names)}"
    yield ""
