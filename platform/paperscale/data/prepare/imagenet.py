"""ImageNet, ILSVRC 2012 (Russakovsky et al. 2015): the official tars, read where they lie, unpacked nowhere.

``ILSVRC2012_img_train.tar`` holds a tar for each of the 1,000 classes. Files are copied as they are, the one PNG and
the 22 CMYK JPEGs too. Labels are numbered in the order of the WordNet ids, as everybody does.
"""

from __future__ import annotations

import functools
import io
import os
import re
import struct
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paperscale.data.prepare.base import Dataset, Job
from paperscale.data.random import permutation
from paperscale.data.writer import Sample
from paperscale.errors import UserError

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
PUBLISHED = {"train": 1_281_167, "val": 50_000}
_IMAGE = np.dtype([("offset", "<i8"), ("size", "<i4"), ("label", "<i4"), ("key", "S32")])


class Member(NamedTuple):
    """A file inside a tar: where it is, its key and label."""

    tar: str
    offset: int
    size: int
    key: str
    label: int


class Members(Sequence[Member]):
    """The images of a split in an order that mixes the classes.

    Args:
        tar: the outer tar.
        images: where each is, of dtype ``_IMAGE``.
    """

    def __init__(self, tar: Path, images: NDArray[np.void]):
        self.tar, self.images = str(tar), images
        self.order = permutation(len(images), 2012)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: Any) -> Any:
        offset, size, label, key = self.images[self.order[i]].tolist()
        return Member(self.tar, offset, size, key.decode(), label)


def encode(member: Member) -> Sample:
    """Return the sample of an image: its bytes, read from the tar."""
    jpg = os.pread(_opened(member.tar), member.size, member.offset)
    return {"__key__": member.key, "jpg": jpg, "cls": str(member.label).encode()}


@functools.lru_cache(maxsize=4)
def _opened(tar: str) -> int:
    return os.open(tar, os.O_RDONLY)


def write_imagenet(job: Job) -> None:
    """Write train and val: 1,281,167 + 50,000 photos of 1,000 classes."""
    originals = job.originals()
    paths = {split: originals.find(name) for split, name in (("train", TRAIN), ("val", VAL))}
    devkit = originals.find(DEVKIT)
    job.hash(originals.used)
    synsets, val_ids = read_devkit(devkit)
    wnids = sorted(wnid for wnid, _ in synsets.values())
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    words = dict(synsets.values())
    job.writer.classes = [words[wnid] for wnid in wnids]
    job.writer.image = {"channels": 3}
    job.writer.schema = {"jpg": "the photo as published", "cls": "the label's number, in decimal digits"}
    job.note(wordnet_ids=wnids)
    job.say("listing the images of train")
    found = {
        "train": _array(_train_images(paths["train"], label_of)),
        "val": _array(_val_images(paths["val"], [label_of[synsets[i][0]] for i in val_ids])),
    }
    for split, images in found.items():
        if len(images) != PUBLISHED[split]:
            job.say(f"{paths[split]}: {len(images)} images; {PUBLISHED[split]} are published")
        job.write(split, Members(paths[split], images), encode)


def _array(rows: Iterator[tuple[int, int, int, bytes]]) -> NDArray[np.void]:
    return np.fromiter(rows, _IMAGE)


def _train_images(path: Path, label_of: dict[str, int]) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield offset, size, label and key of each image in the tars inside the tar."""
    with path.open("rb") as file:
        for inner in _members(path, file, 0, path.stat().st_size):
            wnid, _, ending = inner.name.rpartition("/")[2].partition(".")
            if ending != "tar" or wnid not in label_of:
                raise UserError(f"{path}: '{inner.name}' is no tar of one of the classes; name the official {TRAIN}")
            for image in _members(path, file, inner.offset_data, inner.size):
                start = inner.offset_data + image.offset_data
                key = image.name.rpartition("/")[2].rpartition(".")[0]
                yield start, image.size, label_of[wnid], key.encode()


def _val_images(path: Path, labels: Sequence[int]) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield offset, size, label and key; image n of val has the n-th label of the ground truth."""
    seen = 0
    with path.open("rb") as file:
        for image in _members(path, file, 0, path.stat().st_size):
            key = image.name.rpartition("/")[2].rpartition(".")[0]
            number = int(match[1]) if (match := re.fullmatch(r"ILSVRC2012_val_(\d{8})", key)) else 0
            if not 1 <= number <= len(labels):
                raise UserError(f"{path}: '{image.name}' has no line in the ground truth; name the official {VAL}")
            seen += 1
            yield image.offset_data, image.size, labels[number - 1], key.encode()
    if seen != len(labels):
        raise UserError(f"{path}: {seen} images, the ground truth in {DEVKIT} has {len(labels)}; name files of one set")


def _members(path: Path, file: BinaryIO, start: int, size: int) -> Iterator[tarfile.TarInfo]:
    """Yield the files of a tar that lies at ``start`` of a file.

    Raises:
        UserError: it is damaged or cut off.
    """
    try:
        with tarfile.open(fileobj=_Section(file, start, size), mode="r:") as tar:
            for info in tar:
                if info.offset_data + info.size > size:
                    raise tarfile.ReadError(f"'{info.name}' is cut off")
                if info.isreg():
                    yield info
    except tarfile.TarError as error:
        raise UserError(f"{path}: damaged at or after byte {start} ({error}); download it again") from error


class _Section(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        self._file, self._start, self._size, self._at = file, start, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        self._file.seek(self._start + self._at)
        content = self._file.read(left if size < 0 else min(size, left))
        self._at += len(content)
        return content


# -- the development kit -------------------------------------------------------------------------------------


def read_devkit(path: Path) -> tuple[dict[int, tuple[str, str]], list[int]]:
    """Return (WordNet id, words) of each of the 1,000 ``ILSVRC2012_ID``, and the id of each image of val.

    Raises:
        UserError: the archive is not the official one.
    """
    names = ("data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt")
    try:
        with tarfile.open(path) as tar:
            found = {name: tar.extractfile(m) for m in tar for name in names if m.name.endswith(name)}
            meta, truth = (file.read() if (file := found.get(name)) else b"" for name in names)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"{path}: damaged archive ({error}); download it again") from error
    if not meta or not truth:
        raise UserError(f"{path}: lacks {' or '.join(names)}; name the official {DEVKIT}")
    try:
        rows = read_structs(meta, "synsets")
        leaves = {int(r["ILSVRC2012_ID"]): (r["WNID"], r["words"]) for r in rows if not int(r["num_children"])}
        ids = [int(line) for line in truth.split()]
    except (ValueError, KeyError, IndexError, struct.error, zlib.error) as error:
        raise UserError(f"{path}: {names[0]} or the ground truth is damaged ({error}); download it again") from error
    if unknown := set(ids) - set(leaves):
        raise UserError(f"{path}: the ground truth names class {min(unknown)}, {names[0]} does not; download it again")
    return leaves, ids


_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_MATRIX, _COMPRESSED, _UTF8, _UTF16 = 14, 15, 16, 17
_STRUCT, _CHAR = 2, 4


def read_structs(content: bytes, name: str) -> list[dict[str, Any]]:
    """Return the rows of a struct array in a MATLAB file, format 5: text as str, numbers as float.

    The format is "MAT-File Format" by The MathWorks, chapter 1: elements of an 8-byte tag (type, bytes), or of a 4-byte
    one with up to 4 bytes of content, each padded to 8 bytes. Only what ``meta.mat`` needs is read.

    Raises:
        ValueError: the file has no such array.
    """
    order = "<" if content[126:128] == b"IM" else ">"
    for kind, body in _elements(content[128:], order):
        if kind == _COMPRESSED:
            kind, body = next(_elements(zlib.decompress(body), order))
        if kind == _MATRIX and isinstance(found := _matrix(body, order, name), list):
            return found
    raise ValueError(f"no struct array '{name}'")


def _elements(content: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 8 <= len(content):
        kind, size = struct.unpack_from(order + "II", content, at)
        if kind >> 16:  # small element: the size is in the tag's upper half
            kind, size = kind & 0xFFFF, kind >> 16
            yield kind, content[at + 4 : at + 4 + size]
            at += 8
            continue
        yield kind, content[at + 8 : at + 8 + size]
        at += 8 + size + (0 if kind == _COMPRESSED else -size % 8)


def _matrix(content: bytes, order: str, name: str = "") -> Any:
    """Return a struct array as rows, text as str, numbers as a float or an array."""
    elements = list(_elements(content, order))
    if len(elements) < 3:
        return None
    kind = struct.unpack_from(order + "I", elements[0][1])[0] & 0xFF
    if name and elements[2][1].decode() != name:
        return None
    if kind == _STRUCT:
        width = struct.unpack(order + "i", elements[3][1])[0]
        fields = [elements[4][1][i : i + width].split(b"\0")[0].decode() for i in range(0, len(elements[4][1]), width)]
        values = [_matrix(body, order) for _, body in elements[5:]]
        return [dict(zip(fields, values[i : i + len(fields)], strict=True)) for i in range(0, len(values), len(fields))]
    if len(elements) < 4:
        return None
    form, body = elements[3]
    if kind == _CHAR:
        narrow = {_UTF8: "utf-8", _UTF16: "utf-16-le" if order == "<" else "utf-16-be", 2: "latin-1", 1: "latin-1"}
        return body.decode(narrow.get(form, "utf-16-le" if order == "<" else "utf-16-be"))
    numbers = np.frombuffer(body, order + _NUMBERS[form]).astype(float)
    return numbers[0] if len(numbers) == 1 else numbers


DATASETS = {
    "imagenet": Dataset(
        "ImageNet, ILSVRC 2012",
        "1,281,167 + 50,000 photos, 1,000 classes",
        "155 GB",
        "research use, by agreement",
        write_imagenet,
        originals=f"{TRAIN}, {VAL} and {DEVKIT} from https://image-net.org/challenges/LSVRC/2012",
        fetched=False,
    ),
}
