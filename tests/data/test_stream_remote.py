"""A stream whose shards lie on a server: a real nginx."""

from __future__ import annotations

import shutil

import pytest
import torch

from paperscale.data.shards import ShardSet
from paperscale.errors import UserError
from streams import pictures
from test_remote import nginx  # noqa: F401  a fixture


@pytest.fixture
def url(nginx, own_shards, tmp_path, monkeypatch) -> str:  # noqa: F811
    shutil.copytree(own_shards, nginx.www / "tiny")
    monkeypatch.setenv("PAPERSCALE_CACHE", str(tmp_path / "cache"))
    return nginx.url.rsplit("/", 1)[0] + "/tiny"


def test_batches_are_those_of_the_local_set(url, tiny_shards):
    expected = list(pictures(tiny_shards).train_dataloader())
    stream = pictures(url)
    stream.check()
    got = list(stream.train_dataloader())
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("sample", "image", "label"))
    assert pictures(tiny_shards).state_dict() == pictures(url).state_dict(), "a run may move between them"


def test_a_damaged_cache_heals_itself(url, tiny_shards, tmp_path):
    list(pictures(url).train_dataloader())
    for path in (tmp_path / "cache").rglob("*.cached"):
        with path.open("r+b") as file:
            file.seek(20_000)
            file.write(bytes(500))
    got = [batch["image"] for batch in pictures(url).train_dataloader()]
    expected = [batch["image"] for batch in pictures(tiny_shards).train_dataloader()]
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_a_server_that_is_down_is_not_a_damaged_sample(url, nginx, monkeypatch):  # noqa: F811
    stream = pictures(url, on_fault="skip")
    shards = stream.shards("train")
    shards.tars._retries = 0
    nginx.stop()
    with pytest.raises(UserError, match=r"127\.0\.0\.1"):
        list(stream.train_dataloader())
    assert not stream.faults.times


def test_a_set_that_is_not_there(url):
    with pytest.raises(UserError, match=r"manifest\.json is not there; check data.path"):
        ShardSet(url + "-not", "train")
