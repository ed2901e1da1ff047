"""Decoders alone, on one thread: a crop, resized to 224 and mirrored; and how far the picture is from Pillow's."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from paperscale.bench.peers.base import images
from paperscale.bench.works import SIZE, decode_rgb, random_box, resized

Box = tuple[int, int, int, int]
Picture = NDArray[np.uint8]
Decoder = Callable[[bytes, Box, bool], Picture]
_IMAGES, _COMPARED = 200, 25


def _pillow(content: bytes, box: Box, flip: bool) -> Picture:
    top, left, height, width = box
    corners = (left, top, left + width, top + height)
    image = Image.open(io.BytesIO(content)).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR, corners)
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image)


def _simplejpeg_torch(content: bytes, box: Box, flip: bool) -> Picture:
    return resized(decode_rgb(content), box, flip).numpy().transpose(1, 2, 0)


def _simplejpeg_pillow(content: bytes, box: Box, flip: bool) -> Picture:
    top, left, height, width = box
    crop = Image.fromarray(decode_rgb(content)[top : top + height, left : left + width])
    pixels = np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    return np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels


def _opencv(content: bytes, box: Box, flip: bool) -> Picture:
    import cv2

    top, left, height, width = box
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)[top : top + height, left : left + width]
    pixels = cv2.cvtColor(cv2.resize(pixels, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR), cv2.COLOR_BGR2RGB)
    return np.asarray(cv2.flip(pixels, 1) if flip else pixels)


def _torchvision(content: bytes, box: Box, flip: bool) -> Picture:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    pixels = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
    return resized(pixels.permute(1, 2, 0).numpy(), box, flip).numpy().transpose(1, 2, 0)


def _paperscale(content: bytes, box: Box, flip: bool) -> Picture:
    from paperscale.data.jpeg import decode_into

    out = np.empty((SIZE, SIZE, 3), np.uint8)
    decode_into(content, out, box, flip)
    return out


PEERS: dict[str, Decoder] = {
    "Pillow": _pillow,
    "simplejpeg, torch antialias": _simplejpeg_torch,
    "simplejpeg, Pillow resize": _simplejpeg_pillow,
    "OpenCV, bilinear without antialias": _opencv,
    "torchvision, torch antialias": _torchvision,
}
OURS: dict[str, Decoder] = {"Paperscale": _paperscale}


def measure(source: Path, own: bool, rounds: int) -> dict[str, Any]:
    """Return, for each decoder, its figures by round, or the field ``error``.

    Args:
        source: folder of the samples.
        own: measure Paperscale's decoder instead of the peers'.
        rounds: interleaved rounds over the same crops.
    """
    np.random.seed(0)  # the crops come from NumPy's global generator, as a loader's do
    files = [content for number, content in images(source) if number < _IMAGES]
    crops = [(content, random_box(*_shape(content)), bool(np.random.random() < 0.5)) for content in files]
    found: dict[str, Any] = {}
    for _ in range(rounds):
        for name, decoder in (OURS if own else PEERS).items():
            if "error" not in found.setdefault(name, {"figures": {}}):
                _round(found[name], decoder, crops)
    return found


def _shape(content: bytes) -> tuple[int, int]:
    width, height = Image.open(io.BytesIO(content)).size
    return height, width


def _round(found: dict[str, Any], decoder: Decoder, crops: list[tuple[bytes, Box, bool]]) -> None:
    try:
        distance = np.mean([np.abs(decoder(*crop).astype(int) - _pillow(*crop)).mean() for crop in crops[:_COMPARED]])
        wall, cpu = time.perf_counter(), time.process_time()
        for crop in crops:
            decoder(*crop)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    except (ImportError, RuntimeError, OSError) as error:
        found["error"] = str(error).splitlines()[0]
        return
    values = {"cpu_us": cpu / len(crops) * 1e6, "per_s": len(crops) / wall, "levels_from_pillow": float(distance)}
    for name, value in values.items():
        found["figures"].setdefault(name, []).append(value)
