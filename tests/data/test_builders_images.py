"""CIFAR and ImageNet from files in the official layout, small ones that are written here."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from paperscale.data.prepare import DATASETS, images, prepare
from paperscale.data.prepare.imagenet import DEVKIT, TRAIN, VAL, read_structs
from paperscale.data.shards import ShardSet
from paperscale.errors import UserError

QUIET = Console(quiet=True)


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def rows_of(folder: Path, split: str) -> list[dict[str, bytes]]:
    shards = ShardSet(folder, split)
    rows = []
    for shard, size in enumerate(shards.sizes):
        for row in range(size):
            sample = {name: bytes(content) for name, content in shards.read(shard, row).items()}
            rows.append({**sample, "__key__": shards.key(shard, row)})
    return rows


# -- CIFAR ---------------------------------------------------------------------------------------------------


def cifar_records(labels: np.ndarray, seed: int) -> tuple[bytes, np.ndarray]:
    pixels = np.random.default_rng(seed).integers(0, 255, (len(labels), 3, 32, 32), dtype=np.uint8)
    records = np.concatenate([labels.astype(np.uint8), pixels.reshape(len(labels), -1)], 1)
    return records.tobytes(), pixels.transpose(0, 2, 3, 1)


@pytest.fixture
def few_held_out(monkeypatch):
    monkeypatch.setattr(images, "HELD_OUT", 5)


def test_cifar10_from_the_binary_version(tmp_path, few_held_out):
    members, pixels = {}, []
    for batch in range(1, 6):
        content, shown = cifar_records(np.full((4, 1), batch), batch)
        members[f"cifar-10-batches-bin/data_batch_{batch}.bin"] = content
        pixels.append(shown)
    members["cifar-10-batches-bin/test_batch.bin"] = cifar_records(np.array([[9], [0]]), 9)[0]
    members["cifar-10-batches-bin/batches.meta.txt"] = b"airplane\nautomobile\n\n"
    archive = tar_of(tmp_path / "cifar-10-binary.tar.gz", members)
    manifest = prepare("cifar10", tmp_path / "set", QUIET, source=[archive])
    train = rows_of(tmp_path / "set", "train")
    assert [row["cls"] for row in train] == [b"1"] * 4 + [b"2"] * 4 + [b"3"] * 4 + [b"4"] * 3
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(train[5]["png"]))), pixels[1][1])
    assert [row["cls"] for row in rows_of(tmp_path / "set", "test")] == [b"9", b"0"]
    assert manifest.classes == ["airplane", "automobile"]
    assert np.allclose(manifest.image["mean"], np.concatenate(pixels)[:15].mean((0, 1, 2)) / 255)
    assert manifest.provenance["sources"][0]["name"] == "cifar-10-binary.tar.gz"
    assert not (tmp_path / "set/scratch").exists()


def test_cifar100_has_classes_and_superclasses(tmp_path, few_held_out):
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    labels = np.array([[19, 99 - n] for n in range(8)])  # superclass, class
    (folder / "train.bin").write_bytes(cifar_records(labels, 1)[0])
    (folder / "test.bin").write_bytes(cifar_records(labels, 2)[0])
    (folder / "fine_label_names.txt").write_text("apple\nbear\n")
    (folder / "coarse_label_names.txt").write_text("fruit\nanimals\n")
    manifest = prepare("cifar100", tmp_path / "set", QUIET, source=[folder])
    rows = rows_of(tmp_path / "set", "test")
    assert [(row["cls"], row["coarse.cls"]) for row in rows] == [(b"%d" % (99 - n), b"19") for n in range(8)]
    assert manifest.classes == ["apple", "bear"]
    assert "fruit, animals" in manifest.schema["coarse.cls"]


def test_cut_off_cifar_is_named(tmp_path):
    (tmp_path / "batches.meta.txt").write_text("airplane")
    for batch in range(1, 6):
        (tmp_path / f"data_batch_{batch}.bin").write_bytes(b"\0" * 3072)
    with pytest.raises(UserError, match=r"data_batch_1\.bin: 3072 bytes are no number of records.*download it again"):
        prepare("cifar10", tmp_path / "set", QUIET, source=[tmp_path])
    (tmp_path / "data_batch_1.bin").write_bytes(b"\x20" * 3073)
    with pytest.raises(UserError, match=r"data_batch_1\.bin: record 0 has class 32 of 10"):
        prepare("cifar10", tmp_path / "set", QUIET, source=[tmp_path])


# -- ImageNet ------------------------------------------------------------------------------------------------


def element(kind: int, body: bytes) -> bytes:
    if len(body) <= 4:
        return struct.pack("<HH", kind, len(body)) + body.ljust(4, b"\0")
    return struct.pack("<II", kind, len(body)) + body + b"\0" * (-len(body) % 8)


def matrix(flags: int, shape: tuple[int, int], name: str, *parts: bytes) -> bytes:
    head = element(6, struct.pack("<II", flags, 0)) + element(5, struct.pack("<ii", *shape))
    return element(14, head + element(1, name.encode()) + b"".join(parts))


def text_matrix(text: str) -> bytes:
    return matrix(4, (1, len(text)), "", element(4, text.encode("utf-16-le")))


def number_matrix(number: float) -> bytes:
    return matrix(6, (1, 1), "", element(2, bytes([int(number)])))


def mat_file(rows: list[tuple[int, str, str, int]]) -> bytes:
    """A meta.mat: MATLAB 5, compressed, with a column vector of structs called ``synsets``."""
    names = b"".join(n.encode().ljust(32, b"\0") for n in ("ILSVRC2012_ID", "WNID", "words", "num_children"))
    cells = [
        cell
        for number, wnid, words, children in rows
        for cell in (number_matrix(number), text_matrix(wnid), text_matrix(words), number_matrix(children))
    ]
    fields = (element(5, struct.pack("<i", 32)), element(1, names))
    packed = zlib.compress(matrix(2, (len(rows), 1), "synsets", *fields, *cells))
    header = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 0x0100) + b"IM"
    return header + struct.pack("<II", 15, len(packed)) + packed


SYNSETS = [(1, "n02000002", "kit fox", 0), (2, "n01000001", "tench, Tinca tinca", 0), (3, "n00000003", "animal", 2)]


def jpg(color: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (color, 0, 0)).save(file, "jpeg")
    return file.getvalue()


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    folder = tmp_path / "official"
    folder.mkdir()
    inner = {}
    for number, wnid in enumerate(("n02000002", "n01000001")):
        members = {f"{wnid}_{i}.JPEG": jpg(100 * number + i) for i in range(3)}
        inner[f"{wnid}.tar"] = tar_of(tmp_path / "inner.tar", members).read_bytes()
    tar_of(folder / TRAIN, inner)
    tar_of(folder / VAL, {f"ILSVRC2012_val_{i:08d}.JPEG": jpg(200 + i) for i in (3, 1, 2)})
    kit = {"meta.mat": mat_file(SYNSETS), "ILSVRC2012_validation_ground_truth.txt": b"2\n1\n1\n"}
    tar_of(folder / DEVKIT, {f"ILSVRC2012_devkit_t12/data/{name}": content for name, content in kit.items()})
    return folder


def test_imagenet_is_read_out_of_its_tars(imagenet, tmp_path):
    manifest = prepare("imagenet", tmp_path / "set", QUIET, source=[imagenet])
    train = {row["__key__"]: row for row in rows_of(tmp_path / "set", "train")}
    assert set(train) == {f"{wnid}_{i}" for wnid in ("n01000001", "n02000002") for i in range(3)}
    assert train["n01000001_2"]["cls"] == b"0"  # WordNet ids in order, whatever their ILSVRC2012_ID
    assert train["n02000002_1"]["cls"] == b"1"
    assert train["n01000001_2"]["jpg"] == jpg(102)
    val = {row["__key__"][-1]: row["cls"] for row in rows_of(tmp_path / "set", "val")}
    assert val == {"1": b"0", "2": b"1", "3": b"1"}
    assert manifest.classes == ["tench, Tinca tinca", "kit fox"]
    assert manifest.provenance["wordnet_ids"] == ["n01000001", "n02000002"]
    assert {source["name"] for source in manifest.provenance["sources"]} == {TRAIN, VAL, DEVKIT}


def test_imagenets_classes_are_mixed(imagenet, tmp_path):
    members = {f"n02000002_{i}.JPEG": b"x" for i in range(50)}
    other = {f"n01000001_{i}.JPEG": b"y" for i in range(50)}
    inner = {
        n: tar_of(tmp_path / "i.tar", m).read_bytes() for n, m in (("n02000002.tar", members), ("n01000001.tar", other))
    }
    tar_of(imagenet / TRAIN, inner)
    prepare("imagenet", tmp_path / "set", QUIET, source=[imagenet])
    labels = [int(row["cls"]) for row in rows_of(tmp_path / "set", "train")]
    assert 10 < sum(labels[:50]) < 40


@pytest.mark.parametrize("cut", [700, 5000])
def test_a_train_tar_that_is_cut_off_is_named(imagenet, tmp_path, cut):
    content = (imagenet / TRAIN).read_bytes()
    (imagenet / TRAIN).write_bytes(content[:cut])
    with pytest.raises(UserError, match=rf"{TRAIN}: damaged at or after byte.*download it again"):
        prepare("imagenet", tmp_path / "set", QUIET, source=[imagenet])


def test_imagenet_of_other_files_is_refused(imagenet, tmp_path):
    tar_of(imagenet / VAL, {"ILSVRC2012_val_00000001.JPEG": b""})
    with pytest.raises(UserError, match=r"1 images, the ground truth .* has 3; name files of one set"):
        prepare("imagenet", tmp_path / "set", QUIET, source=[imagenet])
    tar_of(imagenet / TRAIN, {"n09999999.tar": b""})
    with pytest.raises(UserError, match=r"'n09999999\.tar' is no tar of one of the classes"):
        prepare("imagenet", tmp_path / "set", QUIET, source=[imagenet])
    (imagenet / DEVKIT).unlink()
    with pytest.raises(UserError, match=rf"{DEVKIT} is not in .*; download .* and name it with --source"):
        prepare("imagenet", tmp_path / "set", QUIET, source=[imagenet])


def test_a_matlab_file_of_scipy_is_read(tmp_path):
    scipy = pytest.importorskip("scipy.io")
    rows = np.array([(1.0, "n1", "a, b"), (2.0, "n2", "ü")], [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")])
    for compressed in (False, True):
        scipy.savemat(tmp_path / "m.mat", {"other": 3.0, "synsets": rows}, do_compression=compressed)
        found = read_structs((tmp_path / "m.mat").read_bytes(), "synsets")
        assert found == [{"ILSVRC2012_ID": n, "WNID": w, "words": t} for n, w, t in rows.tolist()]


def test_no_set_of_images_takes_a_tokenizer():
    assert all(not DATASETS[name].tokenizer for name in ("mnist", "cifar10", "imagenet", "grocery"))
