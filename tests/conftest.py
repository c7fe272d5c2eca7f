"""Settings for every test, and real images from a package that the tests need anyway."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)  # small models: more threads cost more than they bring


@pytest.fixture(scope="session")
def photographs() -> Tensor:
    """Crops of scikit-learn's two photographs: (8, 3, 224, 224), float32 from 0 to 255."""
    from sklearn.datasets import load_sample_images

    images = [torch.tensor(i).permute(2, 0, 1).float() for i in load_sample_images().images]
    corners = [(image, y, x) for image in images for y in (0, 203) for x in (0, 416)]
    return torch.stack([image[:, y : y + 224, x : x + 224] for image, y, x in corners])
