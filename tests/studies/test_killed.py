"""Killed in the middle, or out of disk: the same command again ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.studies.comparisons import ONE_SEED, TINY, compare, numbers
from tests.studies.conftest import ROOT
from tract_hub.errors import StudyError
from tract_hub.studies.audit.run import run_audit
from tract_hub.studies.files import append_line, make_folder, write_atomically

MODELS = ["resnet10t", "resnet14t", "resnet18", "resnet26", "repvgg_a0"]
AUDIT = (
    "import sys, pathlib; from tract_hub.studies.audit.run import run_audit\n"
    "if __name__ == '__main__':\n"
    f"    run_audit('timm', {MODELS!r}, pathlib.Path(sys.argv[1]), jobs=1, limit=60)\n"
)


def limited(size: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python where no file can grow beyond a size: what a full disk looks like."""
    code = (
        "import resource, runpy, sys; size = int(sys.argv.pop(1))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))\n"
        "runpy.run_module('tract_hub', run_name='__main__')\n"
    )
    arguments = [sys.executable, "-c", code, str(size), *command]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)


def run(out: Path, *options: str) -> None:
    assert compare(*TINY, *ONE_SEED, *options, "--out", str(out)) == 0


def test_a_comparison_that_ran_out_of_disk_goes_on_once_there_is_room(tmp_path: Path) -> None:
    whole, full = tmp_path / "whole", tmp_path / "full"
    run(whole)
    ended = limited(4000, "compare", *TINY, *ONE_SEED, "--out", str(full))
    assert ended.returncode == 2
    last = ended.stderr.strip().splitlines()[-1]
    assert "cannot be written: File too large" in last and "run the same command again" in last
    assert "Traceback" not in ended.stderr
    assert not [path for path in full.rglob("*") if path.name.endswith(".part")]
    for path in full.rglob("*.json"):
        json.loads(path.read_text())
    run(full)
    assert numbers(full) == numbers(whole)


KILLED_IN_A_WRITE = """
import os, runpy, signal, sys
name, fsync = sys.argv.pop(1), os.fsync
def half_written(file):
    if name in os.readlink(f"/proc/self/fd/{file}"):
        os.truncate(file, os.fstat(file).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(file)
os.fsync = half_written
runpy.run_module("tract_hub", run_name="__main__")
"""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a comparison that nothing ended."""
    return tmp_path_factory.mktemp("uninterrupted") / "out"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads names of open files there")
@pytest.mark.parametrize(
    ("written", "done"),
    [
        ("ordinary-seed0.json", 0),
        ("tract-0.1-seed0.safetensors", 1),
        ("tract-0.1-seed0.json", 1),
        ("timing.json", 2),
        ("results.csv", 2),
    ],
)
def test_a_comparison_killed_while_it_writes_ends_as_the_uninterrupted_one(
    uninterrupted: Path, tmp_path: Path, written: str, done: int, capsys: pytest.CaptureFixture[str]
) -> None:
    if not uninterrupted.exists():  # made here, where a test has its own caches
        run(uninterrupted, "--save-weights")
    command = ["compare", *TINY, *ONE_SEED, "--save-weights", "--out", str(tmp_path)]
    ended = subprocess.run([sys.executable, "-c", KILLED_IN_A_WRITE, written, *command], cwd=ROOT)
    assert ended.returncode == -signal.SIGKILL
    assert not list(tmp_path.rglob(written)), "half a file has the name of a whole one"
    kept = {path: path.read_bytes() for path in (tmp_path / "runs").glob("*-seed0.*")}
    assert sum(path.suffix == ".json" for path in kept) == done
    capsys.readouterr()
    run(tmp_path, "--save-weights")
    assert (f"resuming: {done} of 2" in capsys.readouterr().out) == (done > 0)
    assert all(path.read_bytes() == before for path, before in kept.items())
    assert numbers(tmp_path) == numbers(uninterrupted)
    for name in ("ordinary-seed0.safetensors", "tract-0.1-seed0.safetensors"):
        path = Path("runs") / name
        assert (tmp_path / path).read_bytes() == (uninterrupted / path).read_bytes()


def test_an_audit_killed_again_and_again_has_every_model_once(tmp_path: Path) -> None:
    script, partial = tmp_path / "audit.py", tmp_path / "timm.partial.jsonl"
    script.write_text(AUDIT)
    draw = random.Random(0)
    lines = 0
    for wanted in (2, 4):  # the head and a model; two models more
        process = subprocess.Popen([sys.executable, str(script), str(partial)], cwd=ROOT)
        deadline = time.monotonic() + 200
        while lines < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(draw.uniform(0.001, 0.02))
            lines = partial.read_bytes().count(b"\n") if partial.exists() else 0
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    kept = partial.read_bytes()
    partial.write_bytes(kept + b'{"name": "resnet26", "resu')  # the kill met a write
    records = run_audit("timm", MODELS, partial, jobs=1, limit=60)
    assert [record["name"] for record in records] == MODELS
    assert all(record["result"] in ("exact", "multiple") for record in records)
    assert partial.read_bytes().startswith(kept)
    done = [json.loads(line).get("name") for line in partial.read_text().splitlines()]
    assert sorted(done[1:]) == sorted(MODELS)


def test_ctrl_c_ends_an_audit_at_once_and_what_is_done_is_kept(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tract_hub", "audit", "timm", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # not ignored
    )
    done, lines = tmp_path / "timm.partial.jsonl", 0
    deadline = time.monotonic() + 200
    while lines < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
        lines = done.read_bytes().count(b"\n") if done.exists() else 0
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to the workers too
    began = time.monotonic()
    said = process.communicate(timeout=300)[1]
    assert time.monotonic() - began < 30
    assert process.returncode == 130
    assert said.endswith(
        "tract-hub: interrupted; the same command again goes on from what is done\n"
    )
    assert "Traceback" not in said
    assert len(done.read_bytes().splitlines()) >= 3


@contextmanager
def small_files() -> Iterator[None]:
    """Let no file of this process grow beyond 100 bytes, pytest's own output included."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_atomically(path, "before")
    with (
        pytest.raises(StudyError, match=r"results\.json cannot be written: File too large"),
        small_files(),
    ):
        write_atomically(path, "x" * 200)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(path.name, "before")]


def test_a_line_that_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append_line(path, "a" * 70)
    with pytest.raises(StudyError, match="cannot be written: File too large"), small_files():
        append_line(path, "b" * 70)
    append_line(path, "c")
    assert path.read_text() == "a" * 70 + "\nc\n"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match=r"deeper cannot be written: Not a directory; .*--out"):
        make_folder(tmp_path / "file" / "deeper")
