"""Train a recipe: accelerate launch --config_file … train.py RECIPE --data FOLDER."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from data import eval_loader, make_images, mixup_of, train_loader
from recipe import Recipe, load_recipe
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

import tract_hub
from tract_hub.studies.compare.identity import environment
from tract_hub.studies.files import write_atomically
from tract_hub.studies.machine import versions
from tract_hub.studies.models.stems import adapt_stem


def main() -> None:
    options = parse()
    recipe = load_recipe(options.recipe, options.changes, options.smoke, options.budget)
    accelerator = Accelerator(gradient_accumulation_steps=options.accumulate)
    set_seed(options.seed)
    if options.smoke:
        options.data = smoke_images(accelerator)
    batch = share_of_batch(recipe, accelerator.num_processes, options.accumulate)
    model = build(recipe, ordinary=options.ordinary)
    optimizer = create_optimizer_v2(model, **recipe.optimizer)
    schedule, _ = create_scheduler_v2(optimizer, num_epochs=recipe.epochs, **recipe.schedule)
    loader = train_loader(recipe, options.data, batch, options.workers, accelerator)
    held_out = eval_loader(recipe, options.data, batch, options.workers)
    model, optimizer, held_out = accelerator.prepare(model, optimizer, held_out)
    history = History(options, recipe, accelerator)
    accelerator.register_for_checkpointing(history)
    if options.resume and (state := history.last_state()):
        accelerator.load_state(str(state))
    for epoch in range(len(history.epochs), recipe.epochs):
        schedule.step(epoch)
        began = time.perf_counter()
        loss = train_epoch(recipe, accelerator, model, optimizer, loader, epoch)
        seconds = time.perf_counter() - began
        top1 = evaluate(accelerator, model, held_out)
        record = {"epoch": epoch, "loss": loss, "top1": top1, "seconds": seconds}
        accelerator.print(json.dumps(record), flush=True)
        history.epochs.append(record)
        accelerator.save_state(str(history.state()))
        history.write()
    accelerator.save_model(model, str(options.out))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="the name of a file in settings/")
    parser.add_argument("changes", nargs="*", help="key=value, such as optimizer.lr=0.141")
    parser.add_argument("--data", type=Path, default=Path("data"), help="with train/ and val/")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--accumulate", type=int, default=1, help="batches a step")
    parser.add_argument("--workers", type=int, default=8, help="processes that read images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=1.0, help="share of the epochs")
    parser.add_argument("--ordinary", action="store_true", help="without TrAct, to compare")
    parser.add_argument("--resume", action="store_true", help="from the last epoch in --out")
    parser.add_argument("--smoke", action="store_true", help="a tiny run, on images made for it")
    return parser.parse_intermixed_args()


def share_of_batch(recipe: Recipe, processes: int, accumulate: int) -> int:
    """Return how many images a process takes through the model at once."""
    batch, rest = divmod(recipe.batch_size, processes * accumulate)
    if rest or not batch:
        raise SystemExit(
            f"batch_size {recipe.batch_size} cannot be shared by {processes} "
            f"processes that accumulate {accumulate} batches each"
        )
    return batch


def build(recipe: Recipe, ordinary: bool) -> nn.Module:
    given = {"pretrained": recipe.pretrained, "num_classes": recipe.classes}
    model = timm.create_model(
        recipe.model, checkpoint_path=recipe.weights, **given, **recipe.model_args
    )
    if recipe.stem == "cifar":
        adapt_stem(model, recipe.model)
        model.maxpool = nn.Identity()
    return model if ordinary else tract_hub.enable(model, recipe.lam, scope=recipe.scope)


class History:
    """What the epochs so far gave, saved with the rest of the state, and as history.json."""

    def __init__(self, options: argparse.Namespace, recipe: Recipe, at: Accelerator) -> None:
        self.epochs: list[dict[str, float]] = []
        self.file = options.out / "history.json"
        self.main = at.is_main_process
        settings = {**asdict(recipe), "ordinary": options.ordinary, "seed": options.seed}
        self.settings = json.loads(json.dumps(settings))
        self.made_by = {"versions": versions(), **environment(at)}

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs = state["epochs"]

    def state(self) -> Path:
        """Return where to save: in turns, so that the last whole state outlives a crash."""
        return self.file.parent / f"state-{len(self.epochs) % 2}"

    def last_state(self) -> Path | None:
        """Return what there is to go on from; refuse what other settings made."""
        if not self.file.is_file():
            return None
        found = json.loads(self.file.read_text(encoding="utf-8"))
        if found["settings"] != self.settings:
            raise SystemExit(f"{self.file.parent} was trained with other settings: change --out")
        return self.file.parent / f"state-{len(found['epochs']) % 2}"

    def write(self) -> None:
        if self.main:
            whole = {name: getattr(self, name) for name in ("settings", "made_by", "epochs")}
            write_atomically(self.file, json.dumps(whole, indent=1) + "\n")


def train_epoch(
    recipe: Recipe, accelerator: Accelerator, model: Any, optimizer: Any, loader: Any, epoch: int
) -> float:
    """Make one pass over this process's images; return its mean loss."""
    model.train()
    loader.sampler.set_epoch(epoch)
    mix, criterion = mixup_of(recipe), loss_of(recipe)
    total = torch.zeros((), device=accelerator.device)
    for images, labels in loader:
        images, labels = images.to(accelerator.device), labels.to(accelerator.device)
        if mix:
            images, labels = mix(images, labels)
        with accelerator.accumulate(model):
            loss = criterion(model(images), labels)
            accelerator.backward(loss)
            if recipe.clip_grad and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), recipe.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.detach()
    return float(total) / len(loader)


def loss_of(recipe: Recipe) -> nn.Module:
    if recipe.loss == "bce":
        return BinaryCrossEntropy(smoothing=0.0)  # mixup has smoothed the labels
    return SoftTargetCrossEntropy() if recipe.mixup else nn.CrossEntropyLoss()


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: Any, loader: Any) -> float:
    """Return the share of images whose class is the likeliest."""
    model.eval()
    hits = []
    for images, labels in loader:
        right = model(images).argmax(1) == labels
        hits.append(accelerator.gather_for_metrics(right))
    return float(torch.cat(hits).float().mean())


def smoke_images(accelerator: Accelerator) -> Path:
    """Let the main process write images; return their folder to every process."""
    folder = [tempfile.mkdtemp() if accelerator.is_main_process else ""]
    if accelerator.is_main_process:
        make_images(Path(folder[0]))
    broadcast_object_list(folder)
    return Path(folder[0])


if __name__ == "__main__":
    main()
