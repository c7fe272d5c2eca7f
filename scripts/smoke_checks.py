"""The checks of ``scripts/smoke_test.sh``: of what is built, and of what is installed."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

BESIDE = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "MANIFEST.in", "pyproject.toml"}
MADE = {"PKG-INFO", "setup.cfg"}


def contents(source: str, *built: str) -> None:
    """The package's files and the few beside them are in there, and nothing else."""
    files = [path for path in Path(source, "tract_hub").rglob("*") if path.is_file()]
    package = {path.relative_to(source).as_posix() for path in files}
    for file in built:
        if file.endswith(".whl"):
            names = {n for n in zipfile.ZipFile(file).namelist() if ".dist-info/" not in n}
            wanted = package
        else:
            with tarfile.open(file) as archive:
                names = {m.name.partition("/")[2] for m in archive if m.isfile()}
            names = {name for name in names if ".egg-info/" not in name}
            wanted = package | BESIDE | MADE
        if names != wanted:
            raise SystemExit(f"{file}: too many {names - wanted}, missing {wanted - names}")


def installed() -> None:
    """TrAct changes the first layer's gradient alone; commands say what they lack, or help."""
    import timm
    import torch

    import tract_hub

    if not Path(tract_hub.__file__).is_relative_to(sys.prefix):
        raise SystemExit(f"not the installed package: {tract_hub.__file__}")
    model, images = timm.create_model("resnet18", num_classes=2), torch.randn(4, 3, 32, 32)
    gradients = []
    for prepare in (tract_hub.disable, tract_hub.enable):
        model.zero_grad()
        prepare(model)(images).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    changed = [n for n, gradient in gradients[0].items() if not gradient.equal(gradients[1][n])]
    if changed != ["conv1.weight"]:
        raise SystemExit(f"the gradients of {changed} changed")
    for arguments, status, says in (
        (["-m", "tract_hub.launch", "--help"], 0, "usage: tract_hub.launch"),
        (["-m", "tract_hub", "compare"], 2, "with its extra studies"),
    ):
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
        said = done.stdout + done.stderr
        if done.returncode != status or says not in said or "Traceback" in said:
            raise SystemExit(f"{' '.join(arguments)}: exit status {done.returncode}\n{said}")


if __name__ == "__main__":
    {"contents": contents, "installed": installed}[sys.argv[1]](*sys.argv[2:])
