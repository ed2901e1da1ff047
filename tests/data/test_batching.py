"""Batches by tokens, and mixtures of sets: pure functions of the order, like everything that is built on it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paperscale.data.batching import BatchPlan, TokenBatches, cut
from paperscale.data.order import MixedOrder, SampleOrder
from paperscale.errors import UserError

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def lengths_of(samples: np.ndarray) -> np.ndarray:
    """Two sides of unlike lengths, a function of the sample alone."""
    return np.stack([1 + samples * 7 % 23, 1 + samples * 11 % 31], 1)


def token_batches(sizes: list[int], max_tokens: int, window: int) -> TokenBatches:
    order = SampleOrder(sizes, seed=5, window=window)
    return TokenBatches(order, lengths_of, max_tokens, seed=5, window=window)


@given(sizes, st.integers(1, 200), st.integers(1, 64), st.integers(0, 2))
def test_batches_by_tokens_visit_every_sample_once_within_the_budget(sizes, max_tokens, window, epoch):
    batches = token_batches(sizes, max_tokens, window)
    visited, position = [], 0
    while position < len(batches):
        stop = batches.stop(epoch, position)
        samples = batches.take(epoch, position, stop).samples
        assert stop > position
        assert len(samples) == 1 or lengths_of(samples).sum(0).max() <= max_tokens
        assert batches.mass(epoch, position, stop) == lengths_of(samples)[:, 1].sum()
        visited += samples.tolist()
        position = stop
    assert sorted(visited) == list(range(sum(sizes)))


@given(sizes, st.integers(20, 200), st.integers(8, 64), st.integers(1, 5), st.integers(1, 3))
@settings(deadline=None)
def test_batches_by_tokens_are_the_same_at_any_world_size_and_weigh_tokens(
    sizes, max_tokens, window, world_size, accumulate
):
    plans = [BatchPlan(token_batches(sizes, max_tokens, window), w, a) for w, a in ((1, 1), (world_size, accumulate))]
    whole = list(plans[0].pieces(0, 0))
    ranks = [list(plans[1].pieces(rank, 0)) for rank in range(world_size)]
    parts = world_size * accumulate
    for number, step in enumerate(whole):
        pieces = [ranks[rank][number * accumulate + micro] for micro in range(accumulate) for rank in range(world_size)]
        assert pieces[0].start == step.start
        assert pieces[-1].stop == step.stop
        assert [p.consumed for p in pieces[-world_size:]] == [step.consumed] * world_size
        batches = plans[0].batches
        mass = batches.mass(0, step.start, step.stop)
        for piece in pieces:
            assert piece.weight == pytest.approx(batches.mass(0, piece.start, piece.stop) * parts / mass)
    assert len(ranks[0]) == len(whole) * accumulate


@given(sizes, st.integers(20, 200), st.integers(8, 64), st.data())
def test_resuming_among_batches_by_tokens_continues_with_the_next(sizes, max_tokens, window, data):
    whole = list(BatchPlan(token_batches(sizes, max_tokens, window)).pieces(0, 0))
    at = data.draw(st.integers(0, len(whole) - 1))
    rest = list(BatchPlan(token_batches(sizes, max_tokens, window)).pieces(0, whole[at].consumed))
    assert rest[: len(whole) - at - 1] == whole[at + 1 :]


def test_batches_by_tokens_are_full_and_of_like_length():
    """As in translation: the budget is used, and little of a batch is padding."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(3.2, 0.6, (100_000, 1)) * rng.uniform(0.8, 1.25, (100_000, 2)), 1, 256).astype(int)
    batches = TokenBatches(SampleOrder([10_000] * 10, seed=1), lambda samples: lengths[samples], 25_000)
    full, padded, tokens, position = [], 0, 0, 0
    while position < len(batches):
        stop = batches.stop(0, position)
        found = lengths[batches.take(0, position, stop).samples]
        full.append(found.sum(0).max() / 25_000)
        padded += (found.max(0) * len(found)).sum()
        tokens += found.sum()
        position = stop
    assert np.median(full) > 0.97
    assert tokens / padded > 0.85


def test_a_sample_beyond_the_budget_is_a_batch_of_its_own():
    assert cut(np.array([[3], [50], [4], [4]]), 10).tolist() == [1, 2, 4]


weights = st.lists(st.floats(0.01, 10), min_size=1, max_size=7)


@given(weights, st.integers(0, 10**12))
def test_a_mixture_keeps_its_proportions_at_every_position(weights, position):
    order = MixedOrder([SampleOrder([5])] * len(weights), weights)
    counts = order.counts(np.arange(position, position + 300))
    assert (counts.sum(0) == np.arange(position, position + 300)).all()
    assert np.isin(np.diff(counts), (0, 1)).all(), "each position takes from one set"
    exact = np.outer(weights, np.arange(position, position + 300)) / sum(weights)
    rounding = max(1, int(np.ceil(np.log2(len(weights) + 1))))
    assert np.abs(counts - exact).max() <= rounding + position * 1e-12


def test_a_mixture_of_three_to_one_is_exact():
    order = MixedOrder([SampleOrder([10, 10]), SampleOrder([50])], [3, 1])
    assert order.counts(np.arange(0, 400, 4)).tolist() == [list(range(0, 300, 3)), list(range(100))]


@given(st.lists(sizes, min_size=1, max_size=4), st.data())
@settings(deadline=None)
def test_each_set_of_a_mixture_has_epochs_of_its_own(sets, data):
    orders = [SampleOrder(sizes, seed=3, window=16) for sizes in sets]
    weights = [data.draw(st.floats(0.1, 5)) for _ in sets]
    order = MixedOrder(orders, weights, samples=100)
    offsets = np.cumsum([0, *map(len, orders)])
    seen: list[list[tuple[int, int]]] = [[] for _ in sets]
    for epoch in range(4):
        for start in range(0, 100, 33):  # cut anywhere: the sequence is the same
            taken = order.take(epoch, start, start + 33)
            for sample, own_epoch in zip(*taken, strict=True):
                number = int(np.searchsorted(offsets, sample, side="right")) - 1
                seen[number].append((int(own_epoch), int(sample - offsets[number])))
    for number, one in enumerate(orders):
        expected = (
            [(e, s) for e in range(seen[number][-1][0] + 1) for s in one.samples(e, 0, len(one)).tolist()]
            if seen[number]
            else []
        )
        assert seen[number] == expected[: len(seen[number])]


def test_weights_that_do_not_fit():
    with pytest.raises(UserError, match=r"data\.weights=\[1, 0\]: give one positive number for each of 2 sets"):
        MixedOrder([SampleOrder([5])] * 2, [1, 0])
