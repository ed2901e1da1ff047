"""Streams: the same batches whoever prepares them, exact positions, mixtures, evaluation."""

from __future__ import annotations

import pickle
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paperscale.data.loader import OrderedLoader, Workers
from paperscale.errors import UserError
from streams import Pictures, pictures
from tiny import SIZES, write_set


def batches(stream: Pictures) -> list[dict]:
    return list(stream.train_dataloader())


def flat(found: list[dict]) -> list[int]:
    return [sample for batch in found for sample in batch["sample"].tolist()]


@pytest.mark.parametrize("workers", [{"num_threads": 0}, {"num_threads": 3}, {"num_processes": 2}])
def test_batches_do_not_depend_on_who_prepares_them(tiny_shards, workers):
    expected = batches(pictures(tiny_shards, num_threads=1))
    got = batches(pictures(tiny_shards, **workers))
    assert len(got) == len(expected) == 8
    for one, other in zip(got, expected, strict=True):
        assert one["cursor"] == other["cursor"]
        assert all(torch.equal(one[name], other[name]) for name in ("sample", "image", "label"))


@given(st.integers(1, 5), st.integers(0, 3), st.integers(1, 60), st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_ranks_and_threads_give_the_same_global_batches_from_any_step(tiny_shards, world_size, threads, batch, step):
    world_size = min(world_size, batch)
    plain = batches(pictures(tiny_shards, global_batch_size=batch))
    step = min(step, len(plain) - 1)
    consumed = plain[step - 1]["cursor"].consumed if step else 0
    ranks = []
    for rank in range(world_size):
        stream = pictures(tiny_shards, rank, world_size, global_batch_size=batch, num_threads=threads)
        stream.consumed = consumed
        ranks.append(batches(stream))
    for number, expected in enumerate(plain[step:]):
        got = [sample for found in ranks for sample in flat([found[number]]) if found[number]["cursor"].weight]
        assert got == expected["sample"].tolist()


def test_batches_prepared_ahead_are_not_consumed(tiny_shards):
    stream = pictures(tiny_shards, num_threads=2)
    loader = iter(stream.train_dataloader())
    for _ in range(3):
        stream.advance(next(loader)["cursor"])
    assert stream.state_dict()["consumed"] == 96
    rest = pictures(tiny_shards)
    rest.load_state_dict(stream.state_dict())
    assert flat(batches(rest)) == flat(batches(pictures(tiny_shards)))[96:]


def test_validation_visits_every_sample_once_at_any_world_size(tiny_shards):
    for world_size in (1, 3, 7, 16):
        seen, counts = [], set()
        for rank in range(world_size):
            found = list(pictures(tiny_shards, rank, world_size, eval_batch_size=4).val_dataloader())
            seen += flat(found)
            counts.add(len(found))
        assert sorted(seen) == list(range(SIZES["val"]))
        assert len(counts) == 1


def test_a_mixture_of_sets_keeps_its_proportions(tiny_shards, tmp_path):
    other = write_set(tmp_path / "other", shard_samples=20)
    mixed = pictures([tiny_shards, other], weights=[3, 1], global_batch_size=40)
    found = batches(mixed)
    assert len(flat(found)) == 2 * SIZES["train"]
    for batch in found[:-1]:
        assert (batch["sample"] < SIZES["train"]).sum() == 30
    first = [sample for sample in flat(found) if sample < SIZES["train"]]
    assert sorted(first[: SIZES["train"]]) == list(range(SIZES["train"])), "the first set's own epoch comes first"
    assert flat(batches(pictures([tiny_shards, other], weights=[3, 1], global_batch_size=40))) == flat(found)


def test_sets_without_weights_are_one_set(tiny_shards, tmp_path):
    other = write_set(tmp_path / "other", shard_samples=20)
    assert sorted(flat(batches(pictures([tiny_shards, other])))) == list(range(2 * SIZES["train"]))


def test_a_checkpoint_of_other_shards_is_refused(tiny_shards, tmp_path):
    state = pictures(tiny_shards).state_dict()
    other = write_set(tmp_path / "other", shard_samples=20)
    with pytest.raises(UserError, match=r"restore the shards at data\.path or start a new run"):
        pictures(other).load_state_dict(state)
    with pytest.raises(UserError, match=r"made with data\.seed=1, this run has 2.*restore data\.seed"):
        pictures(tiny_shards, seed=2).load_state_dict(state)


def test_a_reader_that_does_not_answer_is_an_error_not_a_hang():
    class Stuck:
        def __init__(self, plan):
            self.parts = [lambda: released.wait(10) if plan else None]

        def finish(self):
            return 1

    class Reader:
        start = Stuck

        def describe(self, plan):
            return f"plan {plan}"

    released = threading.Event()
    loader = iter(OrderedLoader(lambda: [0, 1], Reader(), 2, Workers(threads=1, ahead=1, timeout_s=0.3)))
    assert next(loader) == 1
    started = time.monotonic()
    with pytest.raises(UserError, match=r"no batch for 0\.3 s, while reading plan 1: the file system or server"):
        next(loader)
    assert time.monotonic() - started < 5
    released.set()


def test_a_stream_is_small_to_pickle(tiny_shards):
    stream = pictures(tiny_shards)
    loader = stream.train_dataloader()
    next(iter(loader))
    again = pickle.loads(pickle.dumps(loader.reader))
    plan = next(iter(loader.plans()))
    assert np.array_equal(again.order.take(0, 0, 5).samples, loader.reader.order.take(0, 0, 5).samples)
    assert again.describe(plan) == loader.reader.describe(plan)


def test_options_that_do_not_exist(tiny_shards):
    with pytest.raises(UserError, match=r"data\.on_fault=ignore: choose fail or skip"):
        pictures(tiny_shards, on_fault="ignore")
    with pytest.raises(UserError, match=r"data\.window must be at least 1"):
        pictures(tiny_shards, window=0)
    with pytest.raises(UserError, match="cannot be divided over 64 processes"):
        pictures(tiny_shards, 0, 64).train_dataloader()


def test_a_defect_in_a_users_code_is_not_blamed_on_the_data(tiny_shards):
    class Typo(Pictures):
        def fill(self, shards, batch, row, *rest):
            batch["lable"][row] = 1

    stream = Typo(str(tiny_shards), 32, num_threads=2, on_fault="skip")
    with pytest.raises(KeyError, match="lable"):
        batches(stream)
