"""Every block of docs/integration.md runs as it stands, and trains with TrAct."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tract_hub.method.step import ledger

import tract_hub
from tract_hub.method import gate

GUIDE = Path(__file__).parents[2] / "docs" / "integration.md"
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def yours(tmp_path: Path) -> dict[str, Any]:
    """What the guide says is the reader's own."""
    from transformers import TrainingArguments

    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 2
    pairs = torch.utils.data.TensorDataset(images, labels)
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True
    )
    dataset = [
        {"pixel_values": image, "labels": label}
        for image, label in zip(images, labels, strict=True)
    ]
    return {
        "loader": torch.utils.data.DataLoader(pairs, batch_size=4),
        "dataset": dataset,
        "args": args,
    }


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_of_the_guide_trains_with_tract(block: str, yours: dict[str, Any]) -> None:
    assert len(block.splitlines()) <= 12
    divisions: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (gate, ledger):
            divide = module.divide_by_gram
            patch.setattr(
                module,
                "divide_by_gram",
                lambda *given, divide=divide: divisions.append(1) or divide(*given),
            )
        exec(compile(block, str(GUIDE), "exec"), yours)
    assert len(divisions) == 2  # one first layer, two batches
    assert tract_hub.status(yours["model"])


def test_the_guide_has_a_block_for_each_way_in() -> None:
    assert len(BLOCKS) == 5
