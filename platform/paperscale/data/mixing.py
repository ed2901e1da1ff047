"""Mixing the images of a training batch in pairs: mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019).

A pair are two neighbours in the global batch: its samples 0 and 1, 2 and 3, and so on. How it is mixed is drawn from
(seed, epoch, the first one's number), and no pair is divided between ranks or micro-steps: so the mixed global batch is
the same at any world size. The papers mix with a permutation of the batch; in a shuffled order neighbours are one too.

A pair (a, b) is mixed both ways, with one and the same share: a with b's part, b with a's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from paperscale.data.augment import Draws
from paperscale.data.batching import Batches

_WHICH, _PLACE, _BETA = 100, 101, 103  # draws: two of a place, two of a share


@dataclass(frozen=True)
class Mixing:
    """How pairs are mixed: with both, each pair by one of the two, with probability one half.

    Attributes:
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of CutMix; 0 for none.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def __bool__(self) -> bool:
        """Return whether anything is mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def draw(self, draws: Draws, height: int, width: int) -> tuple[float, float, float, float, float]:
        """Return what a pair exchanges, given the draws of its first sample.

        Returns:
            top, left, bottom and right, in pixels, of the part in which the other image shows, and its share there:
            mixup's is 1 - lambda of the whole image, CutMix's is 1 in a box of 1 - lambda of the area.
        """
        if not self.cutmix or (self.mixup and draws(_WHICH) < 0.5):
            return 0, 0, height, width, 1 - symmetric_beta(draws, self.mixup)
        side = math.sqrt(1 - symmetric_beta(draws, self.cutmix))
        half_height, half_width = int(height * side) // 2, int(width * side) // 2
        y, x = draws.integer(_PLACE, height), draws.integer(_PLACE + 1, width)
        top, bottom = max(0, y - half_height), min(height, y + half_height)
        return top, max(0, x - half_width), bottom, min(width, x + half_width), 1


def symmetric_beta(draws: Draws, alpha: float) -> float:
    """Return lambda ~ Beta(alpha, alpha).

    With T of Student's distribution with 2 alpha degrees of freedom, (1 + T / sqrt(2 alpha + T^2)) / 2 is; and T is a
    coordinate of a point whose angle is uniform and whose squared radius is 2 alpha (U^(-1/alpha) - 1) (Bailey 1994).
    Two draws whatever alpha is, none rejected.
    """
    near, angle = draws(_BETA) ** (1 / alpha), 2 * math.pi * draws(_BETA + 1)
    along, across = math.cos(angle), math.sin(angle)
    return (1 + math.sqrt(1 - near) * along / math.sqrt(near * across**2 + along**2)) / 2


def mix(images: Tensor, labels: Tensor, rows: Tensor, exchanged: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mix a batch in pairs.

    Args:
        images: float [B, C, H, W].
        labels: int64 [B].
        rows: int64 [B], each sample's place in its piece of the global batch, rising: one that could not be read is
            missing. Places 2k and 2k + 1 are a pair; one without the other stays as it is.
        exchanged: float32 [B, 5], what :meth:`Mixing.draw` returned, for the first of each pair.

    Returns:
        The mixed images; the labels of the others, int64 [B]; and the share of each image's own label, float32 [B].
    """
    together = (rows[1:] // 2 == rows[:-1] // 2).long()
    step = F.pad(together, (0, 1)) - F.pad(together, (1, 0))  # to the other one: 1, -1, or 0 for none
    here = torch.arange(len(rows), device=rows.device)
    other = here + step
    boxes, strength = exchanged[torch.minimum(here, other)].split((4, 1), 1)
    height, width = images.shape[-2:]
    strength = strength[:, 0] * (step != 0)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / (height * width)
    shown = inside(boxes, height, width) * strength[:, None, None, None]
    return torch.lerp(images, images[other], shown.to(images.dtype)), labels[other], 1 - strength * area


def inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return which pixels of images lie in their boxes.

    Args:
        boxes: [B, 4]: top, left, bottom and right, in whole pixels; the last two are not in the box.
        height: of the images.
        width: of the images.

    Returns:
        bool [B, 1, height, width].
    """
    top, left, bottom, right = boxes[:, None].unbind(2)
    y, x = torch.arange(height, device=boxes.device), torch.arange(width, device=boxes.device)
    rows, columns = (top <= y) & (y < bottom), (left <= x) & (x < right)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


@dataclass(frozen=True)
class PairedBatches:
    """Global batches whose pieces begin between pairs.

    Args:
        batches: the global batches.
    """

    batches: Batches

    def __len__(self) -> int:
        """Return the number of samples of an epoch."""
        return len(self.batches)

    def stop(self, epoch: int, position: int) -> int:
        """Return where the global batch ends that begins at ``position``."""
        return self.batches.stop(epoch, position)

    def split(self, epoch: int, start: int, stop: int, parts: int) -> list[int]:
        """Return pieces whose numbers of pairs differ by at most one; an odd last sample is a pair by itself."""
        pairs = -(-(stop - start) // 2)
        return [min(start + 2 * (pairs * part // parts), stop) for part in range(parts + 1)]

    def mass(self, epoch: int, start: int, stop: int) -> int:
        """Return the number of samples."""
        return self.batches.mass(epoch, start, stop)

    def steps(self, epoch: int, start: int, stop: int) -> int | None:
        """Return the number of global batches from ``start``, where one begins, to ``stop``, where one ends."""
        return self.batches.steps(epoch, start, stop)
