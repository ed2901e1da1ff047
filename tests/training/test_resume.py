"""Interrupted and resumed is bit-identical to uninterrupted (contract 2), wherever the interruption falls."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer

import attempts
from attempts import attempt, begin
from helpers import equal, final_state, rows, trained_samples
from paperscale.data.index import load
from paperscale.errors import FINISHED, REQUEUE, SUPERSEDED, USER_ERROR
from paperscale.jobs.run import Attempt, Run
from paperscale.jobs.worker import main as work
from paperscale.papers.resnet import ResNetClassifier
from paperscale.training import signals
from paperscale.training.checkpoint import newest_verified, verify
from paperscale.training.interruption import take_over_signals


@pytest.fixture(autouse=True)
def own_signals():
    with attempts.own_signals():
        yield


def new_run(name: str, recipe: Path, *overrides: str) -> Run:
    return begin(name, str(recipe), "trainer.callbacks=[{class_path: helpers.SampleLog}]", *overrides)


def at_step(step: int, name: str = "SIGTERM") -> str:
    return f"trainer.callbacks+={{class_path: helpers.SignalAt, init_args: {{step: {step}, signal: {name}}}}}"


_whole: list[Run] = []


@pytest.fixture
def whole(runs, tiny_recipe) -> Run:
    """The uninterrupted run, trained once for all tests, which do not change it."""
    if not _whole:
        run = new_run("whole", tiny_recipe)
        assert attempt(run) == FINISHED
        _whole.append(run)
    return _whole[0]


STEPS = [1, pytest.param(2, marks=pytest.mark.slow), 5, pytest.param(7, marks=pytest.mark.slow), 8, 9]
LATER = [15, 16, 17, 23]


@pytest.mark.parametrize("step", [*STEPS, *(pytest.param(step, marks=pytest.mark.slow) for step in LATER)])
def test_bit_identical_after_an_interruption_at_any_step(whole, tiny_recipe, step):
    """The run has three epochs of eight steps: 8 and 16 are an epoch's last, 9 and 17 the next one's first."""
    run = new_run(f"cut-{step}", tiny_recipe, at_step(step))
    assert attempt(run) == REQUEUE
    assert Attempt(run.path / "attempts/0001").facts["reason"] == "SIGTERM"
    assert attempt(run) == FINISHED
    assert equal(final_state(run), final_state(whole))
    assert rows(run) == rows(whole), "every loss and every metric, epoch means included"
    assert trained_samples(run) == trained_samples(whole)
    assert run.read_json("results.json").keys() == whole.read_json("results.json").keys()


def test_a_signal_at_the_last_step_lets_the_run_finish(whole, tiny_recipe):
    run = new_run("last", tiny_recipe, at_step(24))
    assert attempt(run) == FINISHED
    assert equal(final_state(run), final_state(whole))


def test_a_crash_continues_from_the_last_checkpoint(whole, tiny_recipe):
    run = new_run("crash", tiny_recipe, at_step(13, "SIGKILL"))
    (run.path / "attempts/0001").mkdir()
    command = [sys.executable, "-m", "paperscale.jobs.worker", str(run.path), "1"]
    tests = str(Path(__file__).parents[1])
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": tests}, check=False)
    assert result.returncode == -signal.SIGKILL
    newest = max(checkpoint.name for checkpoint in run.checkpoints.glob("step-*"))
    assert newest in {"step-00000008", "step-00000010"}, "that of step 10 may have been on its way to the disk"
    assert attempt(run) == FINISHED
    assert run.attempts()[1].facts["resumed_from"] == newest
    assert equal(final_state(run), final_state(whole))
    assert rows(run) == rows(whole)


def test_a_damaged_newest_checkpoint_is_passed_over_and_named(whole, tiny_recipe, capfd):
    run = new_run("damaged", tiny_recipe, at_step(13))
    assert attempt(run) == REQUEUE
    newest = run.checkpoints / "step-00000013/state.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert attempt(run) == FINISHED
    facts = run.attempts()[1].facts
    assert facts["resumed_from"] == "step-00000010"
    assert "state.pt has" in facts["passed_over"][0]
    assert "passed over step-00000013" in capfd.readouterr().out
    assert equal(final_state(run), final_state(whole))


def test_no_checkpoint_verifies_is_an_error_not_a_fresh_start(runs, tiny_recipe, capfd):
    run = new_run("all-damaged", tiny_recipe, at_step(13))
    assert attempt(run) == REQUEUE
    for checkpoint in run.checkpoints.glob("step-*"):
        (checkpoint / "state.pt").write_bytes(b"")
    assert attempt(run) == USER_ERROR
    assert "none of the 2 checkpoints" in capfd.readouterr().err


def test_only_the_newest_checkpoints_are_kept(whole):
    kept = sorted(path.name for path in whole.checkpoints.iterdir())
    assert kept == ["step-00000020", "step-00000024"]


def test_a_replaced_attempt_does_not_write(runs, tiny_recipe):
    """A rank that was cut off from its cluster may live on after the run was started anew elsewhere."""
    run = new_run("zombie", tiny_recipe)
    (run.path / "attempts/0001").mkdir()
    (run.path / "attempts/0002").mkdir()
    assert work(str(run.path), 1) == SUPERSEDED, "and does not ask to be run again"
    assert not list(run.checkpoints.glob("step-*"))


def test_random_numbers_continue(runs, tiny_recipe):
    """Dropout and other draws of a model go on where they stopped."""
    noisy = "trainer.callbacks+={class_path: test_resume.Noise}"
    whole = new_run("noisy", tiny_recipe, noisy)
    assert attempt(whole) == FINISHED
    cut = new_run("noisy-cut", tiny_recipe, noisy, at_step(11))
    assert attempt(cut) == REQUEUE
    torch.manual_seed(999)
    assert attempt(cut) == FINISHED
    assert equal(final_state(cut), final_state(whole))


def test_another_order_of_samples_is_refused(runs, tiny_recipe, capfd):
    run = new_run("changed", tiny_recipe, at_step(11))
    assert attempt(run) == REQUEUE
    run.recipe.write_text(run.recipe.read_text().replace("global_batch_size: 32", "global_batch_size: 16"))
    assert attempt(run) == USER_ERROR
    assert "data.global_batch_size=32, this run has 16" in capfd.readouterr().err


def test_lightning_handles_no_signal(runs, tiny_recipe):
    trainer = Trainer(logger=False, enable_checkpointing=False)
    take_over_signals(trainer)
    trainer._signal_connector.register_signal_handlers()
    assert signal.getsignal(signal.SIGTERM) is signals._raise_flag
    del trainer._signal_connector.register_signal_handlers
    trainer._signal_connector.__class__ = type("Moved", (), {})
    with pytest.raises(RuntimeError, match=r"has no Moved\.register_signal_handlers"):
        take_over_signals(trainer)


def test_a_schedule_that_reads_the_number_of_steps_does_not_move_the_position(runs, tiny_recipe):
    """Lightning drops a loader's own state where ``configure_optimizers`` reads ``estimated_stepping_batches``."""
    model = "model.class_path=test_resume.OneCycle"
    whole = new_run("cycle", tiny_recipe, model)
    assert attempt(whole) == FINISHED
    cut = new_run("cycle-cut", tiny_recipe, model, at_step(13))
    assert attempt(cut) == REQUEUE
    assert attempt(cut) == FINISHED
    assert trained_samples(cut) == trained_samples(whole)
    assert equal(final_state(cut), final_state(whole))
    assert rows(cut) == rows(whole)


class OneCycle(ResNetClassifier):
    """Needs the number of steps beforehand, as most schedules with a total do."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        assert steps == 24
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_skipped_samples_are_counted_logged_and_part_of_the_checkpoint(runs, tiny_recipe, own_shards, capfd):
    index = load(own_shards / "train-000001.tar")
    with (own_shards / "train-000001.tar").open("r+b") as file:
        for row in (3, 20):
            file.seek(int(index.members[row, 1]["offset"]) + 20)
            file.write(b"damaged")
    skipping = (f"data.path={own_shards}", "data.on_fault=skip")
    whole = new_run("skip", tiny_recipe, *skipping)
    assert attempt(whole) == FINISHED
    assert capfd.readouterr().err.count("WARNING sample skipped: ") == 2, "each is named once"
    assert [row["data/skipped"] for row in rows(whole) if "data/skipped" in row][-1] == 2
    cut = new_run("skip-cut", tiny_recipe, *skipping, at_step(13))
    assert attempt(cut) == REQUEUE
    assert attempt(cut) == FINISHED
    assert rows(cut) == rows(whole)
    assert equal(final_state(cut), final_state(whole))
    assert trained_samples(cut) == trained_samples(whole)
    state = torch.load(sorted(cut.checkpoints.glob("step-*"))[-1] / "state.pt", weights_only=True)
    assert state["ImageShards"]["skipped"] == {40: 3, 57: 3}


class Noise(Callback):
    """Adds random noise to the weights at every step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        weight = next(pl_module.parameters())
        weight.data += 0.001 * torch.randn_like(weight)


def test_a_full_disk_loses_nothing(whole, tiny_recipe, small_disk, capfd, monkeypatch):
    monkeypatch.setenv("PAPERSCALE_RUNS", str(small_disk / "runs"))
    run = new_run("full", tiny_recipe)
    filler = small_disk / "filler"
    size = sum(file.stat().st_size for file in (whole.checkpoints / "step-00000024").iterdir())
    filler.write_bytes(b"\0" * (shutil.disk_usage(small_disk).free - 3 * size // 2))  # for one checkpoint, not two
    assert attempt(run) == USER_ERROR
    out, err = capfd.readouterr()
    assert out.count("WARNING checkpoint at step") == 5, "training went on"
    assert "error: checkpoint at step 24 not written: [Errno 28] No space left on device" in err
    assert "free space, then `paperscale resume full`" in err
    assert newest_verified(run.checkpoints) == (run.checkpoints / "step-00000005", [])
    filler.unlink()
    assert attempt(run) == FINISHED
    assert equal(final_state(run), final_state(whole))


def test_a_disk_that_is_full_to_the_last_byte(tiny_recipe, small_disk, capfd, monkeypatch):
    monkeypatch.setenv("PAPERSCALE_RUNS", str(small_disk / "runs"))
    run = new_run("full", tiny_recipe)
    filler = (small_disk / "filler").open("wb", buffering=0)
    with contextlib.closing(filler), contextlib.suppress(OSError):
        while True:
            filler.write(b"\0" * 4096)
    assert attempt(run) == USER_ERROR
    err = capfd.readouterr().err
    assert "No space left on device; free space there and run it again" in err
    assert "Traceback" not in err


def test_a_validation_inside_an_epoch_says_which_checkpoint_is_best(runs, tiny_recipe):
    """The checkpoint of its step is written before it: the metric is added."""
    words = ["trainer.val_check_interval=4", "trainer.max_epochs=1", "checkpoint.every_n_steps=4"]
    run = new_run("inside", tiny_recipe, *words, "checkpoint.monitor=val/accuracy", "checkpoint.keep_best=2")
    assert attempt(run) == FINISHED
    metrics = {path.name: verify(path).metrics.get("val/accuracy") for path in run.checkpoints.glob("step-*")}
    logged = {row["step"] + 1: row["val/accuracy"] for row in rows(run) if "val/accuracy" in row}
    assert metrics == {f"step-{step:08d}": logged[step] for step in (4, 8)}
