"""The size of a batch is a function of the position, and so is what a run passes over."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paperscale.data.batching import BatchPlan, FixedBatches
from paperscale.data.ramp import RampedBatches, check_ramp
from paperscale.errors import UserError

stages = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 60)), max_size=4)


def ramped(samples: int, stages: list[tuple[int, int]]) -> RampedBatches:
    return RampedBatches(samples, 12, check_ramp(stages, 12))


def steps_of(plan: BatchPlan, epoch: int, rank: int = 0) -> list[tuple[int, int]]:
    """Where each global batch of an epoch begins (as consumed samples) and where the run stands after it."""
    first, found = epoch * len(plan.batches), []
    for piece in plan.pieces(rank, first):
        if piece.last:
            found.append((first + plan.batches.split(epoch, piece.start, piece.stop, 1)[0], piece.consumed))
    return found


def test_a_ramp_is_of_samples():
    batches = ramped(100, [(4, 10), (6, 12)])
    assert [stop - start for start, stop in steps_of(BatchPlan(batches), 0)] == [4, 4, 4, 6, 6, *[12] * 6, 4]
    assert {stop - start for start, stop in steps_of(BatchPlan(batches), 1)} == {12, 4}, "it is over in epoch 1"


@given(st.integers(1, 90), stages, st.integers(0, 2), st.integers(1, 5), st.integers(1, 3))
def test_the_global_batches_are_the_same_at_any_world_size_and_counted(samples, stages, epoch, world_size, accumulate):
    batches = ramped(samples, stages)
    whole = steps_of(BatchPlan(batches), epoch)
    plan = BatchPlan(batches, world_size, accumulate)
    assert plan.steps(epoch) == len(whole)
    ranks = [list(plan.pieces(rank, epoch * samples)) for rank in range(world_size)]
    taken = [0] * len(whole)
    for pieces in ranks:
        assert [piece.consumed for piece in pieces if piece.last] == [stop for _, stop in whole]
        assert len(pieces) == len(whole) * accumulate, "as many forward passes for a small batch as for a large one"
        for number, piece in enumerate(pieces):
            taken[number // accumulate] += piece.stop - piece.start
    assert taken == [stop - start for start, stop in whole]
    assert sum(p.weight for pieces in ranks for p in pieces) == pytest.approx(len(whole) * world_size * accumulate)


@given(st.integers(1, 90), stages, st.integers(0, 2), st.data())
def test_a_resumed_ramp_continues_with_the_next_batch(samples, stages, epoch, data):
    plan = BatchPlan(ramped(samples, stages))
    whole = list(plan.pieces(0, epoch * samples))
    at = data.draw(st.integers(0, len(whole) - 1))
    assert list(plan.pieces(0, whole[at].consumed))[: len(whole) - at - 1] == whole[at + 1 :]


@given(st.integers(1, 90), stages, st.integers(0, 2), st.data())
def test_the_rest_of_the_batches_does_not_change_where_some_are_passed_over(samples, stages, epoch, data):
    batches = ramped(samples, stages)
    whole = steps_of(BatchPlan(batches), epoch)
    cuts = data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, len(whole) - 1)), max_size=3))
    ranges = tuple((whole[min(pair)][0], whole[max(pair)][1]) for pair in cuts)
    left = [step for step in whole if not any(start <= step[0] < stop for start, stop in ranges)]
    plan = BatchPlan(batches, passed_over=ranges)
    assert [start for start, _ in steps_of(plan, epoch)] == [start for start, _ in left]
    assert plan.steps(epoch) == len(left)
    after = [stop for _, stop in steps_of(plan, epoch)]
    assert after[:-1] == [start for start, _ in left[1:]], "the position is already beyond what is passed over"
    for position in after[:-1]:
        assert next(plan.pieces(0, position)).start == position - epoch * samples


def test_without_a_ramp_batches_are_fixed():
    assert RampedBatches(50, 8).steps(3, 0, 50) == FixedBatches(50, 8).steps(3, 0, 50) == 7


@pytest.mark.parametrize("stage", [(16, 100), (0, 100), (4, 0)])
def test_stages_that_do_not_fit(stage):
    with pytest.raises(UserError, match=r"data\.batch_ramp=\[\[.*give pairs of a batch size from 1 to 12 and"):
        check_ramp([stage], 12)
