"""The life of a run on the local cluster: real processes, real signals, the same script as on SLURM."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch

from helpers import equal, final_state, rows, trained_samples, wait_for
from jobs.conftest import callback, ended
from paperscale.errors import UserError
from paperscale.jobs.drill import preempt
from paperscale.jobs.logs import follow, print_log
from paperscale.jobs.resume import resume
from paperscale.jobs.run import Run
from paperscale.jobs.status import cancel, status
from paperscale.jobs.submit import Shape
from paperscale.tracking.wandb_files import read_runs

_whole: list[Run] = []


@pytest.fixture
def whole(submit_tiny) -> Run:
    """The uninterrupted run on two processes, trained once for all tests."""
    if not _whole:
        run = submit_tiny("whole", "tracking.enabled=false")
        assert ended(run) == "finished"
        _whole.append(run)
    return _whole[0]


def test_a_signal_to_one_rank_is_enough_and_nothing_is_lost(submit_tiny, whole):
    run = submit_tiny("cut", callbacks=(callback("SignalAt", step=11, rank=1),))
    assert ended(run) == "finished"
    first, second = run.attempts()
    assert (first.exit_code, second.exit_code) == (75, 0)
    assert first.facts["reason"] == "SIGTERM to rank 1"
    assert equal(final_state(run), final_state(whole)), "bit for bit"
    assert rows(run) == rows(whole)
    assert trained_samples(run) == trained_samples(whole)
    segments = read_runs(run.path / "wandb")
    assert {(segment.run_id, segment.name) for segment in segments} == {(run.info.wandb_id, "cut")}, "one W&B run"
    logged = [row for segment in segments for row in segment.history]
    assert len(logged) == len(rows(run)), "over all segments each row once"
    assert [r["train/loss"] for r in logged if "train/loss" in r] == pytest.approx(
        [r["train/loss"] for r in rows(run) if "train/loss" in r]
    )


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_and_the_run_goes_on(submit_tiny, whole):
    run = submit_tiny(
        "killed", "tracking.enabled=false", callbacks=(callback("SignalAt", step=13, signal="SIGKILL", rank=1),)
    )
    assert ended(run) == "finished"
    assert run.attempts()[0].exit_code == 137
    assert run.attempts()[1].facts["resumed_from"] == "step-00000010"
    assert equal(final_state(run), final_state(whole))
    assert rows(run) == rows(whole)


def test_an_error_is_not_run_again(submit_tiny):
    run = submit_tiny("broken", "tracking.enabled=false", callbacks=(callback("Broken"),))
    assert ended(run) == "failed"
    assert len(run.attempts()) == 1
    assert "ZeroDivisionError" in run.attempts()[0].log().read_text()
    said = (run.path / "job.log").read_text()
    assert re.search(r"failed for good \(exit code 1\): rank [01] on \S+: ZeroDivisionError: division by zero", said)
    assert "ZeroDivisionError: division by zero" in status(run).detail


def test_the_rank_that_failed_first_is_named(submit_tiny, own_shards, capsys):
    """The other ranks only report a lost connection."""
    run = submit_tiny("damaged", "tracking.enabled=false", f"data.path={own_shards}", callbacks=(callback("Damage"),))
    assert ended(run) == "failed"
    assert "rank 1 on " in status(run).detail
    assert "train-000000.tar: sample" in status(run).detail
    print_log(run, rank=0, attempt=None, forever=False)
    assert "--- attempt 1 failed first on rank 1 on " in capsys.readouterr().out


@pytest.mark.slow
def test_a_plain_log_in_evaluation_is_the_mean_over_all_samples(submit_tiny):
    """On three processes as on one."""
    values = []
    for processes in (1, 3):
        model = "model.class_path=helpers.PlainLog"
        run = submit_tiny(f"plain-{processes}", model, "tracking.enabled=false", procs_per_node=processes)
        assert ended(run) == "finished", run.attempts()[-1].error
        values.append(run.read_json("results.json")["test/mean_label"])
    assert values[0] == pytest.approx(sum(n % 8 for n in range(60)) / 60)
    assert values[1] == pytest.approx(values[0])


@pytest.mark.slow
def test_attempts_without_progress_are_stopped(submit_tiny):
    run = submit_tiny("stuck", "tracking.enabled=false", callbacks=(callback("KillAlways"),), procs_per_node=1)
    assert ended(run) == "stopped"
    assert [attempt.exit_code for attempt in run.attempts()] == [137] * 3
    assert "3 attempts in a row without a new checkpoint" in (run.path / "job.log").read_text()


@pytest.mark.slow
def test_cancel_checkpoints_and_is_not_run_again_until_resumed(submit_tiny, whole):
    run = submit_tiny("cancelled", "tracking.enabled=false", callbacks=(callback("Slowly", seconds=0.2),))
    wait_for(lambda: run.read_json("progress.json").get("step", 0) >= 3)
    cancel(run)
    assert status(run).state == "cancelled"
    step = int(sorted(run.checkpoints.glob("step-*"))[-1].name[-8:])
    assert 3 <= step < 24
    with pytest.raises(UserError, match="is cancelled: nothing to cancel"):
        cancel(run)
    with pytest.raises(UserError, match="--time: the local cluster sets no limits"):
        resume(run, Shape(time="1:00"))
    assert run.cancelled, "a refused resume changes nothing"
    assert resume(run, Shape()) is None
    assert ended(run) == "finished"
    assert equal(final_state(run), final_state(whole))
    with pytest.raises(UserError, match="is finished"):
        resume(run, Shape())


@pytest.mark.slow
def test_another_number_of_processes_trains_on_the_same_global_batches(submit_tiny, whole):
    run = submit_tiny("elastic", "tracking.enabled=false", callbacks=(callback("Slowly", seconds=0.2),))
    wait_for(lambda: run.read_json("progress.json").get("step", 0) >= 3)
    cancel(run)
    resume(run, Shape(procs_per_node=3))
    wait_for(lambda: run.read_json("progress.json").get("step", 0) >= 9 and len(run.attempts()) == 2)
    cancel(run)
    resume(run, Shape(procs_per_node=1))
    assert ended(run) == "finished"
    assert [len(list(attempt.path.glob("rank-*.log"))) for attempt in run.attempts()] == [2, 3, 1]
    assert next(follow(run, rank=2, attempt=2, forever=False))
    with pytest.raises(UserError, match="attempt 3 of run 'elastic' has ranks 0 to 0, not 2"):
        next(follow(run, rank=2, attempt=None, forever=False))
    assert trained_samples(run) == trained_samples(whole)


@pytest.mark.slow
def test_the_gradient_is_the_mean_over_the_global_batch_at_any_number_of_processes(submit_tiny):
    """32 samples over three processes are 10, 11 and 11; the last 6 of an epoch in accumulated passes of at most 2."""
    linear = ("model.network={class_path: helpers.Linear}", "tracking.enabled=false")
    states = []
    for processes, words in ((1, ()), (3, ()), (2, ("data.micro_batch_size=5",))):
        run = submit_tiny(f"linear-{processes}", *linear, *words, procs_per_node=processes)
        assert ended(run) == "finished"
        states.append(final_state(run))
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.allclose(state[key], states[0][key], atol=1e-6) for key in state)


@pytest.mark.slow
def test_three_processes_are_bit_identical_too(submit_tiny):
    """With more than two, the order in which gradients are added up matters."""
    whole = submit_tiny("whole-3", "tracking.enabled=false", procs_per_node=3)
    assert ended(whole) == "finished"
    stop = callback("SignalAt", step=3, rank=2)
    run = submit_tiny("cut-3", "tracking.enabled=false", callbacks=(stop,), procs_per_node=3)
    assert ended(run) == "finished"
    assert len(run.attempts()) == 2
    assert equal(final_state(run), final_state(whole))
    assert rows(run) == rows(whole)


@pytest.mark.slow
def test_drill_preempts_a_running_job(submit_tiny):
    run = submit_tiny("drilled", "tracking.enabled=false", callbacks=(callback("Slowly", seconds=0.1),))
    wait_for(lambda: run.read_json("progress.json").get("step", 0) >= 2)
    assert "sent SIGTERM" in preempt(run)
    text = "".join(follow(run, rank=0, attempt=None, forever=True))
    assert "interrupted by SIGTERM" in text
    assert "--- attempt 2\ncontinues from step-" in text
    assert "test/accuracy" in text
    assert ended(run) == "finished"
    assert run.attempts()[0].exit_code == 75
    second = "".join(follow(run, rank=0, attempt=2, forever=False))
    assert second.startswith("continues from step-")
    with pytest.raises(UserError, match="attempts 1 to 2, not 7"):
        next(follow(run, rank=0, attempt=7, forever=False))


def test_a_run_keeps_the_code_it_was_submitted_with(submit_tiny, tmp_path, monkeypatch):
    """Also in a subfolder, with uncommitted changes, and although the job runs in the folder of submission."""
    project = tmp_path / "project"
    (project / "exp").mkdir(parents=True)
    subprocess.run(["git", "init", "-q", project], check=True)
    (project / ".gitignore").write_text("big\n")
    (project / "big").write_text("data")
    code = "from helpers import SampleLog\nclass Mine(SampleLog):\n    def setup(self, *a, **k): print('VERSION', {})\n"
    (project / "exp/mine.py").write_text(code.format(1))  # not even added to git
    monkeypatch.chdir(project / "exp")
    monkeypatch.syspath_prepend(str(project / "exp"))
    run = submit_tiny("snapshot", "tracking.enabled=false", callbacks=("{class_path: mine.Mine}",), procs_per_node=1)
    (project / "exp/mine.py").write_text(code.format(2))
    assert not (run.path / "code/big").exists()
    assert ended(run) == "finished", run.attempts()[-1].error
    text = run.attempts()[0].log().read_text()
    assert "VERSION 1" in text
    assert "VERSION 2" not in text
