"""The samples that every peer stores: photographs of ImageNet's sizes, and real text as tokens.

``python -m paperscale.bench.source PHOTOS OUT COUNT`` makes the images from a Parquet file of photographs. The result
is the same for the same versions of Pillow and NumPy.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

VOCABULARY = 1 << 14
_LANDSCAPE = 0.78  # of the photographs; the other side is then near ImageNet's mean of 461 x 382
_LONG = 500
_SUBSAMPLED = 0.75  # of the photographs have 4:2:0 chroma
_NOISE = (2.42, 0.2)  # mean and deviation of the logarithm of the sensor noise's deviation, in levels
_QUALITIES = (90, 95)
_CHUNK = 250

_photos: list[bytes] = []


def picture_size(rng: np.random.Generator) -> tuple[int, int]:
    """Return a width and height as in ImageNet: 500 pixels on the longer side."""
    if rng.random() < _LANDSCAPE:
        return _LONG, int(rng.integers(300, 401))
    return int(rng.integers(280, 376)), _LONG


def photograph(photo: Any, number: int) -> bytes:
    """Return the JPEG of one sample, made from a photograph.

    A crop is resized by Lanczos' filter, its brightness and contrast are changed, and noise as of a sensor is added,
    without which a resized picture would be smoother, and its file smaller, than a photograph's.

    Args:
        photo: a Pillow image.
        number: the sample's number, from which everything random follows.
    """
    from PIL import Image, ImageEnhance

    rng = np.random.default_rng([7, number])
    width, height = picture_size(rng)
    share = rng.uniform(0.6, 1.0)
    scale = min(photo.width / width, photo.height / height) * share
    w, h = width * scale, height * scale
    left, top = rng.uniform(0, photo.width - w), rng.uniform(0, photo.height - h)
    image = photo.resize((width, height), Image.Resampling.LANCZOS, (left, top, left + w, top + h))
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = change(image).enhance(rng.uniform(0.8, 1.2))
    noise = rng.standard_normal((height, width, 3), np.float32) * np.float32(rng.lognormal(*_NOISE))
    pixels = np.clip(np.asarray(image, np.float32) + noise, 0, 255).astype(np.uint8)
    out = io.BytesIO()
    chroma = 2 if rng.random() < _SUBSAMPLED else 0
    quality = int(rng.integers(*_QUALITIES))
    Image.fromarray(pixels).save(out, "JPEG", quality=quality, subsampling=chroma)
    return out.getvalue()


def texture(number: int) -> Any:
    """Return a picture of smooth shapes at several scales, for where no photographs are at hand."""
    from PIL import Image

    rng = np.random.default_rng([11, number])
    picture = np.zeros((384, 384, 3), np.float32)
    for cells in (4, 12, 40, 130):
        grid = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        picture += np.asarray(grid.resize((384, 384), Image.Resampling.BICUBIC), np.float32) / cells**0.5
    picture -= picture.min()
    return Image.fromarray((picture * (255 / picture.max())).astype(np.uint8))


def write_textures(out: Path, count: int) -> None:
    """Write images without photographs: quick, and only for trying the benchmark itself."""
    out.mkdir(parents=True, exist_ok=True)
    pictures = [texture(number) for number in range(8)]
    for number in range(count):
        (out / f"{number:06d}.jpg").write_bytes(photograph(pictures[number % len(pictures)], number))


def _load(photos: list[bytes]) -> None:
    _photos[:] = photos


def _write_chunk(out: Path, start: int, stop: int) -> None:
    from PIL import Image

    for number in range(start, stop):
        photo = Image.open(io.BytesIO(_photos[number % len(_photos)])).convert("RGB")
        (out / f"{number:06d}.jpg").write_bytes(photograph(photo, number))


def write_photographs(parquet: Path, out: Path, count: int) -> None:
    """Write ``count`` images made from the photographs of a Parquet file's column ``image_data``."""
    import pyarrow.parquet

    photos = pyarrow.parquet.read_table(parquet, columns=["image_data"])["image_data"].to_pylist()
    out.mkdir(parents=True, exist_ok=True)
    starts = range(0, count, _CHUNK)
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=_load, initargs=(photos,)) as pool:
        list(pool.map(_write_chunk, [out] * len(starts), starts, [min(s + _CHUNK, count) for s in starts]))


def tokens(text: bytes, count: int) -> NDArray[np.uint16]:
    """Return ``count`` tokens: pairs of 7-bit characters, so that the vocabulary is 16,384; short text is repeated."""
    characters = np.frombuffer(text, np.uint8) & 0x7F
    pairs = characters[: len(characters) // 2 * 2].reshape(-1, 2).astype(np.uint16)
    return np.resize((pairs[:, 0] << 7) | pairs[:, 1], count)


def main(arguments: Sequence[str]) -> None:
    """Make the images."""
    photos, out, count = arguments
    write_photographs(Path(photos), Path(out), int(count))


if __name__ == "__main__":
    main(sys.argv[1:])
