"""Photographs that are there without a download."""

from __future__ import annotations

import torch
from torch import Tensor


def load_photographs() -> list[Tensor]:
    """Return scikit-learn's two: (3, 427, 640) each, float32 from 0 to 255."""
    from sklearn.datasets import load_sample_images

    return [torch.tensor(image).permute(2, 0, 1).float() for image in load_sample_images().images]
