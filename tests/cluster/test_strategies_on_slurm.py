"""Every strategy on two real SLURM nodes; preempted under one, continued under another on another number of nodes."""

from __future__ import annotations

import pytest
import torch

from cluster.conftest import NO_WANDB
from cluster.life import at_least, log
from helpers import losses, trained_samples
from jobs.conftest import callback, ended
from paperscale.jobs.drill import preempt
from paperscale.jobs.resume import resume
from paperscale.jobs.status import status
from paperscale.jobs.submit import Shape
from paperscale.jobs.switches import save_and_cancel

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SMALL = ("model={class_path: networks.Small}", "test_after_fit=false", NO_WANDB, "checkpoint.every_n_steps=50")
SLOW = callback("Slowly", seconds=0.6)


def as_close(run, whole) -> None:
    """The losses of every step, and the samples of each, are the other run's."""
    found, expected = dict(losses(run)), dict(losses(whole))
    assert found.keys() == expected.keys()
    for step, value in expected.items():
        torch.testing.assert_close(found[step], value, rtol=0, atol=2e-5, msg=lambda text, s=step: f"step {s}: {text}")
    assert trained_samples(run) == trained_samples(whole)


@pytest.fixture(scope="module")
def kept() -> dict:
    return {}


@pytest.fixture
def whole_ddp(submit, kept):
    if not kept:
        kept["run"] = submit("whole-ddp", *SMALL)
        assert ended(kept["run"]) == "finished", log(kept["run"])
    return kept["run"]


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"])
def test_losses_on_two_nodes_are_those_of_ddp(submit, whole_ddp, strategy):
    run = submit(f"on-{strategy}", *SMALL, f"trainer.strategy={strategy}")
    assert ended(run) == "finished", log(run)
    as_close(run, whole_ddp)


def test_preempted_requeued_and_continued_by_others_on_one_node_and_two(submit, whole_ddp):
    run = submit("moved", *SMALL, "trainer.strategy=deepspeed_zero2", callbacks=(SLOW,))
    at_least(run, 4)
    preempt(run)
    for step, nodes, strategy in ((8, 0, ""), (12, 1, "fsdp"), (16, 2, "deepspeed_zero3")):
        if strategy:
            resume(run, Shape(nodes=nodes), [f"trainer.strategy={strategy}"])
        at_least(run, step)
        save_and_cancel(run, status(run), 60, lambda text: None)
    resume(run, Shape(nodes=1), ["trainer.strategy=ddp"])
    assert ended(run) == "finished", log(run)
    as_close(run, whole_ddp)
    tried = [(attempt.facts["strategy"], attempt.facts["nodes"]) for attempt in run.attempts()]
    assert tried == [
        ("deepspeed_zero2", 2),
        ("deepspeed_zero2", 2),
        ("fsdp", 1),
        ("deepspeed_zero3", 2),
        ("single", 1),
    ]
