"""Run a study of the paper, or of ours: python scripts/studies/run.py STUDY --data PATH."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from report import write
from rich.console import Console
from study import Study, known, load_study
from trainings import Trained, TrainingError, train

NAMES = ", ".join(known())


def main(
    study: Annotated[str, typer.Argument(help=f"One of: {NAMES}.")],
    data: Annotated[str | None, typer.Option(help="A path; else the study's hub name.")] = None,
    data_title: Annotated[
        str | None, typer.Option(help="How results call the data: 'CIFAR-10 (JPEG)'.")
    ] = None,
    budget: Annotated[float, typer.Option(help="Share of the study's epochs, in all arms.")] = 1.0,
    reduced: Annotated[
        bool, typer.Option(help="Smaller models, fewer images, epochs and seeds.")
    ] = False,
    seeds: Annotated[str | None, typer.Option(help="Instead of the study's, as 0,1,2.")] = None,
    out: Annotated[Path, typer.Option(help="For the runs of all studies.")] = Path("study-runs"),
    results: Annotated[Path | None, typer.Option(help="For the results; else OUT/STUDY.")] = None,
    launch: Annotated[
        str, typer.Option(help="What starts a script: 'accelerate launch --num_processes 8'.")
    ] = "",
    others: Annotated[
        list[str] | None, typer.Argument(help="Further options of every command, after --.")
    ] = None,
) -> None:
    """Train every arm of a study that has not been trained, and write its table and picture.

    Stopped half-way, it goes on with the same command.
    """
    try:
        numbers = [int(seed) for seed in seeds.split(",")] if seeds else None
        asked = load_study(study, budget, reduced, numbers, data_title)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    asked = replace(asked, others=tuple(others or []))
    _check_data(asked, data)
    trained = _train(asked, data or asked.data.name, out, launch)
    _check_alike([part.made_by for part in trained])
    folder = results or out / study
    folder.mkdir(parents=True, exist_ok=True)
    write(asked, trained, folder, _command(asked, data, seeds))
    Console().print(f"written to {folder}: study.json, table.md, picture.png", markup=False)


def _check_data(study: Study, data: str | None) -> None:
    if data is None and study.by == "compare":
        return  # the hub has it, or compare says that it has not
    if data is None or not Path(data).exists():
        problem = f"no data at {data}" if data else "this study needs --data"
        raise typer.BadParameter(
            f"{problem}; fetch them: {study.data.fetch}; expected: {study.data.layout}"
        )


def _train(study: Study, data: str, out: Path, launch: str) -> list[Trained]:
    console = Console(stderr=True)
    trained = []
    for i, part in enumerate(study.parts, 1):
        name = f"{study.name}, part {i} of {len(study.parts)}: {part.name}, {part.epochs} epochs"
        console.print(name, markup=False, highlight=False)
        try:
            trained.append(train(study, part, data, out, launch))
        except TrainingError as error:
            hint = f"data are fetched by: {study.data.fetch}; expected: {study.data.layout}"
            console.print(f"this failed: {error}\n{hint}", markup=False, highlight=False)
            raise typer.Exit(2) from None
    return trained


def _check_alike(made_by: list[dict[str, object]]) -> None:
    """Results of other versions or devices are refused, not merged."""
    for other in made_by[1:]:
        different = [key for key, value in other.items() if value != made_by[0].get(key)]
        if different:
            raise typer.BadParameter(
                f"parts of this study were trained with another {', '.join(different)}: "
                f"{made_by[0]} and {other}; pass another --out, or delete the older part"
            )


def _command(study: Study, data: str | None, seeds: str | None) -> str:
    words = ["python", "scripts/studies/run.py", study.name]
    words += ["--data", Path(data).name] if data else []
    words += ["--budget", f"{study.budget:g}"] if study.budget != 1 else []
    words += ["--reduced"] if study.reduced else []
    words += ["--seeds", seeds] if seeds else []
    words += ["--", *study.others] if study.others else []
    return shlex.join(words)


if __name__ == "__main__":
    typer.run(main) if len(sys.argv) > 1 else sys.exit(f"which study? One of: {NAMES}")
