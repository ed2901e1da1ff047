"""What is done with a sample, the same for every peer: touch it, decode it, or only note that it came."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

SIZE = 224
_PAGE = 4096
_SCALE, _RATIO, _TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10

Batch = tuple[Any, Any]
"""Sample numbers, where the peer tells them, and what was made of the samples; both have the batch's length."""


@dataclass(frozen=True)
class View:
    """How a set is read.

    Attributes:
        work: ``raw``, ``decode``, ``tokens`` or ``identities``.
        kind: the set: ``images``, ``tokens`` or ``million``.
        batch_size: samples of a batch on one rank.
        workers: worker processes or threads; 0 reads where the batch is asked for.
        seed: fixes the order.
        rank: this rank.
        world: number of ranks.
    """

    work: str
    kind: str
    batch_size: int = 64
    workers: int = 0
    seed: int = 0
    rank: int = 0
    world: int = 1

    @property
    def persistent(self) -> bool:
        """Return whether worker processes live on from pass to pass, as in a long training."""
        return self.workers > 0 and self.work != "identities"

    def loading(self) -> dict[str, Any]:
        """Return the arguments of torch's ``DataLoader``, and of those that are made after it."""
        return {
            "batch_size": self.batch_size,
            "num_workers": self.workers,
            "collate_fn": collate,
            "persistent_workers": self.persistent,
        }


def touch(content: Any) -> int:
    """Read a byte of every page of a bytes-like object, so that it is in memory for certain."""
    return int(np.frombuffer(content, np.uint8)[::_PAGE].sum())


def random_box(height: int, width: int) -> tuple[int, int, int, int]:
    """Return top, left, height and width of a random crop (Szegedy et al. 2014, section 6)."""
    draw = np.random.uniform
    for _ in range(_TRIES):
        area = height * width * draw(*_SCALE)
        ratio = np.exp(draw(np.log(_RATIO[0]), np.log(_RATIO[1])))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            return np.random.randint(0, height - h + 1), np.random.randint(0, width - w + 1), h, w
    w, h = min(width, round(height * _RATIO[1])), min(height, round(width / _RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def decode_rgb(content: Any) -> np.ndarray[Any, Any]:
    """Return uint8 [height, width, 3], by the fastest decoder that Python code can call."""
    try:
        import simplejpeg
    except ImportError:
        from PIL import Image

        return np.array(Image.open(io.BytesIO(content)).convert("RGB"))
    return simplejpeg.decode_jpeg(content, "RGB")


def decoder_name() -> str:
    """Return what :func:`decode_rgb` uses."""
    try:
        import simplejpeg
    except ImportError:
        return "Pillow"
    return f"simplejpeg {simplejpeg.__version__}" if hasattr(simplejpeg, "__version__") else "simplejpeg"


def resized(pixels: np.ndarray[Any, Any], box: tuple[int, int, int, int], flip: bool) -> Tensor:
    """Return a crop as uint8 [3, 224, 224], by torch's antialiased bilinear filter: Pillow's picture to one level."""
    top, left, height, width = box
    crop = torch.from_numpy(pixels)[top : top + height, left : left + width].permute(2, 0, 1)[None]
    image = interpolate(crop, (SIZE, SIZE), mode="bilinear", antialias=True)[0]
    return (image.flip(2) if flip else image).contiguous()


def _augmented(content: Any) -> Tensor:
    pixels = decode_rgb(content)
    return resized(pixels, random_box(*pixels.shape[:2]), np.random.random() < 0.5)


def on_image(work: str) -> Callable[[Any, int], tuple[int, Any]]:
    """Return what ``work`` makes of an image file's content and its number."""
    return {"raw": _raw, "decode": _decoded, "identities": _identity}[work]


def _raw(content: Any, number: int) -> tuple[int, int]:
    return number, touch(content)


def _decoded(content: Any, number: int) -> tuple[int, Tensor]:
    return number, _augmented(content)


def _identity(content: Any, number: int) -> tuple[int, int]:
    return number, 0


def on_tokens(block: Any) -> Tensor:
    """Return a block of uint16 tokens as int64, the type that an embedding takes."""
    return torch.from_numpy(np.asarray(block).astype(np.int64))


def collate(samples: Sequence[Any]) -> Any:
    """Return the batch of samples: of images ``(numbers, payload)``, of tokens int64 [batch, length]."""
    if isinstance(samples[0], Tensor):
        return torch.utils.data.default_collate(list(samples))
    numbers, payload = zip(*samples, strict=True)
    if isinstance(payload[0], Tensor):
        return torch.tensor(numbers), torch.utils.data.default_collate(list(payload))
    return numbers, payload
