"""Killed on two ranks, resumed on one, three and four: the global batches are the uninterrupted run's."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from helpers import trained_samples, wait_for
from jobs.conftest import callback, ended
from paperscale.jobs.engines import ENGINES
from paperscale.jobs.resume import resume
from paperscale.jobs.run import Run
from paperscale.jobs.submit import Shape

SET = ("tracking.enabled=false", "checkpoint.every_n_steps=3", "trainer.max_epochs=2")


def kill_everything(run: Run) -> None:
    """``kill -9`` for every process of the job: its script, its launcher and all ranks."""
    found = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and belongs(run, entry)]
    assert len(found) >= 3
    for process in found:
        os.kill(process, signal.SIGKILL)
    wait_for(lambda: ENGINES[run.info.engine].state(run.job or "").state == "gone", 30)


def belongs(run: Run, entry: Path) -> bool:
    try:
        words = (entry / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(word == bytes(run.path) or word.startswith(bytes(run.path) + b"/") for word in words)


def forget_lost_steps(run: Run) -> int:
    """Remove the steps after the last checkpoint from the logs of samples; return the last that counts."""
    newest = int(max(run.checkpoints.glob("step-*")).name[-8:])
    for path in run.path.glob("samples-*.jsonl"):
        rows = [row for row in path.read_text().splitlines() if row.endswith("}") and json.loads(row)["step"] <= newest]
        path.write_text("".join(row + "\n" for row in rows))
    return newest


@pytest.mark.slow
def test_killed_on_two_ranks_and_resumed_on_one_three_and_four(submit_tiny, tmp_path):
    whole = submit_tiny("whole", *SET)
    assert ended(whole) == "finished"
    expected = trained_samples(whole)
    assert len(expected) == 16
    run = submit_tiny("killed", *SET, callbacks=(callback("Slowly", seconds=0.1),))
    at = random.randint(4, 12)  # any batch must do
    wait_for(lambda: run.read_json("progress.json").get("step", 0) >= at, 60)
    kill_everything(run)
    newest = forget_lost_steps(run)
    shutil.copytree(run.path, tmp_path / "killed", symlinks=True)
    for ranks in (1, 3, 4):
        shutil.rmtree(run.path)
        shutil.copytree(tmp_path / "killed", run.path, symlinks=True)
        resume(run, Shape(procs_per_node=ranks))
        assert ended(run) == "finished"
        assert run.attempts()[-1].facts["resumed_from"] == f"step-{newest:08d}"
        assert len(list(run.attempts()[-1].path.glob("rank-*.log"))) == ranks
        assert trained_samples(run) == expected, f"killed at step {at}, resumed on {ranks}"
