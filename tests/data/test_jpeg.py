"""Decoding and resizing: Pillow's picture, from the part of the file that the crop needs."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from paperscale.data import jpeg
from paperscale.data.native import build

ROOT = Path(__file__).parents[2]
needs_native = pytest.mark.skipif(jpeg.backend() != "native", reason=f"no C library: {jpeg.backend()}")


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Something like a photo: smooth shades, hard edges, noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    shades = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (height + width)], 2)
    image = Image.fromarray(shades.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        corners = sorted(rng.integers(0, width, 2).tolist()), sorted(rng.integers(0, height, 2).tolist())
        color = tuple(rng.integers(0, 256, 3).tolist())
        draw.ellipse([corners[0][0], corners[1][0], corners[0][1], corners[1][1]], fill=color)
    noisy = np.asarray(image) + rng.normal(0, 8, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "jpeg", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def reference(content: bytes, size: tuple[int, int], box: tuple[float, ...], flip: bool, mode: str = "RGB"):
    """Pillow's picture, horizontally first whatever its version: [height, width, channels]."""
    image = Image.open(io.BytesIO(content))
    image.draft(mode, None)
    image = image.convert(mode)
    (height, width), (top, left, tall, wide) = size, box
    across = image.resize((width, image.height), Image.BILINEAR, (left, 0, left + wide, image.height))
    pixels = np.asarray(across.resize((width, height), Image.BILINEAR, (0, top, width, top + tall)))
    pixels = pixels if pixels.ndim == 3 else pixels[:, :, None]
    return pixels[:, ::-1] if flip else pixels


def decoded(content: bytes, size: tuple[int, int], box=None, flip: bool = False, channels: int = 3, **options):
    out = np.empty((*size, channels), np.uint8)
    jpeg.decode_into(content, out, box, flip, **options)
    return out


KINDS = {
    "4:2:0": {"subsampling": 2},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0, "quality": 98},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_blocks": 7},
    "optimised tables": {"optimize": True, "quality": 40},
}


@needs_native
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_box_of_a_jpeg_is_pillows_picture_to_the_bit(kind, data):
    height, width = data.draw(st.integers(1, 170)), data.draw(st.integers(1, 170))
    content = encoded(photo(height, width, height), **KINDS[kind])
    tall, wide = data.draw(st.floats(0.5, height)), data.draw(st.floats(0.5, width))
    box = (data.draw(st.floats(0, height - tall)), data.draw(st.floats(0, width - wide)), tall, wide)
    if data.draw(st.booleans()):
        box = tuple(int(part) if n < 2 else max(1, int(part)) for n, part in enumerate(box))
    size = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    flip, channels = data.draw(st.booleans()), data.draw(st.sampled_from([1, 3]))
    expected = reference(content, size, box, flip, "RGB" if channels == 3 else "L")
    assert np.array_equal(decoded(content, size, box, flip, channels), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("height", "width"), [(97, 131), (64, 64), (1, 1), (5, 300), (301, 8)])
def test_a_whole_jpeg_is_what_pillow_decodes(kind, height, width):
    image = photo(height, width)
    for content in (encoded(image, **KINDS[kind]), encoded(image.convert("L"), **KINDS[kind])):
        expected = np.asarray(Image.open(io.BytesIO(content)))
        found = jpeg.decode(content)
        assert jpeg.size(content) == (height, width)
        assert found.shape == jpeg.shape(content) == (height, width, 3 if expected.ndim == 3 else 1)
        assert np.array_equal(found.reshape(expected.shape), expected)


@pytest.mark.parametrize("box", [None, (10, 20, 100, 90), (0.5, 7.25, 61.3, 140.9)])
@pytest.mark.parametrize("flip", [False, True])
def test_without_the_c_library_the_picture_is_the_same_to_one_level(box, flip, monkeypatch):
    content = encoded(photo(150, 190))
    here = decoded(content, (64, 48), box, flip)
    monkeypatch.setenv("PAPERSCALE_JPEG", "pillow")
    jpeg._load.cache_clear()
    try:
        assert jpeg.backend().startswith("pillow")
        there = decoded(content, (64, 48), box, flip)
    finally:
        jpeg._load.cache_clear()
    assert np.abs(here.astype(int) - there).max() <= 1


@pytest.mark.parametrize(
    ("kind", "options"), [("png", {}), ("webp", {"lossless": True}), ("gif", {}), ("jpeg", {"mode": "CMYK"})]
)
def test_other_formats_are_cropped_and_resized_alike(kind, options):
    content = encoded(photo(80, 120).convert(options.pop("mode", "RGB")), kind, **options)
    expected = reference(content, (40, 30), (8, 16, 50, 70), True)
    assert np.abs(decoded(content, (40, 30), (8, 16, 50, 70), True).astype(int) - expected).max() <= 1
    assert jpeg.shape(content) == jpeg.decode(content).shape == (80, 120, 3)


def test_grey_files_fill_three_channels_and_colour_files_one():
    grey = decoded(encoded(photo(50, 60).convert("L"), "png"), (50, 60))
    assert np.array_equal(grey[..., 0], grey[..., 1])
    assert np.array_equal(grey[..., 0], grey[..., 2])
    assert decoded(encoded(photo(50, 60), "png"), (50, 60), channels=1).shape == (50, 60, 1)


def test_orientation_in_the_files_header_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert jpeg.size(encoded(photo(40, 90), exif=exif)) == (40, 90)


@needs_native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.95])
def test_a_jpeg_cut_off_is_an_error_that_says_so(kind, keep):
    content = encoded(photo(120, 160), **KINDS[kind])
    cut = content[: int(len(content) * keep)]
    for read in (jpeg.decode, lambda part: decoded(part, (32, 32))):
        with pytest.raises(ValueError, match=r"Premature end|Corrupt JPEG data"):
            read(cut)


@needs_native
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("damage", ["zeros", "flips"])
def test_a_jpeg_damaged_inside_is_an_error_never_grey_pixels(seed, damage):
    content = bytearray(encoded(photo(200, 300, seed)))
    at = len(content) // 3
    if damage == "zeros":
        content[at : at + 1500] = bytes(1500)
    else:
        content[at : at + 400] = bytes(byte ^ 0xA5 for byte in content[at : at + 400])
    with pytest.raises(ValueError, match=r"Corrupt JPEG data|Premature end|Unsupported marker"):
        jpeg.decode(bytes(content))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_damage_ends_the_process(data):
    content = bytearray(encoded(photo(40, 50), **KINDS[data.draw(st.sampled_from(sorted(KINDS)))]))
    for _ in range(data.draw(st.integers(1, 20))):
        content[data.draw(st.integers(2, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(2, len(content))) :]
    for read in (jpeg.decode, jpeg.size, lambda part: decoded(part, (20, 20))):
        with contextlib.suppress(ValueError):
            read(bytes(content))


@needs_native
def test_what_lies_below_the_box_is_not_looked_at():
    content = encoded(photo(200, 100))
    cut = content[: len(content) * 3 // 4]
    assert np.array_equal(decoded(cut, (50, 50), (0, 0, 80, 100)), decoded(content, (50, 50), (0, 0, 80, 100)))


@pytest.mark.parametrize("content", [b"", b"\xff\xd8", b"not an image at all", b"\xff\xd8\xff\xe0" + bytes(50)])
def test_what_is_no_image_is_an_error(content):
    for read in (jpeg.decode, jpeg.size, lambda part: decoded(part, (8, 8))):
        with pytest.raises(ValueError, match=r"."):
            read(content)


@pytest.mark.parametrize("kind", ["jpeg", "png"])
@pytest.mark.parametrize("box", [(0, 0, 41, 50), (-1, 0, 20, 20), (10, 10, 0, 10), (0, 31, 10, 20)])
def test_a_box_outside_the_image_is_refused(kind, box):
    with pytest.raises(ValueError, match=r"the box .* does not lie in the image of 50 x 40 pixels"):
        decoded(encoded(photo(40, 50), kind), (8, 8), box)


def test_memory_of_another_kind_is_refused():
    content = encoded(photo(40, 50))
    for out in (np.empty((8, 8), np.uint8), np.empty((8, 8, 3), np.float32), np.empty((8, 8, 6), np.uint8)[:, :, ::2]):
        with pytest.raises(ValueError, match="C-contiguous uint8"):
            jpeg.decode_into(content, out)


@pytest.mark.parametrize("wrap", [memoryview, bytearray, lambda content: memoryview(bytearray(content))])
def test_content_may_lie_in_any_memory(wrap):
    content = encoded(photo(40, 50))
    assert np.array_equal(decoded(wrap(content), (20, 20)), decoded(content, (20, 20)))


def test_threads_do_not_disturb_each_other():
    contents = [encoded(photo(90 + n, 120, n), subsampling=n % 3, progressive=n % 2 == 0) for n in range(12)]
    alone = [decoded(content, (64, 64), (5, 6, 70, 80)) for content in contents]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda n: decoded(contents[n % 12], (64, 64), (5, 6, 70, 80)), range(240)))
    assert all(np.array_equal(found, alone[n % 12]) for n, found in enumerate(together))


@needs_native
def test_reduction_in_the_decoder_stays_close_and_is_not_done_unasked():
    content = encoded(photo(800, 1000), quality=90)
    exact = decoded(content, (224, 224), (50, 60, 700, 900))
    assert np.array_equal(exact, reference(content, (224, 224), (50, 60, 700, 900), False))
    reduced = decoded(content, (224, 224), (50, 60, 700, 900), max_reduction=8)
    assert 0 < np.abs(exact.astype(int) - reduced).mean() < 2
    small = decoded(content, (400, 400), (50, 60, 700, 750), max_reduction=8)
    assert np.array_equal(small, decoded(content, (400, 400), (50, 60, 700, 750))), "never below the output's size"


@pytest.mark.skipif(build.compiler() is None, reason="no C compiler")
def test_the_library_is_compiled_once_and_kept_by_its_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = build.cached()
    made = first.stat().st_mtime_ns
    assert build.cached() == first
    assert first.stat().st_mtime_ns == made
    assert [path.name for path in first.parent.iterdir()] == [f"{build.identity()}-{build.LIBRARY}"]


@pytest.mark.parametrize("compiler", [None, "no-such-compiler"])
def test_a_wheel_brings_the_library_where_a_compiler_is(compiler, tmp_path):
    if compiler is None and build.compiler() is None:
        pytest.skip("no C compiler")
    environment = {**os.environ, **({"CC": compiler} if compiler else {})}
    words = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(words, check=True, capture_output=True, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    library = "paperscale/data/native/crops.so"
    assert (library in zipfile.ZipFile(wheel).namelist()) == (compiler is None)
    assert wheel.name.endswith("py3-none-any.whl") == (compiler is not None)
    assert "-py3-none-" in wheel.name


def test_without_a_compiler_the_reason_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(OSError, match="no C compiler: install gcc or clang"):
        build.cached()
