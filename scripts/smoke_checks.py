"""The checks of ``scripts/smoke_test.sh``: of what is built, what is installed, and its types."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

BESIDE = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "MANIFEST.in", "pyproject.toml"}
MADE = {"PKG-INFO", "setup.cfg"}
PROGRAM = """
import tract_hub
from torch import nn
model: nn.Conv2d = tract_hub.enable(nn.Conv2d(3, 8, 3), lam=0.2, scope="local")
names: list[str] = [stem.weight_name for stem in tract_hub.locate(model)]
lams: list[float] = [state.lam for state in tract_hub.status(model)]
"""


def contents(source: str, *built: str) -> None:
    """The package's files and the few beside them are in there, and nothing else."""
    files = [path for path in Path(source, "tract_hub").rglob("*") if path.is_file()]
    package = {path.relative_to(source).as_posix() for path in files}
    for file in built:
        if file.endswith(".whl"):
            names = {n for n in zipfile.ZipFile(file).namelist() if ".dist-info/" not in n}
            _same(names, package, file)
        else:
            with tarfile.open(file) as archive:
                names = {m.name.partition("/")[2] for m in archive if m.isfile()}
            _same({n for n in names if ".egg-info/" not in n}, package | BESIDE | MADE, file)


def _same(found: set[str], wanted: set[str], file: str) -> None:
    if found != wanted:
        raise SystemExit(f"{file}: too many {found - wanted}, missing {wanted - found}")


def installed() -> None:
    """The closed form on a model of each zoo, the launcher, and what is said without extras."""
    import timm
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    import tract_hub

    if not Path(tract_hub.__file__).is_relative_to(sys.prefix):
        raise SystemExit(f"not the installed package: {tract_hub.__file__}")
    images = torch.randn(4, 3, 32, 32, dtype=torch.double)
    options = {"image_size": 32, "hidden_size": 32, "num_hidden_layers": 1}
    vit = ViTForImageClassification(ViTConfig(num_attention_heads=2, patch_size=8, **options))
    for model in (timm.create_model("resnet18", num_classes=2), vit):
        _check_gradient(model.double(), images)
    _run("-m", "tract_hub.launch", "--help", status=0, says="usage: tract_hub.launch")
    _run("-m", "tract_hub", "compare", says="with its extra studies")


def _check_gradient(model, images) -> None:
    import torch

    import tract_hub

    def gradient():
        model.zero_grad()
        output = model(images)
        getattr(output, "logits", output).square().sum().backward()
        return layer.weight.grad.flatten(1).clone()

    (stem,) = tract_hub.locate(model)
    layer = stem.module
    rows = torch.nn.functional.unfold(images, layer.kernel_size, 1, layer.padding, layer.stride)
    rows = rows.transpose(1, 2).flatten(0, 1)
    moment = rows.T @ rows / len(rows) + 0.1 * torch.eye(rows.shape[1], dtype=torch.double)
    model.train()
    torch.manual_seed(0)
    expected = gradient() @ torch.linalg.inv(moment)
    torch.manual_seed(0)
    tract_hub.enable(model)
    torch.testing.assert_close(gradient(), expected, rtol=1e-9, atol=1e-12)


def _run(*arguments: str, status: int = 2, says: str) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    said = done.stdout + done.stderr
    if done.returncode != status or says not in said or "Traceback" in said:
        raise SystemExit(f"{' '.join(arguments)}: exit status {done.returncode}\n{said}")


def types(python: str) -> None:
    """A user's program passes ``mypy --strict``, and one with a mistake does not."""
    with tempfile.TemporaryDirectory() as folder:
        good, bad = Path(folder, "good.py"), Path(folder, "bad.py")
        good.write_text(PROGRAM, encoding="utf-8")
        bad.write_text(PROGRAM.replace("lam=0.2", "lam='much'"), encoding="utf-8")
        mypy = [sys.executable, "-m", "mypy", "--strict", "--python-executable", python]
        for program, wanted in ((good, 0), (bad, 1)):
            done = subprocess.run([*mypy, program.name], cwd=folder, capture_output=True, text=True)
            if done.returncode != wanted:
                raise SystemExit(f"mypy on {program.name}:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    {"contents": contents, "installed": installed, "types": types}[sys.argv[1]](*sys.argv[2:])
