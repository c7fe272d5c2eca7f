"""Random augmentation that depends on seed, epoch and image alone, for whole batches at once."""

from __future__ import annotations

import torch
from torch import Tensor

SEED_STEP = 1_000_003


class CropFlip:
    """A random crop after zero-padding by an eighth of the side, and a flip of every second image.

    All of an epoch is drawn at once, an entry an image, so an image is cut alike in every arm and
    for any number of reading processes; cutting a batch is one indexing on the batch's device.

    Args:
        count: images in the data set.
        size: their side in pixels.
        seed: of the drawing.

    """

    def __init__(self, count: int, size: int, seed: int) -> None:
        self.count, self.size, self.seed = count, size, seed
        self.padding = max(1, size // 8)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw anew, for another epoch."""
        generator = torch.Generator().manual_seed(self.seed * SEED_STEP + epoch)
        places = (self.count, 2)
        self.corners = torch.randint(0, 2 * self.padding + 1, places, generator=generator)
        self.flipped = torch.rand(self.count, generator=generator) < 0.5

    def __call__(self, images: Tensor, indices: list[int]) -> Tensor:
        """Cut images, batch × channels × size × size of any dtype, that have these indices."""
        padded = torch.nn.functional.pad(images, [self.padding] * 4)
        steps = torch.arange(self.size)
        across = torch.where(self.flipped[indices, None], steps.flip(0), steps)
        rows = (self.corners[indices, :1] + steps).to(images.device)
        columns = (self.corners[indices, 1:] + across).to(images.device)
        batch = torch.arange(len(indices), device=images.device)
        # Indices with a slice between them put the sliced dimension, the channels, last.
        cut = padded[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return cut.movedim(-1, 1).contiguous()
