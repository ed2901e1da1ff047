"""``paperscale data verify``: is every byte of a set what was written, and does every sample decode?"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from paperscale.data.faults import RemoteError, SampleFault
from paperscale.data.files import Buffer
from paperscale.data.shards import MANIFEST, Shard, ShardSet, read_manifest
from paperscale.data.tokens import array
from paperscale.errors import UserError

_BLOCK = 8 << 20
_NAMED = 20  # damaged samples that are named, of one shard
_LABELS = ("cls", "cls2", "index", "inx", "id")
IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "tif", "tiff")


@dataclass
class Report:
    """What a verification has found.

    Attributes:
        shards: shards looked at.
        samples: samples in them by the manifest.
        bytes: their bytes.
        decoded: samples that were decoded (``deep``).
        problems: what is wrong, a line each.
    """

    shards: int = 0
    samples: int = 0
    bytes: int = 0
    decoded: int = 0
    problems: list[str] = field(default_factory=list)


def verify(
    path: str | Path, progress: Callable[[int], None] = lambda done: None, *, deep: bool = False, workers: int = 0
) -> Report:
    """Check every shard of a set against its manifest and its index, in parallel.

    Args:
        path: the set: a folder or a URL.
        progress: called with the number of bytes checked after each shard.
        deep: decode every member of every sample too.
        workers: threads; by default one for each core.

    Raises:
        UserError: there is no set, or its manifest is damaged.
    """
    manifest = read_manifest(path)
    report = Report()
    report.problems += _attached(path, manifest.files)
    sets = {split: ShardSet(path, split) for split in manifest.splits}
    work = [(sets[split], number) for split in manifest.splits for number in range(len(sets[split].shards))]

    def check(of: tuple[ShardSet, int]) -> tuple[Shard, list[str], int]:
        shards, number = of
        shard = shards.shards[number]
        try:
            return shard, *_check_shard(shards, number, deep)
        finally:
            progress(shard.bytes)

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for shard, problems, decoded in pool.map(check, work):
            report.shards += 1
            report.samples += shard.samples
            report.bytes += shard.bytes
            report.decoded += decoded
            report.problems += problems
    return report


def _attached(path: str | Path, files: dict[str, str]) -> list[str]:
    from paperscale.data.files import open_folder

    problems = []
    for name, expected in files.items():
        try:
            if hashlib.sha256(open_folder(path).read_file(name)).hexdigest() != expected:
                problems.append(f"{path}/{name}: its content is not what was written (SHA-256 differs)")
        except OSError as error:
            problems.append(f"{path}/{name}: {error.strerror or error}")
    return problems


def _check_shard(shards: ShardSet, number: int, deep: bool) -> tuple[list[str], int]:
    """Return what is wrong with a shard, and how many of its samples were decoded."""
    facts = shards.shards[number]
    tar = shards.tar(number)
    try:
        index, file = shards.opened(number)
        digest, at = hashlib.sha256(), 0
        while block := file.read(at, min(_BLOCK, facts.bytes + 1 - at)):
            digest.update(block)
            at += len(block)
    except RemoteError:
        raise
    except UserError as error:
        return [str(error)], 0
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        return [f"{error.filename or tar} {'is missing' if missing else f'cannot be read: {error.strerror}'}"], 0
    problems, decoded = [], 0
    if digest.hexdigest() != facts.sha256:
        what = f"has {at} bytes, {facts.bytes} were written" if at != facts.bytes else "SHA-256 differs"
        problems.append(f"{tar}: its content is not what was written ({what}; {MANIFEST})")
    if problems or deep:
        damaged = []
        for row in range(len(index)):
            try:
                sample = shards.read(number, row)
                if deep:
                    decode_sample(sample)
                    decoded += 1
            except SampleFault as fault:
                damaged.append(f"{tar}: sample '{fault.key}': {fault.reason}")
            except Exception as error:  # whatever a decoder raises
                damaged.append(f"{tar}: sample '{index.key(row)}' does not decode: {error}")
        problems += damaged[:_NAMED]
        if len(damaged) > _NAMED:
            problems.append(f"{tar}: and {len(damaged) - _NAMED} more damaged samples")
    return problems, decoded


def _label(text: str) -> int | str:
    return int(text) if text.strip().lstrip("-").isdigit() else text


def decode_sample(sample: dict[str, Buffer]) -> dict[str, object]:
    """Decode the members of a sample by their extensions, as WebDataset does; others stay bytes.

    Raises:
        ValueError: one does not decode.
    """
    from webdataset.autodecode import decoders

    from paperscale.data import jpeg

    decoded: dict[str, object] = {}
    for name, content in sample.items():
        extension = name.rpartition(".")[2].lower()
        if extension in IMAGES:
            decoded[name] = jpeg.decode(content)
        elif extension == "npy":
            decoded[name] = array(content)
        elif extension in _LABELS:
            decoded[name] = _label(bytes(content).decode())
        elif extension in decoders and extension not in ("pyd", "pickle", "pkl", "pth"):  # those run code
            try:
                decoded[name] = decoders[extension](bytes(content))
            except Exception as error:
                raise ValueError(f"member '{name}': {type(error).__name__}: {error}") from error
        else:
            decoded[name] = bytes(content)
    return decoded
