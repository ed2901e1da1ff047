"""Preparing a data set: sources in order, pinned; complete or refused."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import struct
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from paperscale.data import prepare as preparing
from paperscale.data.prepare import DATASETS, IdxImages, parse_idx, prepare
from paperscale.data.shards import ShardSet, verify
from paperscale.data.sources import Package, Web, fetch_first
from paperscale.errors import UserError


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


@pytest.fixture
def server(tmp_path: Path):
    """The files of a data set of 5,200 + 40 images behind a real web server on this machine."""
    folder = tmp_path / "web"
    folder.mkdir()
    rng = np.random.default_rng(0)
    files = {}
    for name, count in (("train", 5200), ("t10k", 40)):
        images = rng.integers(0, 255, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = gzip.compress(idx(array), mtime=0)
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(content)
            files[f"{name}-{kind}-ubyte"] = hashlib.sha256(content).hexdigest()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        yield Web(f"http://127.0.0.1:{service.server_port}", files), folder
        service.shutdown()


@pytest.fixture
def tiny_dataset(server, monkeypatch):
    source, _ = server
    monkeypatch.setitem(DATASETS, "tiny", IdxImages("Tiny", (source,), tuple("0123456789"), "none"))


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


def test_another_set_is_not_overwritten(tiny_dataset, own_shards):
    with pytest.raises(UserError, match="choose another --out"):
        prepare("mnist", own_shards, Console(quiet=True))


def test_unknown_data_set(tmp_path):
    with pytest.raises(UserError, match="did you mean 'mnist'"):
        prepare("mnits", tmp_path, Console(quiet=True))


def test_sources_are_tried_in_order_and_pinned(server):
    source, folder = server
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"something else"))
    said: list[str] = []
    missing = Package(("no-such-client", "get"), "*", "", "", ())
    with pytest.raises(UserError, match=r"no source can be reached.*not the file we know.*is not installed"):
        fetch_first("Tiny", (source, missing), said.append)
    assert said[0].startswith("fetching Tiny from http://127.0.0.1")


def test_a_server_that_is_down_is_passed_over(server):
    source, _ = server
    files, name = fetch_first("Tiny", (Web("http://127.0.0.1:9/none", source.files), source), lambda _: None)
    assert name == source.url
    assert parse_idx(files["t10k-labels-idx1-ubyte"]).tolist() == [n % 10 for n in range(40)]


def test_not_an_idx_file():
    with pytest.raises(UserError, match="not an IDX file"):
        parse_idx(b"<html>not found</html>")
