"""Small PNGs decoded without Pillow are Pillow's, and what is not plain or not whole is left to it."""

from __future__ import annotations

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from paperscale.data import jpeg, png

pytestmark = pytest.mark.skipif(jpeg.backend() != "native", reason=f"no C library: {jpeg.backend()}")

RNG = np.random.default_rng(0)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def written(pixels: np.ndarray, filters: list[int], parts: int = 1, more: bytes = b"") -> bytes:
    """A PNG whose rows carry the numbers of these filters and random bytes behind them."""
    height, width, channels = pixels.shape
    rows = b"".join(bytes([number]) + row.tobytes() for number, row in zip(filters, pixels, strict=True))
    data = zlib.compress(rows)
    cuts = [len(data) * n // parts for n in range(parts + 1)]
    idat = b"".join(chunk(b"IDAT", data[a:b]) for a, b in itertools.pairwise(cuts))
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + idat + chunk(b"IEND", b"")


def noise(height: int, width: int, channels: int) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), np.uint8)


def ours(content: bytes, shape: tuple[int, int, int], flip: bool = False) -> np.ndarray | None:
    out = np.full(shape, 7, np.uint8)
    return out if png.decode_into(content, out, flip, jpeg._load()[0]) else None


def pillows(content: bytes, channels: int) -> np.ndarray:
    image = Image.open(io.BytesIO(content)).convert("L" if channels == 1 else "RGB")
    return np.asarray(image).reshape(image.height, image.width, channels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("flip", [False, True])
def test_every_filter_is_undone_as_pillow_does(channels, flip):
    for _ in range(60):
        height, width = (int(n) for n in RNG.integers(1, 12, 2))
        filters = RNG.integers(0, 5, height).tolist()
        content = written(noise(height, width, channels), filters, parts=int(RNG.integers(1, 4)))
        expected = pillows(content, channels)
        found = ours(content, (height, width, channels), flip)
        assert np.array_equal(found, expected[:, ::-1] if flip else expected)


def test_files_that_pillow_writes_are_read_as_pillow_reads_them():
    ramp = np.add.outer(np.arange(40), np.arange(30)).astype(np.uint8)
    for mode, level in (("L", 0), ("L", 9), ("RGB", 6)):
        file = io.BytesIO()
        text = PngImagePlugin.PngInfo()
        text.add_text("author", "somebody")
        Image.fromarray(ramp).convert(mode).save(file, "png", compress_level=level, pnginfo=text)
        channels = len(mode)
        assert np.array_equal(ours(file.getvalue(), (40, 30, channels)), pillows(file.getvalue(), channels))


def test_grey_fills_three_channels():
    content = written(noise(5, 4, 1), [4] * 5)
    assert np.array_equal(ours(content, (5, 4, 3)), pillows(content, 3))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "I;16"])
def test_other_kinds_are_left_to_pillow(mode):
    image = Image.new("RGB", (4, 4)).convert(mode) if mode != "I;16" else Image.new(mode, (4, 4))
    file = io.BytesIO()
    image.save(file, "png")
    assert ours(file.getvalue(), (4, 4, 3)) is None


def test_what_is_not_plain_or_has_another_size_is_left_to_pillow():
    pixels, filters = noise(4, 4, 3), [0] * 4
    assert ours(written(pixels, filters), (4, 4, 3)) is not None
    assert ours(written(pixels, filters, more=chunk(b"tRNS", bytes(6))), (4, 4, 3)) is None
    assert ours(written(pixels, filters), (4, 5, 3)) is None
    assert ours(written(pixels, filters), (4, 4, 1)) is None, "colours are mixed to grey by Pillow"
    assert ours(written(pixels, [0, 5, 0, 0]), (4, 4, 3)) is None, "no such filter"


def test_no_damage_is_taken_for_a_picture():
    content = written(noise(9, 9, 3), [4] * 9)
    whole = ours(content, (9, 9, 3))
    for cut in range(len(content) - 12):
        assert ours(content[:cut], (9, 9, 3)) is None
    begin = content.index(b"IDAT")
    for at in range(begin, len(content) - 12):
        damaged = bytearray(content)
        damaged[at] ^= 1 << int(RNG.integers(8))
        found = ours(bytes(damaged), (9, 9, 3))
        assert found is None or np.array_equal(found, whole)
