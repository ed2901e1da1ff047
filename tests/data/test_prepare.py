"""Preparing a data set: sources in order, pinned; complete or refused."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import pickle
import threading
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from paperscale.cli import main
from paperscale.data.prepare import DATASETS, UNFINISHED, Dataset, describe, images, parse_idx, prepare, to_idx
from paperscale.data.shards import ShardSet
from paperscale.data.sources import Download, Package, SourceArchive, Web, WebArchive, fetch_first, from_tar, from_zip
from paperscale.data.verify import verify
from paperscale.errors import UserError

QUIET = Console(quiet=True)


@pytest.fixture
def server(tmp_path: Path):
    """The files of a data set of 2,100 + 40 images behind a real web server on this machine."""
    folder = tmp_path / "web"
    folder.mkdir()
    rng = np.random.default_rng(0)
    files = {}
    for name, count in (("train", 2100), ("t10k", 40)):
        pixels = rng.integers(0, 255, (count, 28, 28), dtype=np.uint8)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", np.arange(count) % 10)):
            content = to_idx(array)
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(content, 1))
            files[f"{name}-{kind}-ubyte"] = hashlib.sha256(content).hexdigest()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as service:
        threading.Thread(target=service.serve_forever, args=(0.01,), daemon=True).start()
        yield Web(f"http://127.0.0.1:{service.server_port}"), files, folder
        service.shutdown()


@pytest.fixture
def tiny_dataset(server, monkeypatch):
    source, files, _ = server
    monkeypatch.setattr(images, "HELD_OUT", 1900)
    download = Download("Tiny", files, (source,))
    digits = tuple("0123456789")
    monkeypatch.setitem(
        DATASETS, "tiny", Dataset("Tiny", "", "", "none", images.write_idx, (download,), classes=digits)
    )


def test_prepare_writes_verified_splits(tiny_dataset, tmp_path):
    manifest = prepare("tiny", tmp_path / "set", QUIET)
    counts = {split: sum(s.samples for s in shards) for split, shards in manifest.splits.items()}
    assert counts == {"train": 200, "val": 1900, "test": 40}
    assert verify(tmp_path / "set").problems == []
    assert bytes(ShardSet(tmp_path / "set", "train").read(0, 13)["cls"]) == b"3"
    assert manifest.provenance["sources"][0]["from"].startswith("http://127.0.0.1")
    assert not (tmp_path / "set" / UNFINISHED).exists()


def test_a_second_prepare_fetches_nothing(tiny_dataset, tmp_path, monkeypatch):
    prepare("tiny", tmp_path / "set", QUIET)
    monkeypatch.setattr(Download, "fetch", lambda *_: pytest.fail("fetched again"))
    prepare("tiny", tmp_path / "set", QUIET)


def test_a_damaged_set_is_mended(tiny_dataset, tmp_path):
    prepare("tiny", tmp_path / "set", QUIET)
    tar = tmp_path / "set/test-000000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-1000])
    prepare("tiny", tmp_path / "set", QUIET)
    assert tar.read_bytes() == whole


def test_a_full_disk_leaves_what_is_complete_and_goes_on_from_there(tiny_dataset, small_disk, capsys):
    out = small_disk / "set"
    assert main(["data", "prepare", "tiny", "--out", str(out)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"error: {out}/val-000000.tar: No space left on device; free space there and run it again"
    assert sorted(path.name for path in out.iterdir()) == ["train-000000.tar", "train-000000.tar.idx", UNFINISHED]


def test_another_set_is_not_overwritten(tiny_dataset, own_shards):
    with pytest.raises(UserError, match="choose another --out"):
        prepare("mnist", own_shards, QUIET)


def test_other_options_do_not_pass_for_the_same_set(tiny_dataset, tmp_path):
    prepare("tiny", tmp_path / "set", QUIET)
    with pytest.raises(UserError, match="was made with shard_mb 128, not 64; choose another --out"):
        prepare("tiny", tmp_path / "set", QUIET, shard_mb=64)


def test_an_unfinished_set_of_other_options_is_not_gone_on_with(tiny_dataset, tmp_path):
    prepare("tiny", tmp_path / "set", QUIET)
    (tmp_path / "set/manifest.json").unlink()
    (tmp_path / "set" / UNFINISHED).write_text("{}")
    with pytest.raises(UserError, match="unfinished set of other options"):
        prepare("tiny", tmp_path / "set", QUIET)


def test_unknown_data_set(tmp_path):
    with pytest.raises(UserError, match="did you mean 'mnist'"):
        prepare("mnits", tmp_path, QUIET)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mnist", {"source": [Path("x")]}, "mnist is fetched and takes no --source; leave it out"),
        ("mnist", {"tokenizer": "bpe"}, "mnist holds no tokens and takes no --tokenizer; leave it out"),
        ("imagenet", {}, r"imagenet is not fetched \(research use.*download ILSVRC2012_img_train.tar.*--source"),
        ("imagenet", {"source": [Path("/no/such")]}, "--source /no/such: no such file or folder; name ILSVRC2012"),
        ("wikitext-2", {"tokenizer": "bpee"}, "--tokenizer bpee: no such file.*did you mean 'bpe'"),
        ("enwik8", {"tokenizer": "bytes", "vocab_size": 300}, "has its own size; leave it out"),
        ("mnist", {"shard_mb": 0}, "a shard holds 1 megabyte or more"),
    ],
)
def test_an_option_that_means_nothing_to_a_set_is_refused_before_anything_is_fetched(name, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        prepare(name, tmp_path / "set", QUIET, **options)
    assert not (tmp_path / "set").exists()


def test_every_set_says_what_it_is():
    rows = describe()
    assert [row.name for row in rows] == list(DATASETS)
    assert all(row.what and row.size and row.licence for row in rows)
    assert all(row.source for row in rows if not DATASETS[row.name].fetched)


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


def test_an_archive_at_the_authors_address(server):
    source, _, folder = server
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("inside/text.gz", gzip.compress(b"content"))
        archive.writestr("elsewhere/text", b"other")
    pin = {"text": hashlib.sha256(b"content").hexdigest()}
    archives = (WebArchive(f"{source.url}/a.zip", from_zip("inside")),)
    assert fetch_first("A", pin, archives, lambda _: None)[0] == {"text": b"content"}


def test_a_source_archive_is_found_in_the_index_and_nothing_of_it_runs(server, monkeypatch):
    source, _, folder = server
    (folder / "project").mkdir()
    (folder / "project/index.html").write_text('<a href="../files/p-1.tar.gz#sha256=0">p-1.tar.gz</a>')
    (folder / "files").mkdir()
    (folder / "files/p-1.tar.gz").write_bytes(b"archive")
    monkeypatch.setenv("PIP_INDEX_URL", source.url)
    sha256 = hashlib.sha256(b"archive").hexdigest()
    archive = SourceArchive("project", "p-1.tar.gz", sha256, lambda path: {"a": path.read_bytes()})
    assert fetch_first("A", {"a": sha256}, (archive,), lambda _: None)[0] == {"a": b"archive"}
    other = SourceArchive("project", "p-2.tar.gz", sha256, lambda path: {})
    with pytest.raises(UserError, match=r"does not list p-2\.tar\.gz"):
        fetch_first("A", {"a": sha256}, (other,), lambda _: None)


def test_a_package_that_changed_is_not_opened(server, tmp_path):
    _, files, _ = server
    (tmp_path / "p.tgz").write_bytes(b"changed")
    copy = Package("cp", ("cp", str(tmp_path / "p.tgz"), "."), "*.tgz", "0" * 64, lambda _: pytest.fail("opened"))
    with pytest.raises(UserError, match=r"p\.tgz is not the file we know"):
        fetch_first("Tiny", files, (copy,), lambda _: None)


def test_a_pickle_of_anything_but_arrays_is_refused():
    with pytest.raises(pickle.UnpicklingError, match="in a file of arrays"):
        images.ArraysOnly(io.BytesIO(pickle.dumps(print))).load()


@pytest.mark.slow
@pytest.mark.parametrize(("download", "number"), [(images.MNIST, 1), (images.MNIST, 2), (images.FASHION_MNIST, 1)])
def test_every_registry_gives_the_same_files(download, number):
    try:
        found, _ = fetch_first(download.title, download.files, (download.sources[number],), lambda _: None)
    except UserError as error:
        pytest.skip(f"cannot be had here: {error}")
    assert parse_idx(found["train-images-idx3-ubyte"]).shape == (60000, 28, 28)


PUBLISHED = {
    "mnist": {"train": 55000, "val": 5000, "test": 10000},
    "fashion-mnist": {"train": 55000, "val": 5000, "test": 10000},
    "cats-dogs": {"train": 1600, "val": 200, "test": 200},
    "grocery": {"train": 675, "val": 57, "test": 1322},
    "enwik8": {"train": 90_000_000, "val": 5_000_000, "test": 5_000_000},
    "wikitext-2": {"train": 600, "val": 60, "test": 60},
    "imdb": {"train": 20000, "val": 5000, "test": 25000},
    "snli": {"train": 94754, "val": 5136, "test": 9824},
    "en-fr": {"train": 174_123, "val": 1808, "test": 1659},
    "en-de": {},  # a part of it changes with Debian's releases
    "hellaswag": {"train": 39905, "val": 10042},
    "boolq": {"train": 9427, "val": 3270},
    "squad-1000": {"train": 707, "val": 144, "test": 149},
    "rotten-tomatoes": {"train": 6129, "val": 803, "test": 783},
    "sst2-dev": {"val": 872},
    "mrpc-dev": {"val": 408},
    "rte-dev": {"val": 277},
}
"""Samples, articles, reviews or pairs of each split; for enwik8 bytes."""

NEED_PYARROW = ("grocery", "rotten-tomatoes", "sst2-dev", "mrpc-dev", "rte-dev")


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_set_that_is_fetched_has_the_published_number_of_samples(name, tmp_path):
    if name in NEED_PYARROW:
        pytest.importorskip("pyarrow")
    try:
        manifest = prepare(name, tmp_path / "set", QUIET)
    except UserError as error:
        pytest.skip(f"cannot be had here: {error}")
    length = {"enwik8": "tokens"}.get(name, "documents")
    counts = {
        split: sum(shard.lengths[length] if shard.lengths else shard.samples for shard in shards)
        for split, shards in manifest.splits.items()
    }
    assert counts == (PUBLISHED[name] or counts)
    assert set(counts) == set(PUBLISHED[name] or ("train", "val", "test"))
    assert verify(tmp_path / "set").problems == []


@pytest.mark.slow
def test_wikitext_has_the_published_number_of_words(tmp_path):
    try:
        manifest = prepare("wikitext-2", tmp_path / "set", QUIET, tokenizer="words")
    except UserError as error:
        pytest.skip(f"cannot be had here: {error}")
    tokens = {split: shards[0].lengths["tokens"] for split, shards in manifest.splits.items()}
    assert tokens == {"train": 2_088_628, "val": 217_646, "test": 245_569}  # Merity et al. 2016, table 1
    assert manifest.provenance["tokenizer"]["vocab_size"] == 33_278


def test_not_an_idx_file():
    with pytest.raises(UserError, match="not an IDX file"):
        parse_idx(b"<html>not found</html>")
