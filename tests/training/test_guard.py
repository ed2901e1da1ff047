"""When training goes wrong: it stops with a reason, or goes on without what it went wrong on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision

from helpers import equal, final_state, losses, rows, trained_samples
from paperscale.errors import FINISHED, OUT_OF_MEMORY, REQUEUE, ROLLBACK, USER_ERROR, UserError
from paperscale.jobs.amends import collect
from paperscale.jobs.report import lines, report
from paperscale.jobs.run import Run
from paperscale.training.callbacks import StreamPosition
from paperscale.training.guard import Guard, GuardOptions, is_out_of_memory
from paperscale.training.recipe import RecipeCLI
from paperscale.training.strategies.single import SingleStrategy
from test_resume import at_step, attempt, new_run, own_signals  # noqa: F401  a fixture
from troubles import Poison, StateLog

BATCH, EPOCH = 32, 230  # eight steps an epoch; checkpoints every five, and at the end of each epoch


def poison(*steps: int, value: str = ".nan") -> str:
    """Spoil the batches of these steps."""
    at = [(step - 1) // 8 * EPOCH + (step - 1) % 8 * BATCH for step in steps]
    return f"trainer.callbacks+={{class_path: troubles.Poison, init_args: {{at: {at}, value: {value}}}}}"


def is_finite(run: Run) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in final_state(run).values())


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_ends_the_run_and_is_never_saved(runs, tiny_recipe, capfd):
    run = new_run("stop", tiny_recipe, poison(13))
    assert attempt(run) == USER_ERROR
    error = capfd.readouterr().err
    assert "step 13: the gradient is not finite, in network.conv1.weight and " in error
    assert "after 358 were consumed)" in error
    assert "nothing after step-00000010 was kept" in error
    assert f"set guard.non_finite to skip or rollback, in {run.recipe}, then `paperscale resume stop`" in error
    assert "Traceback" not in error
    assert sorted(path.name for path in run.checkpoints.glob("step-*")) == ["step-00000008", "step-00000010"]
    run.recipe.write_text(run.recipe.read_text().replace("non_finite: stop", "non_finite: skip"))
    assert attempt(run) == FINISHED, "by doing what the message says"
    assert is_finite(run)


def test_a_skipped_step_changes_nothing_but_the_position(runs, tiny_recipe, capfd):
    words = (poison(3, 13), "guard.non_finite=skip", "trainer.callbacks+={class_path: troubles.StateLog}")
    whole = new_run("skip", tiny_recipe, *words)
    assert attempt(whole) == FINISHED
    states = StateLog.states
    assert equal(states[13], states[12]), "weights, batch normalisation's averages, momenta"
    assert not equal(states[14], states[13])
    assert [row["guard/skipped"] for row in rows(whole) if "guard/skipped" in row] == [1.0] * 10 + [2.0] * 12
    out = capfd.readouterr().out
    assert out.count(": skipped") == 2
    numbers = ", ".join(map(str, trained_samples(whole)[13][:8]))
    assert f"(samples {numbers} and 24 more, after 358 were consumed)" in out
    assert is_finite(whole)
    cut = new_run("skip-cut", tiny_recipe, *words[:2], at_step(7))
    assert attempt(cut) == REQUEUE
    assert attempt(cut) == FINISHED
    assert equal(final_state(cut), final_state(whole))
    assert rows(cut) == rows(whole), "the count goes on"


@pytest.mark.slow
def test_too_many_skipped_steps_end_the_run(runs, tiny_recipe, capfd):
    run = new_run("skips", tiny_recipe, poison(2, 3, 4), "guard.non_finite=skip", "guard.max_skips=2")
    assert attempt(run) == USER_ERROR
    assert "3 of the last 4 steps were skipped; nothing after the start was kept" in capfd.readouterr().err


def test_a_rollback_goes_back_and_passes_over_the_samples_since(runs, tiny_recipe):
    run = new_run("back", tiny_recipe, poison(13), "guard.non_finite=rollback")
    assert [attempt(run), attempt(run)] == [ROLLBACK, FINISHED]
    assert collect(run)["passed_over"] == [(294, 390)], "from the checkpoint to beyond the batch"
    assert run.attempts()[1].facts["resumed_from"] == "step-00000010"
    assert [step for step, _ in losses(run)] == list(range(21)), "the run has three steps less"
    assert is_finite(run)
    assert [row["step"] for row in rows(run) if "val/accuracy" in row] == [7, 12, 20], "each epoch is validated"


@pytest.mark.slow
def test_what_is_passed_over_is_part_of_the_run(runs, tiny_recipe):
    words = (poison(13), "guard.non_finite=rollback")
    run = new_run("back", tiny_recipe, *words)
    assert [attempt(run), attempt(run)] == [ROLLBACK, FINISHED]
    again = new_run("back-cut", tiny_recipe, *words, at_step(11))
    assert [attempt(again) for _ in range(3)] == [REQUEUE, ROLLBACK, FINISHED]
    assert collect(again)["passed_over"] == [(326, 390)], "the checkpoint of the interruption is nearer"
    later = "trainer.callbacks+={class_path: troubles.SignalIn, init_args: {attempt: 2, step: 19}}"
    cut = new_run("back-resumed", tiny_recipe, *words, later)
    assert [attempt(cut) for _ in range(3)] == [ROLLBACK, REQUEUE, FINISHED]
    assert equal(final_state(cut), final_state(run))


@pytest.mark.slow
def test_a_rollback_to_the_step_before_needs_no_new_attempt(runs, tiny_recipe):
    run = new_run("here", tiny_recipe, poison(11), "guard.non_finite=rollback")
    assert attempt(run) == FINISHED
    assert [row["step"] for row in rows(run) if "guard/skipped" in row] == list(range(10, 24))


@pytest.mark.slow
def test_an_epoch_keeps_a_batch_however_far_the_run_goes_back(runs, tiny_recipe):
    """The last batch of an epoch is spoiled, and the last checkpoint is from the epoch before."""
    run = new_run("epoch", tiny_recipe, poison(16), "guard.non_finite=rollback", "checkpoint.every_n_steps=null")
    assert [attempt(run), attempt(run)] == [ROLLBACK, FINISHED]
    assert collect(run)["passed_over"] == [(262, 460)]
    assert [row["step"] for row in rows(run) if "val/accuracy" in row] == [7, 8, 16]
    samples = trained_samples(run)
    assert len(samples) == 8 + 1 + 8


@pytest.mark.slow
def test_a_run_goes_back_so_often_and_no_more(runs, tiny_recipe, capfd):
    run = new_run("often", tiny_recipe, poison(4, 13), "guard.non_finite=rollback", "guard.max_rollbacks=1")
    assert [attempt(run), attempt(run)] == [ROLLBACK, USER_ERROR]
    assert "the run has gone back 1 times" in capfd.readouterr().err


LINEAR = "model.network={class_path: helpers.Linear}"


@pytest.mark.parametrize(
    ("action", "codes"),
    [
        pytest.param("warn", [FINISHED], marks=pytest.mark.slow),
        ("skip", [FINISHED]),
        pytest.param("rollback", [ROLLBACK, FINISHED], marks=pytest.mark.slow),
    ],
)
def test_a_loss_that_jumps(runs, tiny_recipe, capfd, action, codes):
    words = (LINEAR, poison(22, value="100"), "guard.spike=8", f"guard.spike_action={action}")
    run = new_run(action, tiny_recipe, *words, "trainer.callbacks+={class_path: troubles.StateLog}")
    assert [attempt(run) for _ in codes] == codes
    out = capfd.readouterr().out
    assert out.count("step 22: the loss of ") == 1 or action == "rollback"
    assert "deviations above" in out
    assert equal(StateLog.states[22], StateLog.states[21]) == (action == "skip")
    if action == "rollback":
        assert collect(run)["passed_over"] == [(588, 652)]


@pytest.mark.slow
def test_the_norm_of_the_gradient_is_logged_before_clipping(runs, tiny_recipe):
    run = new_run("norm", tiny_recipe, "guard.log_gradient_norm=true", "trainer.gradient_clip_val=0.001")
    assert attempt(run) == FINISHED
    norms = [row["train/gradient_norm"] for row in rows(run) if "train/gradient_norm" in row]
    assert len(norms) == 24
    assert min(norms) > 0.01


def train(recipe: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    """Train a recipe without a run."""
    cli = RecipeCLI([f"--config={recipe}", "--trainer.max_epochs=2"])
    trainer = cli.trainer_for(
        strategy=SingleStrategy(device="cpu"),
        callbacks=[StreamPosition(), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(cli.model, datamodule=cli.datamodule)
    return trainer


@pytest.mark.slow
def test_a_scale_of_fp16_that_settles_is_no_failure(tiny_recipe):
    """The scale begins far too high: the first gradients overflow, and the scaler skips those steps."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    guard = Guard(GuardOptions())
    trainer = train(tiny_recipe, guard, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert 1 < scaler.get_scale() < 2.0**127
    assert trainer.global_step == 16
    assert guard.skipped == 0
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    broken = Poison([32 * step for step in range(1, 7)])
    with pytest.raises(UserError, match="step 5: the gradient is not finite"):  # the scale is 8, 4, 2, 1
        train(tiny_recipe, broken, Guard(GuardOptions()), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])


class Behind(Guard):
    """Looks as on a GPU, where the host is ahead of the device."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._at_once = False


@pytest.mark.parametrize("before_checkpoint", [False, True])
def test_a_look_that_is_put_off_comes_before_the_next_backward_pass_and_before_a_checkpoint(
    tiny_recipe, before_checkpoint
):
    class Steps(Callback):
        backward = 0

        def on_before_backward(self, *args: Any) -> None:
            self.backward += 1

        def on_train_batch_end(self, *args: Any) -> None:
            if before_checkpoint:
                guard.is_healthy()

        def on_before_zero_grad(self, *args: Any) -> None:
            assert not (before_checkpoint and self.backward == 2), "it was found before"

    guard, steps = Behind(GuardOptions()), Steps()
    message = r"step 2: the gradient is not finite, in network\.conv1\.weight and 22 more"
    with pytest.raises(UserError, match=message):
        train(tiny_recipe, Poison([32]), guard, steps)
    assert steps.backward == 2


def test_memory_that_runs_out_halves_the_forward_pass_and_keeps_the_batch(runs, tiny_recipe, capfd):
    """In the sixth step: the rest of the epoch is counted in smaller passes."""
    whole = new_run("fits", tiny_recipe, LINEAR)
    assert attempt(whole) == FINISHED
    run = new_run("hungry", tiny_recipe, "model.network={class_path: troubles.Hungry, init_args: {limit: 8, after: 6}}")
    assert [attempt(run) for _ in range(3)] == [OUT_OF_MEMORY, OUT_OF_MEMORY, FINISHED]
    assert collect(run)["data"] == {"micro_batch_size": 8}
    assert "out of memory in step 7; goes on with data.micro_batch_size=16 and the same" in capfd.readouterr().out
    assert [one.facts["resumed_from"] for one in run.attempts()] == [None, "step-00000005", "step-00000008"]
    first, second = final_state(run), final_state(whole)
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first if "weight" in name)
    assert first["schedule"] == second["schedule"] == 24
    any_epoch = [row["step"] for row in rows(run) if "val/accuracy" in row]
    assert any_epoch == [7, 15, 23]


@pytest.mark.slow
def test_memory_that_is_not_enough_for_one_sample_is_told(runs, tiny_recipe, capfd):
    hungry = "model.network={class_path: troubles.Hungry, init_args: {limit: 0}}"
    run = new_run("starved", tiny_recipe, hungry, "data.micro_batch_size=1")
    assert attempt(run) == USER_ERROR
    assert "out of memory in step 1 with one sample a forward pass" in capfd.readouterr().err
    off = new_run("off", tiny_recipe, hungry, "guard.halve_on_oom=false")
    assert attempt(off) == 1
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.slow
def test_fit_goes_on_by_itself(runs, tiny_recipe, monkeypatch):
    from paperscale.jobs.foreground import train_here

    monkeypatch.chdir(Path(tiny_recipe).parent)
    run = new_run("fit", tiny_recipe, poison(13), "guard.non_finite=rollback")
    assert train_here(run) == FINISHED
    assert [one.exit_code for one in run.attempts()] == [ROLLBACK, FINISHED]
    said = [text for _, text in lines(report(run))]
    assert any("1 went back after" in text and "step 13: the gradient is not finite" in text for text in said)


def test_options_that_make_no_sense():
    for options, message in (({"spike": 0}, r"guard\.spike=0"), ({"window": 3}, r"guard\.window=3 is too short")):
        with pytest.raises(UserError, match=message):
            GuardOptions(**options)


@pytest.mark.slow
def test_the_steps_of_a_ramp_are_known_beforehand_and_survive_an_interruption(runs, tiny_recipe):
    """The first epoch is 8 batches of 8, 7 of 16 and 2 larger ones; the others are 8."""
    words = ("data.batch_ramp=[[8,64],[16,100]]", "data.micro_batch_size=16")
    whole = new_run("ramp", tiny_recipe, *words)
    assert attempt(whole) == FINISHED
    assert whole.read_json("progress.json")["total_steps"] == whole.read_json("progress.json")["step"]
    assert whole.read_json("progress.json")["step"] == 8 + 7 + 2 + 8 + 8
    assert [row["step"] for row in rows(whole) if "val/accuracy" in row] == [16, 24, 32]
    for at in (5, 20):
        cut = new_run(f"ramp-{at}", tiny_recipe, *words, at_step(at))
        assert attempt(cut) == REQUEUE
        assert attempt(cut) == FINISHED
        assert equal(final_state(cut), final_state(whole))
        assert rows(cut) == rows(whole)
