"""Run the locator over a whole model zoo and report what it found."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from datetime import datetime, timezone
from fnmatch import fnmatch
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tract_hub.errors import StudyError, TractError
from tract_hub.studies.audit.model import Record, audit_model, models_of
from tract_hub.studies.audit.report import markdown, summary
from tract_hub.studies.files import append_line, make_folder, write_atomically, written
from tract_hub.studies.machine import versions

ZOOS = ("timm", "huggingface", "torchvision")
_MODELS_A_PROCESS = 200


def audit(zoo: str, out: Path, jobs: int, time_limit: float, only: str) -> None:
    """Audit the models of a zoo, write the results, and print how many there are of each.

    Args:
        zoo: where the models are from.
        out: folder of the results.
        jobs: number of processes.
        time_limit: seconds for one model.
        only: a pattern of names.

    Raises:
        TractError: there is no such zoo, or no such model in it.

    """
    if zoo not in ZOOS:
        raise TractError(f"there is no zoo {zoo!r}: choose one of {', '.join(ZOOS)}")
    names = [name for name in models_of(zoo) if fnmatch(name, only)]
    if not names:
        raise TractError(f"no model of {zoo} is called {only!r}; give --only a pattern: vit_*")
    make_folder(out)
    records = run_audit(zoo, names, out / f"{zoo}.partial.jsonl", jobs, time_limit)
    write_results(zoo, records, out)
    Console().print(summary(records))
    print(written(out, f"{zoo}.md", f"{zoo}.json"))


def run_audit(zoo: str, names: list[str], partial: Path, jobs: int, limit: float) -> list[Record]:
    """Audit models in parallel; return one record a model, in the order of the names.

    Args:
        zoo: where the models are from.
        names: their names.
        partial: a file that gets one line for each model that is done, to resume from.
        jobs: number of processes.
        limit: seconds for one model.

    Raises:
        TractError: the file was written with other versions of the packages, or cannot be written;
            or a process was killed.

    """
    done = {record["name"]: record for record in _resumed(partial)}
    left = [name for name in names if name not in done]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    if not partial.exists():
        append_line(partial, _json({"versions": versions()}))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(f"audit {zoo}", total=len(names), completed=len(done))
        for record in _in_parallel(zoo, left, jobs, limit):
            done[record["name"]] = record
            append_line(partial, _json(record))
            progress.advance(task)
    return [done[name] for name in names]


def _in_parallel(zoo: str, names: list[str], jobs: int, limit: float) -> Iterator[Record]:
    # Processes are replaced now and then: some models leave caches behind.
    share = _MODELS_A_PROCESS * jobs
    for start in range(0, len(names), share):
        with ProcessPoolExecutor(jobs, get_context("spawn"), _end_in_time) as pool:
            batch = names[start : start + share]
            with _interrupts_held():
                futures = [pool.submit(audit_model, zoo, name, limit) for name in batch]
            try:
                yield from (future.result() for future in as_completed(futures))
            except BrokenProcessPool as error:
                raise StudyError(
                    "a process of the audit was killed, perhaps for want of memory: run the same "
                    "command again to go on, if need be with fewer --jobs"
                ) from error


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Keep Ctrl-C for later, and from processes that start here until they are ready for it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_in_time() -> None:
    """Have this process end by Ctrl-C, without a trace, and when the audit was killed.

    It would go on with the next model, and wait for work for ever.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell's background has it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def wait() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=wait, daemon=True).start()


def write_results(zoo: str, records: list[Record], out: Path) -> None:
    """Write ``zoo.json`` and ``zoo.md``, and remove what an interrupted run would need."""
    date = datetime.now(timezone.utc).date().isoformat()
    lines = ",\n".join(_json(record) for record in records)
    head = json.dumps({"zoo": zoo, "date": date, "versions": versions()})
    text = f'{head[:-1]}, "models": [\n{lines}\n]}}\n'
    write_atomically(out / f"{zoo}.json", text)
    report = markdown(zoo, date, versions(), records, models_of(zoo))
    write_atomically(out / f"{zoo}.md", report)
    (out / f"{zoo}.partial.jsonl").unlink(missing_ok=True)


def _resumed(partial: Path) -> list[Record]:
    complete = partial.read_bytes().rpartition(b"\n")[0] if partial.exists() else b""
    if not complete:
        partial.unlink(missing_ok=True)
        return []
    os.truncate(partial, len(complete) + 1)  # a line cut short
    head, *records = map(json.loads, complete.splitlines())
    if head.get("versions") != versions():
        raise TractError(
            f"{partial} was written with other versions ({head.get('versions')}): "
            "remove it, or choose another folder with --out"
        )
    return records


def _json(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False)
