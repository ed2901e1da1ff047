"""ResNet-152 as its recipe says, for real on two SLURM nodes: small pictures on the CPU, preempted and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.life import at_least, log
from helpers import trained_samples
from jobs.conftest import callback, ended
from paperscale.jobs.drill import preempt
from paperscale.jobs.run import Run
from paperscale.jobs.submit import Shape, submit
from paperscale.recipes import RecipeArguments

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SMALL = ("data.global_batch_size=8", "data.micro_batch_size=null", "data.size=32", "data.jitter=[36,48]")
SHORT = ("data.resize=36", "trainer.max_steps=4", "trainer.log_every_n_steps=1", "tracking.enabled=false")


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_zero1"])
def test_preempted_after_a_step_or_two_it_goes_on_to_the_end(
    strategy: str, runs: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    slowly = f"trainer.callbacks=[{{class_path: helpers.SampleLog}}, {callback('Slowly', seconds=3)}]"
    words = ["resnet152-imagenet", f"data={tiny_shards}", *SMALL, *SHORT, slowly, f"trainer.strategy={strategy}"]
    run = submit(RecipeArguments.parse(words), Shape("slurm-dev", 2, 1), "r152", False, "test")
    assert isinstance(run, Run)
    at_least(run, 1)
    preempt(run)
    assert ended(run, 240) == "finished", log(run)
    first, second = run.attempts()
    assert first.facts["strategy"] == second.facts["strategy"] == strategy
    assert second.facts["resumed_from"] in ("step-00000001", "step-00000002", "step-00000003")
    steps = trained_samples(run)
    assert sorted(steps) == [1, 2, 3, 4]
    assert all(len(samples) == 8 for samples in steps.values())
    assert len({sample for samples in steps.values() for sample in samples}) == 32, "each sample once"
