"""The mean image of a training split: what is subtracted from each pixel (Krizhevsky et al. 2012, section 2)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from paperscale.data.stream import Batch

_MOST_PIXELS = 60_000 * 64 * 64
BLOCK = 250
"""Samples that are read together."""


def blocks(samples: int, height: int, width: int) -> list[tuple[int, int]]:
    """Return the samples to average over, as ranges: all, or blocks at even distances of what 60,000 of 64 x 64 are."""
    count = -(-samples // BLOCK)
    chosen = min(count, max(1, _MOST_PIXELS // (height * width * BLOCK)))
    starts = [number * count // chosen * BLOCK for number in range(chosen)]
    return [(start, min(start + BLOCK, samples)) for start in starts]


def mean_of(batches: Iterable[Batch]) -> NDArray[np.float32]:
    """Return the mean of uint8 images, in levels of 0 to 255: float32 [channels, height, width]."""
    total, count = torch.zeros((), dtype=torch.int64), 0
    for batch in batches:
        total = total + batch["image"].sum(0, dtype=torch.int64)
        count += len(batch["image"])
    return (total.double() / count).float().contiguous().numpy()


def placed(mean: Tensor, place: Tensor, padding: int) -> Tensor:
    """Return the mean image as each image of a batch was mirrored, padded and cropped.

    Subtracting it from an image that was padded with zeros leaves zeros there, as subtracting it first would.

    Args:
        mean: [C, H, W].
        place: int64 [B, 3]: top and left of the crop in the padded image, and whether the image was mirrored.
        padding: zeros on each side.

    Returns:
        [B, C, H, W].
    """
    height, width = mean.shape[-2:]
    both = F.pad(torch.stack([mean, mean.flip(-1)]), (padding,) * 4)
    rows = place[:, 0, None] + torch.arange(height, device=place.device)
    columns = place[:, 1, None] + torch.arange(width, device=place.device)
    return both.movedim(1, -1)[place[:, 2, None, None], rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
