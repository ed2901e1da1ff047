"""mixup and CutMix: neighbours in the global batch are mixed, the same way on any number of ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from paperscale.data import ImageShards
from paperscale.data.augment import Draws
from paperscale.data.batching import BatchPlan, FixedBatches
from paperscale.data.mixing import Mixing, PairedBatches, mix, symmetric_beta
from paperscale.errors import UserError
from streams import Places
from tiny import SIZES

BOTH = {"mixup": 0.2, "cutmix": 1.0}


def module(path, rank: int = 0, world_size: int = 1, **options) -> ImageShards:
    data = ImageShards(str(path), **{"global_batch_size": 32, "flip": True, "seed": 5, **BOTH, **options})
    data.trainer = Places(rank, world_size)
    return data


def mixed_epoch(path, world_size: int = 1, consumed: int = 0, **options) -> dict[int, tuple]:
    """What the model is given of each sample: its image, both labels and the share of its own."""
    found = {}
    for rank in range(world_size):
        data = module(path, rank, world_size, **options)
        data.consumed = consumed
        for batch in data.train_dataloader():
            if batch["cursor"].weight:
                ready = data.on_after_batch_transfer(batch, 0)
                rows = zip(*(ready[name] for name in ("image", "label", "other_label", "share")), strict=True)
                for sample, row in zip(ready["sample"].tolist(), rows, strict=True):
                    assert sample not in found
                    found[sample] = tuple(value.numpy().tobytes() for value in row)
    return found


@pytest.mark.parametrize(("world_size", "micro"), [(2, None), (3, None), (4, None), (2, 6), (1, 2)])
def test_the_mixed_global_batches_are_the_same_at_any_number_of_ranks(tiny_shards, world_size, micro):
    alone = mixed_epoch(tiny_shards)
    assert len(alone) == SIZES["train"]
    assert mixed_epoch(tiny_shards, world_size, micro_batch_size=micro) == alone


def test_the_mixed_global_batches_are_the_same_after_a_resume_in_mid_epoch_on_other_ranks(tiny_shards):
    alone = mixed_epoch(tiny_shards)
    resumed = mixed_epoch(tiny_shards, world_size=2, consumed=5 * 32)
    assert len(resumed) == SIZES["train"] - 5 * 32
    assert resumed.items() <= alone.items()


def test_a_pair_is_mixed_both_ways_and_an_odd_last_sample_stays_as_it_is(tiny_shards):
    data = module(tiny_shards, global_batch_size=46, train="train+val", window=1 << 10, batch_ramp=[(45, 45)])
    batch = next(iter(data.train_dataloader()))
    assert len(batch["label"]) == 45
    plain = module(tiny_shards, mixup=0, cutmix=0).on_after_batch_transfer({"image": batch["image"]}, 0)["image"]
    ready = data.on_after_batch_transfer(batch, 0)
    assert set(ready) == {"image", "label", "sample", "cursor", "other_label", "share"}
    mixups = 0
    for first in range(0, 44, 2):
        sample = int(batch["sample"][first])
        top, left, bottom, right, strength = Mixing(**BOTH).draw(Draws(5, 0, sample), 8, 8)
        mixups += strength < 1
        for own, other in ((first, first + 1), (first + 1, first)):
            expected = plain[own].clone()
            box = expected[:, top:bottom, left:right]
            box += strength * (plain[other][:, top:bottom, left:right] - box)
            assert torch.allclose(ready["image"][own], expected, atol=1e-5)
            share = 1 - strength * (bottom - top) * (right - left) / 64
            assert float(ready["share"][own]) == pytest.approx(share, abs=1e-6)
            assert ready["other_label"][own] == batch["label"][other]
    assert 3 < mixups < 19, "both ways occur"
    assert torch.equal(ready["image"][44], plain[44])
    assert (ready["share"][44], ready["other_label"][44]) == (1, batch["label"][44])


def test_a_sample_whose_neighbour_could_not_be_read_stays_as_it_is_and_the_other_pairs_do_not_shift():
    images, labels, rows = torch.rand(6, 3, 4, 4), torch.arange(6), torch.arange(6)
    how = torch.tensor([[0, 0, 4, 4, 0.25], [0, 0, 0, 0, 0.0]]).repeat(3, 1)
    whole = mix(images, labels, rows, how)
    kept = torch.tensor([0, 1, 3, 4, 5])  # 2 is missing
    part = mix(images[kept], labels[kept], rows[kept], how[kept])
    for all_of, some in zip(whole, part, strict=True):
        assert torch.equal(some[[0, 1, 3, 4]], all_of[[0, 1, 4, 5]])
    assert torch.equal(part[0][2], images[3])
    assert (part[1][2], part[2][2]) == (3, 1)


def test_mixed_batches_stay_channels_last_in_memory(tiny_shards):
    data = module(tiny_shards, erase=0.5)
    ready = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert ready["image"].is_contiguous(memory_format=torch.channels_last)


def test_validation_is_not_mixed(tiny_shards):
    data = module(tiny_shards, erase=1.0)
    ready = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    assert set(ready) == {"image", "label", "sample"}


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_shares_are_beta_distributed(alpha):
    """Beta(a, a) has mean 1/2, variance 1 / (8 a + 4) and fourth moment 3 / (16 (2 a + 1) (2 a + 3)) about the mean."""
    draws = np.array([symmetric_beta(Draws(1, 0, sample), alpha) for sample in range(20_000)]) - 0.5
    assert abs(draws.mean()) < 0.01
    assert draws.var() == pytest.approx(1 / (8 * alpha + 4), rel=0.03)
    assert (draws**4).mean() == pytest.approx(3 / (16 * (2 * alpha + 1) * (2 * alpha + 3)), rel=0.05)


def test_cutmix_boxes_have_the_area_that_is_drawn_unless_the_border_cuts_them():
    boxes = [Mixing(cutmix=1.0).draw(Draws(2, 0, sample), 224, 176) for sample in range(2000)]
    inner = [(sample, box) for sample, box in enumerate(boxes) if box[0] > 0 < box[1] and box[2] < 224 and box[3] < 176]
    assert len(inner) > 100
    for sample, (top, left, bottom, right, strength) in inner:
        side = math.sqrt(1 - symmetric_beta(Draws(2, 0, sample), 1.0))
        assert 224 * side - 2 <= bottom - top <= 224 * side
        assert 176 * side - 2 <= right - left <= 176 * side
        assert strength == 1
    assert all(0 <= box[0] <= box[2] <= 224 and 0 <= box[1] <= box[3] <= 176 for box in boxes)


@pytest.mark.parametrize("size", [1, 2, 5, 30, 31])
@pytest.mark.parametrize("parts", [1, 2, 7, 16])
def test_no_pair_is_divided_and_pieces_differ_by_at_most_a_pair(size, parts):
    batches = PairedBatches(FixedBatches(7 + size, 7))
    bounds = batches.split(0, 7, 7 + size, parts)
    assert (bounds[0], bounds[-1]) == (7, 7 + size)
    assert all((bound - 7) % 2 == 0 for bound in bounds[:-1] if bound != bounds[-1])
    pieces = np.diff(bounds)
    assert pieces.max() - pieces.min() <= 2
    weights = [
        p.weight
        for rank in range(parts)
        for p in BatchPlan(PairedBatches(FixedBatches(size, size)), parts).pieces(rank, 0)
    ]
    assert sum(weights) == pytest.approx(parts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup": -0.1}, r"data\.mixup=-0\.1: give an alpha above 0, for example 0\.2, or 0 for none"),
        ({"label": None}, r"mix labels too: name their field with data\.label"),
        ({"global_batch_size": 33}, r"data\.global_batch_size=33 is odd.*make it even, for example 34"),
        ({"micro_batch_size": 5}, r"data\.micro_batch_size=5 is odd.*make it even, for example 6"),
    ],
)
def test_what_cannot_be_mixed_in_pairs_is_refused(tiny_shards, options, message):
    with pytest.raises(UserError, match=message):
        module(tiny_shards, **options)


def test_a_forward_pass_is_of_a_pair_at_least(tiny_shards):
    data = module(tiny_shards)
    with pytest.raises(UserError, match="use at most 16 processes or a larger"):
        data.accumulate(17)
    assert data.halved(1) == {"micro_batch_size": 16}
    assert module(tiny_shards, micro_batch_size=6).halved(1) == {"micro_batch_size": 4}
    assert data.halved(16) is None
