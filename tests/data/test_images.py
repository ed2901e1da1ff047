"""ImageShards: the same batches at any thread count, from any position, on any number of ranks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import SIZES, image_of
from paperscale.data import ImageShards
from paperscale.errors import UserError


def module(path, rank=0, world_size=1, **options) -> ImageShards:
    options = {"global_batch_size": 32, "crop_padding": 1, "flip": True, "seed": 5, **options}
    data = ImageShards(str(path), **options)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
    return data


def batches(data: ImageShards, epochs: int = 1) -> list[dict]:
    found = []
    for _ in range(epochs):
        for batch in data.train_dataloader():
            data.consumed = batch["cursor"].consumed
            found.append(batch)
    return found


def same(first: list[dict], second: list[dict]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a[key], b[key]) for a, b in zip(first, second, strict=True) for key in ("image", "label", "sample")
    )


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_batches_do_not_depend_on_the_number_of_threads(tiny_shards, threads):
    alone = batches(module(tiny_shards, num_threads=0), epochs=2)
    assert same(alone, batches(module(tiny_shards, num_threads=threads), epochs=2))


def test_resumable_at_any_batch(tiny_shards):
    whole = batches(module(tiny_shards), epochs=2)
    for cut in range(1, len(whole)):
        resumed = module(tiny_shards)
        resumed.load_state_dict({**resumed.state_dict(), "consumed": whole[cut - 1]["cursor"].consumed})
        assert same(batches(resumed), whole[cut : cut + (8 - cut % 8 if cut % 8 else 8)])


def test_an_epoch_is_every_sample_once_and_the_last_batch_is_short(tiny_shards):
    found = batches(module(tiny_shards))
    assert [len(batch["sample"]) for batch in found] == [32] * 7 + [6]
    assert sorted(torch.cat([batch["sample"] for batch in found]).tolist()) == list(range(SIZES["train"]))
    assert len(module(tiny_shards).train_dataloader()) == 8


@pytest.mark.parametrize(("world_size", "micro"), [(2, None), (3, None), (4, 3), (1, 8)])
def test_every_world_size_gives_the_same_global_batches(tiny_shards, world_size, micro):
    whole = [batch["sample"].tolist() for batch in batches(module(tiny_shards))]
    ranks = [batches(module(tiny_shards, rank, world_size, micro_batch_size=micro)) for rank in range(world_size)]
    got: list[list[int]] = [[]]
    for micro_step in zip(*ranks, strict=True):
        got[-1] += [s for batch in micro_step if batch["cursor"].weight for s in batch["sample"].tolist()]
        if micro_step[0]["cursor"].last:
            got.append([])
    assert got[:-1] == whole
    if micro:
        assert max(len(batch["sample"]) for batch in ranks[0]) <= micro


def test_augmentation_depends_on_seed_epoch_and_sample_alone(tiny_shards):
    def pictures(**options) -> dict[tuple[int, int], bytes]:
        data = module(tiny_shards, **options)
        return {
            ((batch["cursor"].consumed - 1) // SIZES["train"], sample): image.tobytes()
            for batch in batches(data, epochs=2)
            for sample, image in zip(batch["sample"].tolist(), batch["image"].numpy(), strict=True)
        }

    one = pictures()
    assert pictures(global_batch_size=7, num_threads=3) == one
    assert any(one[0, sample] != one[1, sample] for sample in range(SIZES["train"]))
    other_seed = pictures(seed=6)
    assert any(one[0, sample] != other_seed[0, sample] for sample in range(SIZES["train"]))


def test_crops_and_mirrors_are_what_they_say(tiny_shards):
    data = module(tiny_shards)
    seen = set()
    for batch in batches(data):
        for sample, got in zip(batch["sample"].tolist(), batch["image"].numpy(), strict=True):
            image, _ = image_of("train", sample)
            ways = {}
            for flip, source in ((False, image), (True, image[:, ::-1])):
                padded = np.pad(source, 1)
                ways |= {(flip, y, x): padded[y : y + 8, x : x + 8] for y in range(3) for x in range(3)}
            matches = [way for way, picture in ways.items() if np.array_equal(picture, got[0])]
            assert matches
            seen.add(matches[0])
    assert len(seen) == 18, "every crop and both mirrorings occur"


def test_evaluation_visits_every_sample_once_without_augmentation(tiny_shards):
    found = [b for rank in range(3) for b in module(tiny_shards, rank, 3, eval_batch_size=7).val_dataloader()]
    assert torch.cat([b["sample"] for b in found]).tolist() == list(range(SIZES["val"]))
    image, label = image_of("val", 20)
    batch = next(b for b in found if 20 in b["sample"])
    at = batch["sample"].tolist().index(20)
    assert np.array_equal(batch["image"][at, 0].numpy(), image)
    assert batch["label"][at] == label


def test_images_are_normalised_by_the_train_split(tiny_shards):
    data = module(tiny_shards)
    batch = next(iter(data.train_dataloader()))
    normalised = data.on_after_batch_transfer(batch, 0)["image"]
    assert torch.allclose(normalised, (batch["image"].float() / 255 - 0.25) / 0.2, atol=1e-6)


@pytest.mark.parametrize("change", [{"seed": 6}, {"global_batch_size": 16}, {"window": 64}, {"train": "val"}])
def test_a_position_in_another_order_is_refused(tiny_shards, change):
    state = module(tiny_shards).state_dict()
    with pytest.raises(UserError, match="cannot be continued"):
        module(tiny_shards, **change).load_state_dict(state)


def test_more_processes_than_samples_in_a_batch(tiny_shards):
    with pytest.raises(UserError, match="use at most 32 processes"):
        module(tiny_shards).accumulate(33)


def test_an_error_in_a_thread_reaches_the_training(own_shards):
    tar = own_shards / "train-000002.tar"
    tar.write_bytes(tar.read_bytes()[:-600])
    with pytest.raises(UserError, match=r"train-000002\.tar"):
        batches(module(own_shards, num_threads=2))
