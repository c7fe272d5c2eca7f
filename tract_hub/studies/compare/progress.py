"""How far a comparison is: a live bar on a terminal, one line a run elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from tract_hub.studies.compare.records import EpochRecord


class Progress:
    """Is told what happens, as it happens; shows nothing: for all processes but the first."""

    def run_began(self, name: str) -> None:
        """Say that a run begins."""

    def step_ended(self) -> None:
        """Say that a training step is done."""

    def epoch_ended(self, record: EpochRecord) -> None:
        """Say that an epoch is done, and tested."""

    def run_ended(self, steps_left_out: int) -> None:
        """Say that a run is done, so many steps early."""

    def __enter__(self) -> Progress:
        """Begin to show."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop showing."""


class Lines(Progress):
    """One line for every run that ends: for logs and pipes.

    Args:
        console: where to.
        runs: how many runs there will be.

    """

    def __init__(self, console: Console, runs: int) -> None:
        self.console = console
        self.runs = runs
        self.done = 0
        self.name = ""
        self.last: EpochRecord | None = None

    def run_began(self, name: str) -> None:
        """Remember the name."""
        self.name = name

    def epoch_ended(self, record: EpochRecord) -> None:
        """Remember the numbers."""
        self.last = record

    def run_ended(self, steps_left_out: int) -> None:
        """Print the run's last numbers."""
        self.done += 1
        self.console.print(
            f"[{self.done}/{self.runs}] {self.name}: {_last(self.last)}", markup=False
        )


class Live(Progress):
    """A bar over all steps of all runs, with the last epoch's numbers.

    Args:
        console: a terminal.
        runs: how many runs there will be.
        steps: how many training steps in all of them.

    """

    def __init__(self, console: Console, runs: int, steps: int) -> None:
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[last]}"),
            console=console,
        )
        self.task = self.bar.add_task("", total=steps, last="")
        self.runs = runs
        self.begun = 0

    def run_began(self, name: str) -> None:
        """Name the run before the bar."""
        self.begun += 1
        self.bar.update(self.task, description=f"run {self.begun}/{self.runs} {name}", last="")

    def step_ended(self) -> None:
        """Move the bar."""
        self.bar.advance(self.task)

    def epoch_ended(self, record: EpochRecord) -> None:
        """Show the numbers after the bar."""
        self.bar.update(self.task, last=_last(record))

    def run_ended(self, steps_left_out: int) -> None:
        """Move the bar past steps that a diverged run did not take."""
        self.bar.advance(self.task, steps_left_out)

    def __enter__(self) -> Live:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()


def _last(record: EpochRecord | None) -> str:
    if record is None:
        return ""
    if not record.finite():
        return f"diverged at epoch {record.epoch}"
    return f"epoch {record.epoch}, accuracy {record.accuracy:.1%}"


def make_progress(console: Console, runs: int, steps: int, shown: bool) -> Progress:
    """Return what fits the console.

    Args:
        console: where to show it.
        runs: how many runs there will be.
        steps: how many training steps in all of them.
        shown: False in all processes but the first.

    """
    if not shown or not runs:
        return Progress()
    return Live(console, runs, steps) if console.is_terminal else Lines(console, runs)
