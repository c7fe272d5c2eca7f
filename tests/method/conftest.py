"""Real images, from a package that the tests need anyway."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tract_hub.studies.images.photographs import load_photographs


@pytest.fixture(scope="session")
def photographs() -> Tensor:
    """Crops of scikit-learn's two photographs: (8, 3, 224, 224), float32 from 0 to 255."""
    corners = [(image, y, x) for image in load_photographs() for y in (0, 203) for x in (0, 416)]
    return torch.stack([image[:, y : y + 224, x : x + 224] for image, y, x in corners])
