"""Every block of docs/integration.md runs as it stands, and trains with TrAct."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tract_hub

GUIDE = Path(__file__).parents[2] / "docs" / "integration.md"
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def yours(tmp_path: Path) -> dict[str, Any]:
    """What the guide says is the reader's own."""
    from transformers import TrainingArguments

    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 2
    options = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    return {
        "loader": torch.utils.data.DataLoader(list(zip(images, labels, strict=True)), batch_size=4),
        "dataset": [{"pixel_values": i, "labels": y} for i, y in zip(images, labels, strict=True)],
        "args": TrainingArguments(output_dir=str(tmp_path), max_steps=2, **options),
    }


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_of_the_guide_trains_with_tract(block: str, yours: dict[str, Any]) -> None:
    for package in ("lightning", "fastai"):
        if f"import {package}" in block or f"from {package}" in block:
            pytest.importorskip(package, reason=f"{package} is not installed")
    exec(compile(block, str(GUIDE), "exec"), yours)
    model: nn.Module = yours["model"]
    assert tract_hub.status(model)
    assert all(stem.applied for stem in tract_hub.status(model))
