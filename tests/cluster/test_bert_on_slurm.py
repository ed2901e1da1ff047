"""BERT's pre-training with ZeRO-2 on two SLURM nodes, preempted, continued on one; and its two phases in a row."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.life import at_least, log
from helpers import losses, trained_samples
from jobs.conftest import callback, ended
from paperscale.cli import main
from paperscale.jobs.drill import preempt
from paperscale.jobs.run import Run, read_json
from paperscale.jobs.submit import Shape, Turn, submit
from paperscale.recipes import RecipeArguments
from tiny_text import write_text

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SMALL = ("model.network.vocab_size=300", "model.network.positions=64", "data.global_batch_size=16", "data.length=48")
SHORT = ("trainer.log_every_n_steps=1", "trainer.val_check_interval=100", "tracking.enabled=false")


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    return write_text(tmp_path / "text", sizes={"train": 400, "val": 12, "test": 12})


def arguments(recipe: str, text: Path, steps: int, *words: str) -> RecipeArguments:
    return RecipeArguments.parse([recipe, f"data={text}", *SMALL, *SHORT, f"trainer.max_steps={steps}", *words])


def test_tiny_with_zero_2_on_two_nodes_preempted_and_resumed_on_one(runs: Path, text: Path):
    slowly = f"trainer.callbacks=[{{class_path: helpers.SampleLog}}, {callback('Slowly', seconds=2)}]"
    words = (slowly, "trainer.strategy=deepspeed_zero2", "trainer.precision=32-true")
    run = submit(arguments("bert-tiny-enwik8", text, 8, *words), Shape("slurm-dev", 2, 1), "tiny", False, "test")
    assert isinstance(run, Run)
    at_least(run, 2)
    assert run.info.nodes == 2
    assert main(["cancel", "tiny", "--save"]) == 0
    ended(run, 120)
    assert main(["resume", "tiny", "--nodes", "1"]) == 0
    assert ended(run, 240) == "finished", log(run)
    first, *_, last = run.attempts()
    assert first.facts["strategy"] == last.facts["strategy"] == "deepspeed_zero2"
    ranks = [read_json(attempt.path / "preflight.json")["ranks"] for attempt in (first, last)]
    assert ranks == [2, 1]
    steps = trained_samples(run)
    assert sorted(steps) == list(range(1, 9))
    assert all(len(samples) == 16 for samples in steps.values())
    assert len({sample for samples in steps.values() for sample in samples}) == 8 * 16, "each sample once"


def test_preempted_by_the_cluster_it_goes_on_by_itself(runs: Path, text: Path):
    slowly = f"trainer.callbacks=[{callback('Slowly', seconds=2)}]"
    words = (slowly, "trainer.strategy=deepspeed_zero2", "trainer.precision=32-true")
    run = submit(arguments("bert-tiny-enwik8", text, 6, *words), Shape("slurm-dev", 2, 1), "tiny", False, "test")
    assert isinstance(run, Run)
    at_least(run, 2)
    preempt(run)
    assert ended(run, 240) == "finished", log(run)
    assert [step for step, _ in losses(run)][-1] == 5


def test_the_second_phase_waits_for_the_first_and_begins_with_its_weights(runs: Path, text: Path):
    small = ("model.network.layers=1", "model.network.hidden=32", "model.network.heads=4", "trainer.precision=32-true")
    small += ("data.micro_batch_size=null", "speed.compile=none", "speed.tf32=null")
    shape = Shape("slurm-dev", 1, 2)
    first = submit(arguments("bert-large-phase1", text, 4, *small), shape, "phase1", False, "test")
    second = submit(
        arguments("bert-large-phase2", text, 3, *small, "init_from=phase1"),
        shape,
        "phase2",
        False,
        "test",
        Turn(after="phase1"),
    )
    assert isinstance(first, Run)
    assert isinstance(second, Run)
    assert f"#SBATCH --dependency=afterok:{first.job}" in second.script.read_text()
    assert ended(second, 240) == "finished", log(second)
    said = (second.attempts()[0].path / "rank-0.log").read_text()
    assert f"tensors from {runs / 'phase1/checkpoints/step-00000004'}" in said
    assert losses(second)[0][1] < losses(first)[0][1]
