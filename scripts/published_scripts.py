"""Run published training scripts as they are, ordinary and launched with TrAct.

    python scripts/published_scripts.py --timm CHECKOUT --transformers CHECKOUT \
        --vision CHECKOUT --evaluate CHECKOUT

Each argument is a checkout of huggingface/pytorch-image-models, huggingface/transformers,
pytorch/vision or huggingface/evaluate; those left out are not run. The Hugging Face scripts need
`pip install evaluate` and are run in the metrics folder of its checkout, where they find the
accuracy metric without a hub. Data: 24 images of random pixels in 6 classes, made on the spot.
Writes docs/results/published-scripts.md.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from tract_hub.studies.files import write_atomically
from tract_hub.studies.machine import versions

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "published-scripts.md"
PYTHON = [sys.executable]
LAUNCH = ["-m", "tract_hub.launch"]
CLASSES, SIDE = 6, 64

TIMM = (
    "--data-dir {images} --output {out} --model test_resnet --num-classes 6 --img-size 64 "
    "--device cpu -b 4 --epochs 1 --cooldown-epochs 0 --warmup-epochs 0 --sched step --workers 1 "
    "--no-prefetcher --log-interval 1 --opt sgd --lr 0.1"
)
TIMM_FLAGS = (
    "",
    "--amp --amp-dtype bfloat16",
    "--model-ema",
    "--grad-accum-steps 2",
    "--channels-last",
    "--torchcompile",
    "--model test_vit --img-size 160 --grad-checkpointing",
    "--clip-grad 1.0",
    "--kd-model-name local-dir:{teacher} --model test_vit --img-size 160",
    "--amp --amp-dtype bfloat16 --model-ema --grad-accum-steps 2 --channels-last --torchcompile "
    "--clip-grad 1.0 --model test_vit --img-size 160 --grad-checkpointing",
)
TRAINER = (
    "--train_dir {images}/train --validation_dir {images}/val --model_name_or_path {vit} "
    "--output_dir {out} --do_train --do_eval --num_train_epochs 1 --learning_rate 1e-2 "
    "--per_device_train_batch_size 4 --remove_unused_columns False --label_column_name label "
    "--report_to none --logging_steps 1 --use_cpu"
)
NO_TRAINER = (
    "--dataset_name {images} --model_name_or_path {vit} --output_dir {out} --num_train_epochs 1 "
    "--learning_rate 1e-2 --per_device_train_batch_size 4 --label_column_name label --seed 0"
)
VISION = (
    "--data-path {images} --output-dir {out} --model resnet18 --device cpu -b 4 --epochs 1 "
    "--workers 0 --print-freq 1 --train-crop-size 64 --val-resize-size 64 --val-crop-size 64"
)
TWO = "accelerate launch, 2 processes"
LAUNCHERS = {
    "python": PYTHON,
    TWO: [
        *PYTHON,
        *"-m accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes 2".split(),
        *"--mixed_precision no --dynamo_backend no".split(),
    ],
}


@dataclass(frozen=True)
class Published:
    """A script, how to call it, and what its output says about the training loss."""

    repository: str
    path: str
    arguments: str
    flags: tuple[str, ...]
    loss: str = ""
    launchers: tuple[str, ...] = ("python",)


EXAMPLES = "examples/pytorch/image-classification"
PUBLISHED = (
    Published("timm", "train.py", TIMM, TIMM_FLAGS, r"Train: .*?Loss: ([\d.]+)"),
    Published(
        "transformers",
        f"{EXAMPLES}/run_image_classification.py",
        TRAINER,
        ("", "--bf16 --gradient_accumulation_steps 2", "--optim adafactor"),
        r"'loss': '([\d.]+)'",
    ),
    Published(
        "transformers",
        f"{EXAMPLES}/run_image_classification_no_trainer.py",
        NO_TRAINER,
        ("", "--gradient_accumulation_steps 2"),
        launchers=("python", TWO),
    ),
    Published(
        "vision",
        "references/classification/train.py",
        VISION,
        (
            "",
            "--model-ema --clip-grad-norm 1",
            "--model vit_b_32 --norm-weight-decay 0 --train-crop-size 224 --val-crop-size 224 "
            "--val-resize-size 224",
            "--mixup-alpha 0.2 --label-smoothing 0.1",
        ),
        r"Epoch: .*?loss: [\d.]+ \(([\d.]+)\)",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("timm", "transformers", "vision", "evaluate"):
        parser.add_argument(f"--{name}", type=Path)
    checkouts = {k: v.resolve() for k, v in vars(parser.parse_args()).items() if v}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder))
        for script in PUBLISHED:
            if script.repository in checkouts:
                for launcher in script.launchers:
                    for flags in script.flags:
                        rows.append(compare(script, launcher, flags, checkouts, Path(folder)))
                        print(rows[-1], flush=True)
    write_atomically(RESULTS, page(rows, checkouts))


def make_inputs(folder: Path) -> None:
    """Images, a small ViT, a teacher, and a start of Python that seeds every script."""
    import timm
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(24):
            of_class = folder / "images" / split / f"class{i % CLASSES}"
            of_class.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(of_class / f"{i}.png")
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=CLASSES,
    )
    ViTForImageClassification(config).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    teacher = timm.create_model("test_vit2", num_classes=CLASSES)
    timm.models.save_for_hf(teacher, folder / "teacher")
    (folder / "start").mkdir()
    (folder / "start" / "sitecustomize.py").write_text("import torch\ntorch.manual_seed(0)\n")


def compare(
    script: Published, launcher: str, flags: str, checkouts: dict[str, Path], folder: Path
) -> str:
    """Run a script both ways; return a row of the table."""
    path = checkouts[script.repository] / script.path
    evaluate = checkouts.get("evaluate", folder) / "metrics"
    here = evaluate if evaluate.is_dir() else folder
    results, outs, line = [], [], ""
    for number, launch in enumerate(([], LAUNCH)):
        out = Path(tempfile.mkdtemp(dir=folder))
        made = {name: folder / name for name in ("images", "vit", "teacher")}
        words = f"{script.arguments} {flags}".format(**made, out=out).split()
        command = [*LAUNCHERS[launcher], *launch, str(path), *words]
        done = subprocess.run(
            command, cwd=here, env=environment(folder), capture_output=True, text=True
        )
        output = done.stdout + done.stderr
        losses = re.findall(script.loss, output) if script.loss else []
        shown = f"{losses[0]} → {losses[-1]}" if losses else "not printed"
        results.append(f"{done.returncode} | {shown}" if done.returncode == 0 else trouble(output))
        outs.append(out)
        if number:
            line = "".join(re.findall(r"tract_hub\.launch: (.*)", output))
    name = f"{script.repository} `{Path(script.path).name}`"
    how = "" if launcher == "python" else f"{launcher} "
    what = f"{how}`{flags}`" if flags else how.strip() or "–"
    ran = not any(result.startswith("failed") for result in results)
    difference = f"{stem_difference(*outs, line):.2g}" if ran and line else ""
    return f"| {name} | {what} | {results[0]} | {results[1]} | {difference} | {line} |"


def environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join([str(folder / "start"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "1", "HF_HUB_OFFLINE": "1"}


def trouble(output: str) -> str:
    print(output[-3000:], file=sys.stderr)
    return f"failed | {output.strip().splitlines()[-1][:80]}"


def stem_difference(ordinary: Path, launched: Path, line: str) -> float:
    """Relative difference of the trained first layer between the two checkpoints."""
    stem = re.findall(r" on (\S+?),? ", line)[0]
    before, after = weights(ordinary), weights(launched)
    (name,) = [name for name in after if stem.endswith(name)]
    return float((after[name] - before[name]).norm() / before[name].norm())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Load the model that a script saved."""
    saved = sorted(folder.rglob("model.safetensors"), key=lambda path: len(path.parts))
    if saved:
        return load_file(saved[0])
    (path,) = [*folder.rglob("last.pth.tar"), *folder.rglob("checkpoint.pth")]
    checkpoint = torch.load(path, weights_only=False)
    return checkpoint.get("state_dict") or checkpoint["model"]


def revision(checkout: Path) -> str:
    """Return the date and commit of a checkout."""
    command = ["git", "-C", str(checkout), "log", "-1", "--format=%h of %as"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def page(rows: list[str], checkouts: dict[str, Path]) -> str:
    packages = ("torch", "torchvision", "transformers", "accelerate", "datasets")
    shown = ", ".join(f"{name} {versions()[name]}" for name in packages)
    sources = ", ".join(f"{name} {revision(path)}" for name, path in checkouts.items())
    return "\n".join(
        [
            "# Published training scripts, unmodified, with TrAct",
            "",
            "One epoch on 24 images of random pixels, CPU, from the same seed; what is shown is "
            "that they run and what TrAct changes, not how well they learn. Loss: of the first "
            "and of the last training step (of torchvision's script, their running mean). First "
            "layer: relative difference of its weight after the run, TrAct against ordinary. "
            f"Written by `python scripts/published_scripts.py`; the scripts: {sources} (timm's "
            f"runs with the timm beside it); the packages: {shown}.",
            "",
            "| script | options | ordinary: exit status | loss | TrAct: exit status | loss "
            "| first layer | the line at the end |",
            "| --- | --- | --: | --: | --: | --: | --: | --- |",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
