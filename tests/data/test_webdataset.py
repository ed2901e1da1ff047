"""A user's own WebDataset pipeline, plugged in where exactness is not needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import webdataset as wds

from paperscale.data import WebDatasetStream
from paperscale.errors import UserError
from streams import Places


def pipeline(split: str, rank: int, world_size: int, seed: int):
    """As a user would write it, with WebDataset's own stages."""
    urls = sorted(str(path) for path in Path(os.environ["TINY"]).glob(f"{split}-*.tar"))[rank::world_size]
    if not urls:
        return []
    data = wds.WebDataset(urls, shardshuffle=False, empty_check=False).shuffle(100, seed=seed).decode("l8")
    return data.to_tuple("png", "cls").batched(16).map(as_batch)


def as_batch(columns):
    images, labels = columns
    return {"image": torch.from_numpy(images)[:, None].float() / 255, "label": torch.as_tensor(labels)}


NAME = "test_webdataset:pipeline"


@pytest.fixture
def stream(tiny_shards, monkeypatch):
    monkeypatch.setenv("TINY", str(tiny_shards))
    return WebDatasetStream(NAME, global_batch_size=16, steps_per_epoch=20, seed=1)


def test_batches_are_the_pipelines(stream):
    found = list(stream.train_dataloader())
    assert len(found) == 20, "15 are in the set: it is begun again"
    assert found[0]["image"].shape == (16, 1, 8, 8)
    assert [batch["cursor"].consumed for batch in found[:3]] == [16, 32, 48]
    assert sum(len(batch["label"]) for batch in stream.val_dataloader()) == 50


def test_it_says_that_it_cannot_be_resumed_exactly(stream, capfd):
    stream.consumed = 48
    state = stream.state_dict()
    stream.load_state_dict(state)
    assert "WARNING data: a WebDataset pipeline cannot continue in the middle of an epoch" in capfd.readouterr().err
    assert len(list(stream.train_dataloader())) == 17


def test_ranks_without_shards_are_told(stream):
    stream.trainer = Places(50, 51)
    with pytest.raises(UserError, match="gives rank 50 of 51 no batch of 'train'; check its split"):
        next(iter(stream.train_dataloader()))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test_webdataset.pipeline", "write package.module:function"),
        ("test_webdatset:pipeline", "No module named 'test_webdatset'"),
        ("test_webdataset:pipline", "no function 'pipline'; did you mean 'pipeline'?"),
    ],
)
def test_names_that_do_not_exist(name, message):
    with pytest.raises(UserError) as error:
        WebDatasetStream(name, 16, 20)
    assert message in str(error.value)


def test_batches_that_do_not_add_up_are_refused(stream):
    stream.trainer = Places(0, 2)
    with pytest.raises(UserError, match=r"data\.global_batch_size=16, but the pipeline's batches of 16 on 2 processes"):
        next(iter(stream.train_dataloader()))


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        (lambda: [], "it is called as function(split, rank, world_size, seed)"),
        (lambda *a: None, "'NoneType' object is not iterable"),
        (lambda *a: [(1, 2)], "gives tuple, not dictionaries of tensors"),
    ],
)
def test_pipelines_of_another_kind_are_refused(stream, pipeline, message):
    stream.pipeline = pipeline
    with pytest.raises(UserError) as error:
        next(iter(stream.train_dataloader()))
    assert message in str(error.value)


def test_it_trains_a_recipe(stream, runs, tiny_recipe):
    from paperscale.cli import main

    recipe = tiny_recipe.with_name("wds.yaml")
    text = tiny_recipe.read_text()
    start, stop = text.index("data:"), text.index("trainer:")
    data = "data:\n  class_path: paperscale.data.WebDatasetStream\n  init_args: "
    data += f"{{pipeline: '{NAME}', global_batch_size: 16, steps_per_epoch: 5, val: null}}\n"
    recipe.write_text(text[:start] + data + text[stop:])
    assert main(["fit", str(recipe), "trainer.max_epochs=2", "tracking.enabled=false"]) == 0
