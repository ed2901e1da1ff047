"""What one attempt has found out the next one heeds, on several ranks: all decide alike, and none is waited for."""

from __future__ import annotations

import pytest
import torch

from helpers import final_state, trained_samples
from jobs.conftest import ended
from paperscale.errors import FINISHED, OUT_OF_MEMORY, ROLLBACK
from paperscale.jobs.amends import collect

POISON = "{class_path: troubles.Poison, init_args: {at: [360]}}"


@pytest.mark.slow
def test_a_rank_whose_memory_is_short_lets_all_divide_the_batch_further(submit_tiny):
    hungry = "model.network={class_path: troubles.Hungry, init_args: {limit: 8, rank: 1}}"
    run = submit_tiny("hungry", "tracking.enabled=false", hungry)
    assert ended(run) == "finished"
    assert [attempt.exit_code for attempt in run.attempts()] == [OUT_OF_MEMORY, FINISHED]
    first = run.attempts()[0]
    assert first.cause == "out-of-memory"
    assert first.error.startswith("rank 1 on ")
    assert first.error.endswith(
        "out of memory in step 1; goes on with data.micro_batch_size=8 and the same global batches"
    )
    whole = submit_tiny("fits", "tracking.enabled=false", "model.network={class_path: helpers.Linear}")
    assert ended(whole) == "finished"
    states = [final_state(one) for one in (run, whole)]
    assert all(torch.allclose(states[0][name], states[1][name], atol=1e-5) for name in states[0] if "weight" in name)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_what_one_rank_cannot_compute_all_leave_out(submit_tiny, action):
    """The rank that has the sample is not asked: the gradient of all is not finite."""
    run = submit_tiny(action, "tracking.enabled=false", f"guard.non_finite={action}", callbacks=(POISON,))
    assert ended(run) == "finished"
    codes = [attempt.exit_code for attempt in run.attempts()]
    assert codes == ([FINISHED] if action == "skip" else [ROLLBACK, FINISHED])
    assert all(bool(torch.isfinite(value).all()) for value in final_state(run).values())
    assert len(trained_samples(run)) == (24 if action == "skip" else 21)
    assert collect(run)["passed_over"] == ([] if action == "skip" else [(294, 390)])
    assert not (run.path / "stalled").exists() or (run.path / "stalled").read_text() == "0\n"
