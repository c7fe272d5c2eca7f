"""``tract-hub bench``: what TrAct adds to the time and the memory of a training step."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

import tract_hub
from tract_hub.errors import SettingsError, StudyError, first_line
from tract_hub.names import did_you_mean
from tract_hub.studies import table
from tract_hub.studies.data import photographs
from tract_hub.studies.machine import machine
from tract_hub.studies.models import build_model
from tract_hub.studies.settings import Bench
from tract_hub.studies.timing import LEAST_TURNS, added, ratios, take_turns
from tract_hub.studies.train import Step, make_accelerator

LAM = 0.1
MEMORY_BATCHES = (64, 256)


@dataclass(frozen=True)
class Case:
    """A model and the batch of its training step."""

    model: str | Callable[[], nn.Module]
    """A name for ``build_model``, with its arguments, or what builds it."""
    shape: tuple[int, ...]
    """Of one input: channels × height × width; with frames where the model takes them."""
    batch: int
    arguments: dict[str, Any] = field(default_factory=dict)
    channels_last: bool = False
    """Whether it is always measured in this memory format."""

    def prepare(self, device: torch.device, last: bool) -> tuple[nn.Module, Tensor, Tensor]:
        """Return the model in training mode with its initial weights, photographs, and labels."""
        torch.compiler.reset()  # or the next case is compiled for shapes that change
        if isinstance(self.model, str):
            channels = self.shape[0] if self.shape[0] == 1 else None
            model = build_model(self.model, channels=channels, arguments=self.arguments)
        else:
            model = self.model()
        model, images = model.train().to(device), self.images().to(device)
        if (last or self.channels_last) and images.ndim == 4:
            model = model.to(memory_format=torch.channels_last)
            images = images.contiguous(memory_format=torch.channels_last)
        return model, images, torch.arange(self.batch, device=device) % 10

    def images(self) -> Tensor:
        """Return standardised photographs in the model's shape."""
        size = self.shape[-1]
        channels = 1 if self.shape[0] == 1 else 3
        count = torch.Size(self.shape).numel() // (channels * size**2)
        images = photographs(self.batch * count, size, channels)
        if len(self.shape) == 3:
            return images
        images = images.unflatten(0, (self.batch, count))
        by_channel: Tensor = images.transpose(1, 2).contiguous()
        return by_channel if self.shape[0] == channels else images


def _mlp(features: int, width: int) -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(width, 10))


def _videomae() -> nn.Module:
    """Two of VideoMAE's twelve layers: 1,536 features of 2 × 16 × 16 pixels."""
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    model: nn.Module = VideoMAEForVideoClassification(VideoMAEConfig(num_hidden_layers=2))
    return model


CASES: dict[str, dict[str, Case]] = {
    "cpu": {
        "resnet18-32": Case("resnet18-small-images", (3, 32, 32), 64),
        "grey-channels-last": Case("resnet18-small-images", (1, 32, 32), 64, {}, True),
        "resnet18": Case("resnet18", (3, 224, 224), 8),
        "mobilenetv3-small": Case("mobilenetv3_small_100", (3, 224, 224), 16),
        "convnext-atto": Case("convnext_atto", (3, 224, 224), 8),
        "vit-tiny": Case("vit_tiny_patch16_224", (3, 224, 224), 16),
        "vit-small": Case("vit_small_patch16_224", (3, 224, 224), 8),
        # Fewer rows than features (3,072) at batch 8, about as many at 64.
        "vit-base-32-b8": Case("vit_base_patch32_224", (3, 224, 224), 8),
        "vit-base-32-b64": Case("vit_base_patch32_224", (3, 224, 224), 64),
        "mlp-28": Case(partial(_mlp, 784, 512), (1, 28, 28), 64),
        "mlp-32": Case(partial(_mlp, 3072, 512), (3, 32, 32), 128),
        # Few of their layers: TrAct's share is larger than in the whole model.
        "vit-huge-14-2-layers": Case("vit_huge_patch14_224", (3, 224, 224), 4, {"depth": 2}),
        "videomae-2-layers": Case(_videomae, (16, 3, 224, 224), 1),
        "r3d-18": Case("torchvision:r3d_18", (3, 8, 112, 112), 2),
    },
    "cuda": {
        "resnet50": Case("resnet50", (3, 224, 224), 256),
        "vit-small": Case("vit_small_patch16_224", (3, 224, 224), 256),
        "vit-base": Case("vit_base_patch16_224", (3, 224, 224), 256),
        "vit-base-32": Case("vit_base_patch32_224", (3, 224, 224), 256),
        "cifar-vit": Case("cifar-vit", (3, 32, 32), 128, {"img_size": 32, "num_classes": 10}),
        "mlp-32": Case(partial(_mlp, 3072, 512), (3, 32, 32), 128),
    },
}


def with_torch_tract(model: nn.Module) -> nn.Module:
    """Put the authors' package, torch_tract from PyPI, on the stems that tract_hub finds."""
    torch_tract = importlib.import_module("torch_tract")
    for stem in tract_hub.locate(model):
        parent, _, name = stem.module_name.rpartition(".")
        layer = torch_tract.TrAct(stem.module, LAM)
        setattr(model.get_submodule(parent), name, layer)
    return model


ARMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ordinary": lambda model: model,
    "torch_tract": with_torch_tract,
    "tract_hub": lambda model: tract_hub.enable(model, lam=LAM),
}


def arms() -> list[str]:
    """Return the ways to train whose packages are here."""
    missing = importlib.util.find_spec("torch_tract") is None
    return [arm for arm in ARMS if arm != "torch_tract" or not missing]


def twin(model: nn.Module) -> nn.Module:
    """Copy modules but not tensors: where others lie in memory, a step takes a percent more."""
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def bench(settings: Bench) -> None:
    """Measure, print and write the tables; each case is written as soon as it is done."""
    kind = "cpu" if settings.device == "cpu" else "cuda"
    for name in settings.cases:
        if name not in CASES[kind]:
            known = did_you_mean(name, CASES[kind])
            raise SettingsError(f"there is no case {name!r} for {kind}; {known}")
    names = settings.cases or tuple(CASES[kind])
    torch.set_num_threads(settings.threads)
    accelerator = make_accelerator(settings.device, settings.precision)
    total = len(names) * settings.budget
    print(f"{len(names)} cases, about {tqdm.format_interval(total)} in all", flush=True)
    results: list[dict[str, Any]] = []
    form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"
    with tqdm(total=total, bar_format=form, disable=not sys.stderr.isatty()) as bar:
        for name in names:
            bar.set_description(name)
            results.append(measured(name, CASES[kind][name], settings, accelerator, bar))
            write(results, settings)
    memory = peak_memory(settings) if settings.memory else None
    print(write(results, settings, memory))
    print(f"written to {settings.out}: bench.md, bench.json")


def measured(
    name: str, case: Case, settings: Bench, accelerator: Accelerator, bar: tqdm[Any]
) -> dict[str, Any]:
    """Return the seconds of an ordinary step, and the arms' quartiles of ratios to it.

    The budget holds for building, warm-up and turns; more is said where the least turns need more.
    """
    device, began = accelerator.device, time.perf_counter()
    model, images, labels = case.prepare(device, settings.channels_last)
    steps, least = dict[str, Callable[[], Tensor]](), 0.0
    result: dict[str, Any] = {"case": name, "batch": case.batch, "errors": {}}
    columns = [(arm, False) for arm in arms()]
    columns += [(arm, True) for arm in ("ordinary", "tract_hub") if settings.compiled]
    for arm, compiled in columns:
        column = f"{arm}, compiled" if compiled else arm
        try:
            own = ARMS[arm](twin(model))
            if compiled:
                own.compile()
            step = Step(accelerator, accelerator.prepare_model(own, evaluation_mode=True))
            _, turn = take_turns({column: partial(step, images, labels)}, device, most=2)
            least += LEAST_TURNS * turn[column]
            steps[column] = partial(step, images, labels)
        except Exception as error:  # of the authors' package: it does not take every layer
            if arm != "torch_tract":
                raise
            result["errors"][column] = first_line(error)
    spent = time.perf_counter() - began
    needed = max(settings.budget, spent + least)
    if needed > settings.budget:
        tqdm.write(f"{name}: {needed:.0f} s instead of --budget, for {LEAST_TURNS} turns")
    done, bar.total = bar.n + needed, bar.total + needed - settings.budget
    bar.update(spent)
    turns = take_turns(steps, device, settings.budget - spent, after_turn=bar.update)
    bar.update(done - bar.n)
    accelerator.free_memory()
    result |= {"turns": len(turns), "seconds": statistics.median(t["ordinary"] for t in turns)}
    for column in steps:
        base = "ordinary, compiled" if "compiled" in column else "ordinary"
        if column != base:
            quartiles = statistics.quantiles(ratios(turns, column, base), n=4)
            result[column] = [round(value, 5) for value in quartiles]
    return result


def peak_memory(settings: Bench) -> pd.DataFrame:
    """Return what each arm adds to the peak memory of a 7 × 7 stem of stride 2 at 224 × 224 pixels.

    Each number is of a process of its own: on a CPU its highest resident memory, as Linux notes it.
    """
    lines = []
    for batch in MEMORY_BATCHES:
        peaks = {}
        for arm in arms():
            try:
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    peaks[arm] = pool.submit(_peak, arm, batch, settings.device).result()
            except BrokenProcessPool as error:
                raise StudyError(f"{arm} took too much memory: pass --no-memory") from error
        first = peaks.pop("ordinary")
        more = {arm: f"{peak - first:+.0f} MiB" for arm, peak in peaks.items()}
        lines.append({"batch": str(batch), "ordinary": f"{first:.0f} MiB", **more})
    return pd.DataFrame(lines)


def _peak(arm: str, batch: int, device: str) -> float:
    torch.set_num_threads(1)
    stem = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
    model = ARMS[arm](nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(device))
    for count in (1, batch):  # what an arm imports is no part of its step
        model(torch.randn(count, 3, 224, 224, device=device)).sum().backward()
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text() if status.exists() else "")
    return int(found[1]) / 1024 if found else float("nan")


def write(
    results: list[dict[str, Any]], settings: Bench, memory: pd.DataFrame | None = None
) -> str:
    """Write ``bench.json`` and ``bench.md``; return the latter's tables."""
    columns = [*arms()[1:], *(["tract_hub, compiled"] if settings.compiled else [])]
    lines = [
        {
            "case": result["case"],
            "batch": str(result["batch"]),
            "ordinary step": f"{1000 * result['seconds']:,.1f} ms",
            **{name: added(result[name]) if name in result else "cannot run" for name in columns},
            "turns": str(result["turns"]),
        }
        for result in results
    ]
    text = (
        "Added to a step (forward and backward) of the ordinary model: median of the turns' ratios "
        "(quartiles). Compiled: over the ordinary model compiled.\n\n"
    ) + table.markdown(pd.DataFrame(lines))
    errors = [f"{r['case']}, {arm}: {e}" for r in results for arm, e in r["errors"].items()]
    text += "".join(f"\n{error}\n" for error in errors)
    if memory is not None:
        text += "\nAdded to the peak memory of a 7 × 7 stem of stride 2 at 224 × 224 pixels.\n\n"
        text += table.markdown(memory)
    form = "channels_last" if settings.channels_last else "contiguous"
    head = f"# What TrAct costs\n\n{machine()}; {settings.precision}, {form}.\n\n"
    table.write_atomically(settings.out / "bench.md", head + text)
    content = {"machine": machine(), "cases": results}
    table.write_atomically(settings.out / "bench.json", json.dumps(content, indent=1) + "\n")
    return text
