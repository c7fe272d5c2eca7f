"""``tract-hub audit``: run the locator over a whole model zoo, and report what it found."""

from __future__ import annotations

import json
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from datetime import datetime, timezone
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

import tract_hub
from tract_hub.errors import SettingsError, StudyError, TractError, TractWarning, first_line
from tract_hub.studies import table
from tract_hub.studies.machine import versions
from tract_hub.studies.models import build_without_weights
from tract_hub.studies.settings import Audit
from tract_hub.studies.zoos import models_of

Record = dict[str, Any]
RESULTS = {
    "exact": "one first layer",
    "multiple": "several first layers",
    "refused": "an error that says why",
    "failed": "an error that should not be",
    "not built": "its own zoo cannot build it so",
}
MODELS_A_PROCESS = 200
"""Processes are replaced after so many: some models leave caches behind."""


def audit(settings: Audit) -> None:
    """Audit the models that are not audited yet; write and print the results."""
    zoo, out = settings.zoo, settings.out
    names = [name for name in models_of(zoo) if fnmatch(name, settings.only)]
    if not names:
        raise SettingsError(f"no model of {zoo} is called {settings.only!r}: a pattern is vit_*")
    partial = out / f"{zoo}.partial.jsonl"
    done = _resumed(partial)
    left = [name for name in names if name not in done]
    piped = not sys.stderr.isatty()
    for record in tqdm(_in_parallel(left, settings), zoo, len(left), disable=piped):
        done[record["name"]] = record
        table.append(partial, record)
    records = [done[name] for name in names]
    today = datetime.now(timezone.utc).date().isoformat()
    head = json.dumps({"zoo": zoo, "date": today, "versions": versions()})
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    table.write_atomically(out / f"{zoo}.json", f'{head[:-1]}, "models": [\n{lines}\n]}}\n')
    table.write_atomically(out / f"{zoo}.md", markdown(zoo, today, records))
    partial.unlink(missing_ok=True)
    print(f"{counts(records).to_string(index=False)}\nwritten to {out}: {zoo}.md, {zoo}.json")


def audit_model(zoo: str, name: str) -> Record:
    """Build one model without its weights, and locate its first layers.

    The record holds ``name``; ``result``, a key of ``RESULTS``; its ``stems``, or the ``reason``;
    and ``warnings``, where the zoo declares another first layer than was found.
    """
    torch.set_num_threads(1)
    result = "not built"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = build_without_weights(models_of(zoo)[name])
            result = "failed"
            stems = [stem.weight_name for stem in tract_hub.locate(model)]
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            result = "refused" if result == "failed" and isinstance(error, TractError) else result
            return {"name": name, "result": result, "reason": reason[:300]}
    said = [str(w.message) for w in caught if issubclass(w.category, TractWarning)]
    record = {"name": name, "result": "exact" if len(stems) == 1 else "multiple", "stems": stems}
    return record | ({"warnings": said} if said else {})


def _in_parallel(names: list[str], settings: Audit) -> Iterator[Record]:
    share = MODELS_A_PROCESS * settings.jobs
    for start in range(0, len(names), share):
        with ProcessPoolExecutor(settings.jobs, get_context("spawn")) as pool:
            some = names[start : start + share]
            futures = [pool.submit(audit_model, settings.zoo, name) for name in some]
            try:
                yield from (future.result() for future in as_completed(futures))
            except BrokenProcessPool as error:
                raise StudyError(
                    "a process of the audit was killed, perhaps for want of memory: the same "
                    "command again goes on, if need be with fewer --jobs"
                ) from error
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def _resumed(partial: Path) -> dict[str, Record]:
    """Return the records of an interrupted audit; begin its file with the versions."""
    records = table.rows_of(partial)
    if not records:
        table.append(partial, {"versions": versions()})
    elif records[0].get("versions") != versions():
        raise SettingsError(f"{partial} is of other versions of the packages: pass another --out")
    return {record["name"]: record for record in records[1:]}


def counts(records: Iterable[Record]) -> pd.DataFrame:
    """Count the results, a line a kind of model: default, or the variant in its brackets."""
    kinds = [(r["name"].partition("[")[2].rstrip("]") or "default", r["result"]) for r in records]
    frame = pd.DataFrame(kinds, columns=["models", "result"])
    found = frame.groupby("models", sort=False)["result"].value_counts().unstack()
    return found.reindex(columns=[*RESULTS]).fillna(0).astype(int).reset_index()


def markdown(zoo: str, date: str, records: list[Record]) -> str:
    """Write the report: counts, and every model that is not one plain first layer."""
    made = ", ".join(f"{name} {at}" for name, at in versions().items())
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in RESULTS.items())
    text = f"# First layers found in {zoo}\n\n{date}; {made}.\n\n"
    text += f"{table.markdown(counts(records))}\n{meanings}.\n\n"
    for record in records:
        text += "".join(f"- {record['name']}: {said}\n" for said in record.get("warnings", ()))
    for result in list(RESULTS)[1:]:
        groups: dict[str, list[str]] = defaultdict(list)
        for record in records:
            if record["result"] == result:
                stems = ", ".join(f"`{stem}`" for stem in record.get("stems", ()))
                groups[stems or record["reason"]].append(record["name"])
        if groups:
            text += f"\n## {result.capitalize()} ({sum(map(len, groups.values()))})\n\n"
            text += "".join(f"- {key}: {', '.join(these)}\n" for key, these in groups.items())
    return text
