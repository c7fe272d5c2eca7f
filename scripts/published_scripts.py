"""Run published training scripts as they are, ordinary and launched with TrAct, a few steps each.

    python scripts/published_scripts.py CHECKOUTS [NAME …]

CHECKOUTS holds clones of the repositories in PUBLISHED, each in a folder of its own name; those
that are not there are told as not run. Data are images of random pixels, made on the spot, also in
the form of CIFAR-10. A `sitecustomize` on PYTHONPATH seeds each script, keeps its parameters after
the first optimizer step, and ends it after STEPS: both runs then differ, after that step, in the
first layers alone. Writes docs/results/published-scripts.md.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from tract_hub.studies import table
from tract_hub.studies.machine import machine

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "published-scripts.md"
COLUMNS = ["script", "source", "first layer", "the line at the end"]
STEPS = 3
TIME_LIMIT = 600
START = f"""
import io, os, torch
from torch.optim.optimizer import register_optimizer_step_post_hook
torch.manual_seed(0)
steps = 0

def after(optimizer, *_):
    global steps
    steps += 1
    if steps == 1 and os.environ.get("RANK", "0") == "0":
        groups = optimizer.param_groups
        torch.save([p.detach().clone() for g in groups for p in g["params"]], os.environ["KEPT"])
    if steps == {STEPS}:
        raise SystemExit(0)

register_optimizer_step_post_hook(after)
import torchvision.datasets.cifar
torchvision.datasets.cifar.check_integrity = lambda *_: True
ordinary_popen = os.popen
os.popen = lambda command, *rest: (  # pytorch-cifar asks for the terminal's size
    io.StringIO("24 80") if command == "stty size" else ordinary_popen(command, *rest)
)
"""

TIMM = (
    "--data-dir {images} --output {out} --num-classes 6 --device cpu -b 4 --workers 1 "
    "--no-prefetcher --opt sgd --lr 0.1 --model test_resnet --img-size 64 --warmup-epochs 0"
)
YAML = (
    "-c {{root}}/scripts/timm/{}.yaml --data-dir {{images}} --output {{out}} --device cpu -b 4 "
    "--dataset folder --num-classes 6 --workers 1 --no-prefetcher --img-size 64 "
    "--model test_{} --opt sgd --lr 0.1 --mixup 0 --cutmix 0 --drop-path 0 "
    "--aug-repeats 0"
)
HF = (
    "--train_dir {images}/train --validation_dir {images}/val --output_dir {out} --do_train "
    "--remove_unused_columns False --report_to none --use_cpu --per_device_train_batch_size 4"
)
VISION = (
    "--data-path {images} --output-dir {out} --model resnet18 --device cpu -b 4 --workers 0 "
    "--train-crop-size 64 --val-resize-size 64 --val-crop-size 64"
)
CLASSIFY = "transformers/examples/pytorch/image-classification"
TIMM_RUNS = {
    "timm": TIMM,
    "timm, bf16": f"{TIMM} --amp --amp-dtype bfloat16",
    "timm, EMA": f"{TIMM} --model-ema",
    "timm, compiled": f"{TIMM} --torchcompile",
    "timm, accumulation": f"{TIMM} --grad-accum-steps 2",
    "timm, ViT with checkpoints": f"{TIMM} --model test_vit --img-size 160 --grad-checkpointing",
    "timm, resnet50.yaml": YAML.format("resnet50", "resnet"),
    "timm, deit3-small.yaml": YAML.format("deit3-small", "vit --img-size 160"),
    "timm, deit3-base.yaml": YAML.format("deit3-base", "vit --img-size 160"),
    "timm, cifar100.yaml": YAML.format("cifar100", "resnet"),
}
PUBLISHED: dict[str, tuple[str, str]] = {
    **{name: ("pytorch-image-models/train.py", words) for name, words in TIMM_RUNS.items()},
    "Trainer": (
        f"{CLASSIFY}/run_image_classification.py",
        HF + " --model_name_or_path {vit} --label_column_name label --do_eval False",
    ),
    "masked images": (
        "transformers/examples/pytorch/image-pretraining/run_mim.py",
        HF + " --model_type vit --config_overrides image_size=32,patch_size=8,hidden_size=32,"
        "num_hidden_layers=1,num_attention_heads=2 --dataset_name {images}",
    ),
    "torchvision": ("vision/references/classification/train.py", VISION),
    "torchvision, EMA": (
        "vision/references/classification/train.py",
        f"{VISION} --model-ema --mixup-alpha 0.2",
    ),
    "CIFAR zoo": ("pytorch-cifar/main.py", "--lr 0.1"),
    "SimCLR": ("SimCLR/run.py", "-data data -dataset-name cifar10 -b 16 -j 0 --disable-cuda"),
}


def main() -> None:
    checkouts, names = Path(sys.argv[1]).resolve(), sys.argv[2:] or list(PUBLISHED)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder))
        for name in names:
            rows.append(compared(name, checkouts, Path(folder)))
            print(rows[-1], flush=True)
    table.write_atomically(
        RESULTS,
        "# Published training scripts, unmodified, with TrAct\n\n"
        f"{STEPS} optimizer steps on images of random pixels on a CPU, ordinary and with `python "
        "-m tract_hub.launch`, from the same seed. First layer: parameters that differ after the "
        "first step, of all, and by how much of their norm. Written by `python "
        f"scripts/published_scripts.py`; {machine()}.\n\n"
        f"{table.markdown(pd.DataFrame(rows, columns=COLUMNS))}",
    )


def make_inputs(folder: Path) -> None:
    """Write image folders, CIFAR-10's files, a small ViT, and what Python starts with."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(24):
            place = folder / "images" / split / f"class{i % 6}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{i}.png")
    cifar = folder / "data" / "cifar-10-batches-py"
    cifar.mkdir(parents=True)
    data = generator.integers(0, 256, (128, 3072), dtype=np.uint8)
    batch = pickle.dumps({"data": data, "labels": [i % 10 for i in range(128)]})
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (cifar / name).write_bytes(batch)
    (cifar / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    config.num_labels = 6
    ViTForImageClassification(config).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    (folder / "start").mkdir()
    (folder / "start" / "sitecustomize.py").write_text(START, encoding="utf-8")


def compared(name: str, checkouts: Path, folder: Path) -> tuple[str, str, str, str]:
    """Run a script both ways; return a row of the table."""
    path, arguments = PUBLISHED[name]
    script = checkouts / path
    if not script.exists():
        return name, path, "—", "not run: no such checkout"
    kept, line = [], ""
    for launch in ([], ["-m", "tract_hub.launch"]):
        out = tempfile.mkdtemp(dir=folder)
        words = arguments.format(root=ROOT, images=folder / "images", out=out, vit=folder / "vit")
        start = os.pathsep.join([str(folder / "start"), str(ROOT), str(script.parent)])
        result = Path(out) / "kept.pt"
        settings = {"PYTHONPATH": start, "KEPT": str(result), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, *launch, str(script), *words.split()]
        options = {"cwd": folder, "env": {**os.environ, **settings}, "timeout": TIME_LIMIT}
        try:
            done = subprocess.run(command, capture_output=True, text=True, **options)
        except subprocess.TimeoutExpired:
            return name, path, "—", f"not done in {TIME_LIMIT} s"
        said = (done.stdout + done.stderr).strip().splitlines() or [""]
        if done.returncode or not result.exists():
            return name, path, "—", f"exit status {done.returncode}: {said[-1][:90]}"
        kept.append(torch.load(result))
        line = next((x for x in said if x.startswith("tract_hub.launch: ")), "")
    changes = [
        float((a - b).norm() / a.norm())
        for a, b in zip(*kept, strict=True)
        if not torch.equal(a, b)
    ]
    sizes = ", ".join(f"{change:.2g}" for change in changes[:3])
    shown = f"{len(changes)} of {len(kept[0])}: {sizes}"
    return name, path, shown, line.removeprefix("tract_hub.launch: ")


if __name__ == "__main__":
    main()
