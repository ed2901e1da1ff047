"""A node's agent: real ranks, stopped, killed, hung and replaced for real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers import wait_for
from jobs.conftest import callback
from paperscale.errors import BAD_NODE, FAILED, FINISHED, HUNG, REQUEUE, SUPERSEDED, USER_ERROR, BadNode
from paperscale.jobs.faults import BAD_NODE_ORDER, ORDER
from paperscale.jobs.run import Attempt, Run, RunInfo, create
from paperscale.recipes import RecipeArguments
from paperscale.training.checkpoint import newest_verified
from paperscale.training.recipe import RecipeCLI

Start = Callable[..., "Started"]


class Started:
    """An attempt that an agent carries out."""

    def __init__(self, run: Run, number: int, **environment: str):
        self.run, self.attempt = run, Attempt(run.path / "attempts" / f"{number:04d}")
        self.attempt.path.mkdir()
        command = [sys.executable, "-m", "paperscale.jobs.agent", str(run.path), str(number)]
        self.log = self.attempt.path / "node-0.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)

    def at_step(self, step: int) -> None:
        """Wait until rank 0 has made a step."""
        wait_for(lambda: self.run.read_json("progress.json").get("step", 0) >= step, 60, self.log.read_text())

    def pid(self, rank: int) -> int:
        """Return a rank's process."""
        return json.loads((self.attempt.path / "node-0.json").read_text())["ranks"][rank]["pid"]

    def ends(self, seconds: float = 60) -> int:
        """Wait for the end; return the code that the job script goes by."""
        code = self.process.wait(seconds)
        return code if self.attempt.verdict is None else self.attempt.verdict


@pytest.fixture
def start(runs: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start an agent for the tiny recipe with two ranks."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    started: list[Started] = []

    def start_it(*callbacks: str, run: Run | None = None, words: tuple[str, ...] = (), **environment: str) -> Started:
        if run is None:
            listed = f"trainer.callbacks=[{', '.join(callbacks)}]"
            words = (str(tiny_recipe), listed, "tracking.enabled=false", "test_after_fit=false", *words)
            recipe = RecipeCLI(RecipeArguments.parse(list(words)).to_cli()).resolved()
            info = RunInfo("agent", "tiny", "local", "local", 1, 2, "id", time.time(), "test", str(Path.cwd()))
            run = create(info, recipe)
            (run.path / "code").mkdir()
        started.append(Started(run, len(run.attempts()) + 1, **environment))
        return started[-1]

    yield start_it
    for one in started:
        one.process.kill()
        subprocess.run(["pkill", "-9", "-f", str(one.run.path)], check=False)


def test_a_rank_that_is_killed_is_named_and_the_other_does_not_outlive_it(start):
    one = start(callback("Slowly", seconds=0.1))
    one.at_step(2)
    os.kill(one.pid(1), signal.SIGKILL)
    killed = time.monotonic()
    assert one.ends() == 128 + signal.SIGKILL
    assert time.monotonic() - killed < 15
    assert one.attempt.error.startswith("rank 1 on ")
    assert "killed by SIGKILL" in one.attempt.error


def test_a_rank_that_loses_the_others_does_not_call_that_its_own_failure(start):
    """Both ranks die of one kill; the verdict is the kill's, and not a failure for good."""
    one = start(callback("Slowly", seconds=0.1))
    one.at_step(2)
    os.kill(one.pid(0), signal.SIGKILL)
    assert one.ends() == 128 + signal.SIGKILL
    assert "Error" in one.attempt.log(1).read_text()
    assert one.attempt.verdict == 128 + signal.SIGKILL


def test_an_error_of_a_rank_ends_all_at_once_and_for_good(start):
    one = start(callback("Broken"))
    assert one.ends() == FAILED
    assert "ZeroDivisionError" in one.attempt.error


def test_a_rank_that_hangs_in_its_forward_pass_is_named_with_every_ranks_stack(start):
    one = start(callback("HangAt", step=6, rank=1), PAPERSCALE_HANG_S="2")
    assert one.ends() == HUNG
    assert "rank 1 on " in one.attempt.error
    assert "stands in 'forward' of step 7" in one.attempt.error
    assert "time.sleep" not in (one.attempt.path / "stacks-rank-0.txt").read_text()
    assert 'helpers.py", line' in (one.attempt.path / "stacks-rank-1.txt").read_text()
    assert "nn/parallel/distributed" in (one.attempt.path / "stacks-rank-0.txt").read_text()


@pytest.mark.slow
def test_a_stopped_process_is_named(start):
    one = start(callback("Slowly", seconds=0.1), PAPERSCALE_HANG_S="3")
    one.at_step(5)
    os.kill(one.pid(1), signal.SIGSTOP)
    assert one.ends() == HUNG
    assert "rank 1 on " in one.attempt.error
    assert "its process is stopped" in one.attempt.error


def test_the_limit_of_a_hang_follows_from_the_pauses_seen_so_far(start):
    """Ten times the longest pause, and a minute at least; a checkpoint or a start may take ten minutes."""
    from paperscale.jobs.watchdog import Watchdog

    dog = Watchdog(Attempt(Path("nowhere")), 0)
    rank = {"phase": "backward", "warm": True, "longest_s": 9.0, "still_s": 80.0, "state": "S"}
    assert dog.limit(rank) == 90
    assert dog.limit({**rank, "longest_s": 0.1}) == 60
    assert dog.limit({**rank, "warm": False}) == dog.limit({**rank, "phase": "checkpoint"}) == 600
    assert dog.hung([rank]) is None
    assert dog.hung([{**rank, "still_s": 91.0}]) == 90
    assert dog.hung([{**rank, "still_s": 16.0, "state": "T"}]) == 15


def test_a_newer_attempt_fences_an_older_one(start):
    """A node that was cut off lives on; it must not write once another has taken over."""
    one = start(callback("Slowly", seconds=0.2))
    one.at_step(6)
    (one.run.path / "attempts" / "0002").mkdir()
    began = time.monotonic()
    assert one.ends() == SUPERSEDED
    assert time.monotonic() - began < 5
    assert not (one.run.path / "results.json").exists()


def test_the_save_switch_checkpoints_and_goes_on(start):
    one = start(
        callback("Slowly", seconds=0.1), words=("checkpoint.every_n_steps=1000", "checkpoint.every_n_epochs=1000")
    )
    one.at_step(2)
    assert not list(one.run.checkpoints.iterdir())
    (one.run.path / "save").touch()
    wait_for(lambda: list(one.run.checkpoints.glob("step-*")), 5)
    assert not (one.run.path / "save").exists()
    assert one.ends() == FINISHED


def test_the_stop_switch_checkpoints_and_stops(start):
    one = start(
        callback("Slowly", seconds=0.1), words=("checkpoint.every_n_steps=1000", "checkpoint.every_n_epochs=1000")
    )
    one.at_step(2)
    (one.run.path / "stop").touch()
    assert one.ends() == REQUEUE
    assert list(one.run.checkpoints.glob("step-*"))
    assert one.attempt.facts["reason"] == "request"


def test_a_bad_node_is_named_before_its_ranks_start(start):
    one = start()
    one.ends()
    (one.run.path / BAD_NODE_ORDER).write_text(os.uname().nodename)
    two = start(run=one.run)
    assert two.ends() == BAD_NODE
    assert (two.attempt.path / "suspects").read_text().split()[0] == os.uname().nodename
    assert not two.attempt.log(0).exists()


def test_a_rank_counts_as_slow_when_its_own_part_of_the_step_is_for_fifteen_seconds(tmp_path):
    """All ranks take as long for a step; three looks in a row must find the same one behind."""
    from paperscale.jobs.watchdog import Watchdog

    ranks = [
        {"rank": k, "step_s": 0.3, "local_s": 0.1 + 0.15 * (k == 2), "data_s": 0.01 + 0.14 * (k == 2)} for k in range(4)
    ]
    for node in range(2):
        report = {"node": node, "host": f"n{node}", "time": time.time(), "ranks": ranks[2 * node : 2 * node + 2]}
        (tmp_path / f"node-{node}.json").write_text(json.dumps(report))
    dog = Watchdog(Attempt(tmp_path), 0)
    assert dog.compare_ranks() == dog.compare_ranks() == []
    slow = {"rank": 2, "host": "n1", "slower": 2.5, "what": "data", "seconds": 0.15}
    assert dog.compare_ranks() == [slow]
    assert json.loads((tmp_path / "stragglers.json").read_text()) == [slow]
    assert dog.compare_ranks() == [], "it is said once"


@pytest.mark.slow
def test_a_drill_kills_the_rank_it_names(start):
    one = start(callback("Slowly", seconds=0.1))
    one.at_step(1)
    (one.run.path / ORDER).write_text(json.dumps({"fault": "kill-rank", "rank": 1}))
    assert one.ends() == 128 + signal.SIGKILL
    assert "rank 1 on " in one.attempt.error
    assert not (one.run.path / ORDER).exists()


@pytest.mark.slow
def test_a_drill_of_a_full_disk_costs_no_checkpoint_that_was_there(start):
    """The kernel refuses the writes; the training goes on, says so, and ends in an error that tells what to do."""
    one = start(callback("Slowly", seconds=0.1))
    one.at_step(6)
    (one.run.path / ORDER).write_text(json.dumps({"fault": "fill-disk", "rank": 0}))
    assert one.ends() == USER_ERROR
    assert "the previous checkpoint is kept; free space, then `paperscale resume agent`" in one.attempt.error
    assert newest_verified(one.run.checkpoints)[0] is not None


@pytest.mark.slow
def test_a_slow_rank_is_named(start):
    one = start(callback("SlowRank", rank=1, seconds=0.15), words=("trainer.max_epochs=20",))
    wait_for(lambda: (one.attempt.path / "stragglers.json").exists(), 60)
    wait_for(lambda: json.loads((one.attempt.path / "stragglers.json").read_text()), 60)
    (slow,) = json.loads((one.attempt.path / "stragglers.json").read_text())
    assert (slow["rank"], slow["what"]) == (1, "compute")
    assert slow["seconds"] == pytest.approx(0.15, rel=0.2)
    assert f"rank 1 on {os.uname().nodename} is slow" in one.log.read_text()


@pytest.mark.slow
def test_a_stale_lock_of_a_build_does_not_hang_the_job(start, tmp_path):
    lock = tmp_path / "extensions" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    for path in (lock, lock.parent):
        os.utime(path, (time.time() - 7200, time.time() - 7200))
    one = start(TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    assert one.ends() == FINISHED
    assert not lock.exists()
    assert "left by a build that died 120 minutes ago" in one.log.read_text()


def test_a_rank_that_never_comes_is_named_within_the_time_of_the_rendezvous(monkeypatch):
    """Nobody waits for the collective's own timeout."""
    from paperscale.errors import LostRank
    from paperscale.training import rendezvous

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    began = time.monotonic()
    with pytest.raises(LostRank, match="ranks 1, 2 of 3 have not appeared within 1 s"):
        rendezvous.join(0, 3, on_gpu=False, timeout_s=1.0)
    assert time.monotonic() - began < 5


def test_what_gloo_says_of_a_lost_rank_is_told_from_a_failure():
    from paperscale.errors import is_lost_rank

    assert is_lost_rank(RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]"))
    assert not is_lost_rank(RuntimeError("mat1 and mat2 shapes cannot be multiplied (32x64 and 63x8)"))


def test_a_slow_name_service_is_reported(tmp_path, monkeypatch):
    """Stood in for: the answer that a name server takes its time for."""
    from paperscale.jobs import preflight

    def slowly(address: str) -> None:
        time.sleep(1.1)
        raise OSError

    monkeypatch.setattr(preflight.socket, "gethostbyaddr", slowly)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    report = preflight.check_node(Run(tmp_path), tmp_path, 0)
    assert any("the name service took" in warning and "/etc/hosts" in warning for warning in report.warnings)


def fill(path: Path) -> None:
    """Write until there is no room left."""
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))


def test_a_temporary_folder_that_is_full_makes_a_bad_node(small_disk, tmp_path, monkeypatch):
    from paperscale.jobs import preflight

    with pytest.raises(OSError, match="No space left"):
        fill(small_disk / "rest")
    monkeypatch.setattr(preflight.tempfile, "gettempdir", lambda: str(small_disk))
    with pytest.raises(BadNode, match="cannot be written to: No space left"):
        preflight.check_node(Run(tmp_path), tmp_path, 0)
