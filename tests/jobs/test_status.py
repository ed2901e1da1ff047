"""What `status` says of a run, from its directory, whether or not the scheduler answers."""

from __future__ import annotations

import json
import time

import pytest

from jobs.folders import progress, put, write_attempt, write_checkpoint, write_run
from paperscale.cli import main
from paperscale.errors import UserError
from paperscale.jobs.engines import ENGINES
from paperscale.jobs.queue import JobState
from paperscale.jobs.report import lines, report
from paperscale.jobs.status import Facts, cancel, status, statuses
from paperscale.jobs.switches import save


@pytest.fixture
def no_slurm(monkeypatch, tmp_path):
    """SLURM's commands cannot be run, as on a laptop or while a login node is broken."""
    monkeypatch.setenv("PATH", str(tmp_path))


def said(capsys, *words: str) -> str:
    assert main(list(words)) == 0
    return " ".join(capsys.readouterr().out.split())


def test_a_finished_run_needs_no_scheduler(runs, no_slurm):
    run = write_run(runs, "done", files={"results.json": {"test/accuracy": 0.9}, "job": "7"})
    assert status(run).state == "finished"
    assert status(run).job is None, "it was not asked"


def test_no_answer_means_unknown_not_gone(runs, no_slurm, capsys):
    run = write_run(runs, "quiet", files={"job": "7", "progress.json": progress(time=time.time() - 300)})
    write_attempt(run, 1)
    now = status(run)
    assert now.state == "unknown"
    assert "squeue cannot be run here" in now.detail
    assert "last sign of life 5 min ago" in now.detail
    assert "step 40/100, epoch 2, sample 1,280 (as of 5 min ago)" in said(capsys, "status", "quiet")


def test_what_has_failed_for_good_is_known_without_the_scheduler(runs, no_slurm):
    run = write_run(runs, "failed", files={"job": "7"})
    write_attempt(run, 1, exit_code="1\n", error="rank 1 on n2: ValueError: no\n")
    assert status(run).state == "failed"
    assert status(run).detail == "exit code 1, attempt 1, rank 1 on n2: ValueError: no"
    time.sleep(0.02)
    run.set_job("8")
    assert status(run).state == "unknown", "it was submitted again since"


@pytest.mark.parametrize("code", [75, 76, 77, 78, 137])
def test_what_wants_to_be_run_again_is_stopped_not_failed(runs, code):
    run = write_run(runs, "stopped", engine="local", files={"job": "999999@1"})
    write_attempt(run, 1, exit_code=f"{code}\n")
    put(run.path, {"job.log": "2026-01-01T00:00:00 stopped: 3 attempts in a row without a new checkpoint\n"})
    now = status(run)
    assert now.state == "stopped"
    assert now.detail == f"exit code {code}, attempt 1: 3 attempts in a row without a new checkpoint"


def test_who_has_cancelled_is_said(runs):
    run = write_run(runs, "ended", engine="local", files={"job": "999999@1", "cancelled": "scancel\n"})
    assert status(run).detail == "by `scancel`"


def test_each_attempt_is_told_with_its_cause_and_how_long_it_ran(runs, no_slurm, capsys):
    run = write_run(runs, "long", files={"job": "7", "job.sh": "max_requeues=9  # attempts after the first\n"})
    write_attempt(run, 1, exit_code="75\n", cause="preemption\n")
    write_attempt(run, 2, exit_code="77\n", cause="hang\n", error="rank 3 on n2: hangs in backward\n")
    write_attempt(run, 3, **{"attempt.json": {"started": time.time() - 100, "resumed_from": "step-00000400"}})
    text = said(capsys, "status", "long")
    assert "attempt 3 of at most 10, for 100 s now, from step-00000400" in text
    assert "1 was preempted after 10 min 2 hung after 10 min: rank 3 on n2: hangs in backward" in text
    facts = json.loads(said(capsys, "status", "long", "--json"))
    assert [one["cause"] for one in facts["attempts"]] == ["preemption", "hang", ""]
    assert facts["attempts"][0]["ran_s"] == pytest.approx(600, abs=5)
    assert (facts["attempt"], facts["max_attempts"]) == (3, 10)


def test_nodes_that_have_gone_silent_are_marked(runs, no_slurm, capsys):
    run = write_run(runs, "silent", files={"job": "7", "excluded": f"n7 {time.time() - 7200:.0f} no GPU\n"})
    rank = {"rank": 0, "pid": 1, "step": 39, "phase": "backward", "beat": time.time(), "state": "S"}
    nodes = {
        "node-0.json": {"node": 0, "host": "n1", "time": time.time(), "ranks": [rank]},
        "node-1.json": {"node": 1, "host": "n2", "time": time.time() - 90, "ranks": []},
        "stragglers.json": [{"rank": 1, "host": "n2", "slower": 2.1, "what": "data"}],
    }
    write_attempt(run, 1, **nodes)
    text = said(capsys, "status", "silent")
    assert "heartbeat n1 0 s ago: backward of step 40 n2 90 s ago STALE" in text
    assert "slow rank rank 1 on n2: 2.1 times the others' data" in text
    assert "excluded n7 is left out (no GPU, until " in text
    facts = json.loads(said(capsys, "status", "silent", "--json"))
    assert [(beat["host"], beat["stale"]) for beat in facts["heartbeats"]] == [("n1", False), ("n2", True)]


def test_the_newest_checkpoint_that_is_complete_is_named_and_verify_hashes_it(runs, capsys):
    run = write_run(runs, "kept", engine="local")
    write_checkpoint(run, 10)
    write_checkpoint(run, 20)
    (write_checkpoint(run, 30) / "state.pt").write_text("wei")
    text = said(capsys, "status", "kept")
    assert "DAMAGED step-00000030: state.pt has 3 bytes, 7 were written" in text
    assert "checkpoint step-00000020, complete, written 0 s ago" in text
    (run.checkpoints / "step-00000020/state.pt").write_text("WEIGHTS")
    facts = json.loads(said(capsys, "status", "kept", "--json"))
    assert (facts["checkpoint"], facts["checkpoint_step"], facts["verified"]) == ("step-00000020", 20, "sizes")
    facts = json.loads(said(capsys, "status", "kept", "--verify", "--json"))
    assert (facts["checkpoint"], facts["verified"]) == ("step-00000010", "hashes")
    assert len(facts["damaged"]) == 2


def test_a_failure_is_told_with_the_log_of_the_rank_that_failed_first(runs, no_slurm, capsys):
    run = write_run(runs, "broken", files={"job": "7", "progress.json": progress(loss=float("nan"))})
    write_checkpoint(run, 10)
    files = {"exit_code": "1\n", "error": "rank 1 on n2: ValueError: no\n", "rank-0.log": "", "rank-1.log": "no\n"}
    attempt = write_attempt(run, 1, **files)
    text = said(capsys, "status", "broken")
    assert f"why rank 1 on n2: ValueError: no log {attempt.log(1)}" in text
    assert "next once that is mended, `paperscale resume broken` continues from step-00000010" in text
    assert "loss nan NOT FINITE" in text
    assert json.loads(said(capsys, "status", "broken", "--json"))["progress"]["loss"] is None, "NaN is not JSON"


def test_a_run_of_an_earlier_release_is_understood(runs, capsys):
    """Without agents, causes and verdicts, and with less in run.json."""
    run = write_run(runs, "old", engine="local", files={"job": "999999@1", "progress.json": progress()})
    info = json.loads((run.path / "run.json").read_text())
    for name in ("gpus_per_node", "group", "after", "repeat"):
        del info[name]
    put(run.path, {"run.json": info})
    write_attempt(run, 1, exit_code="75\n", **{"attempt.json": {"started": time.time(), "reason": "SIGTERM"}})
    assert "1 was ended by a signal after 0 s: SIGTERM" in said(capsys, "status", "old")


def test_cancel_without_a_scheduler_leaves_a_mark_that_the_job_sees(runs, no_slurm, capsys):
    run = write_run(runs, "far", files={"job": "7"})
    write_attempt(run, 1)
    assert main(["cancel", "far"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("WARNING squeue cannot be run here")
    assert "`paperscale cancel far` again once the controller answers takes it out of the queue" in err
    assert run.cancelled_by == "paperscale cancel"
    write_attempt(run, 2, exit_code="75\n")
    assert status(run).state == "cancelled"


def test_a_run_on_another_machine_that_shares_the_folder_is_not_taken_for_dead(runs, capsys):
    """Its process cannot be seen from here, its heartbeat can; no process of this machine is signalled."""
    run = write_run(runs, "there", engine="local", files={"job": "999999@1", "progress.json": progress()})
    write_attempt(run, 1)
    assert (status(run).state, status(run).detail) == ("running", "on n1")
    assert main(["cancel", "there"]) == 0
    assert "there runs on n1: it is marked as cancelled" in capsys.readouterr().err
    put(run.path, {"progress.json": progress(time=time.time() - 60)})
    (run.path / "cancelled").unlink()
    assert status(run).state == "stopped", "it has fallen silent"


def test_what_has_ended_is_not_cancelled(runs, capsys):
    write_run(runs, "done", files={"results.json": {"test/accuracy": 0.9}})
    assert main(["cancel", "done"]) == 2
    assert "run 'done' is finished: nothing to cancel" in capsys.readouterr().err
    assert main(["cancel"]) == 2
    assert "name the runs to cancel, or a sweep with --group" in capsys.readouterr().err
    assert main(["checkpoint", "save", "done"]) == 2
    assert "only a running one can write a checkpoint" in capsys.readouterr().err


def test_a_sweep_is_cancelled_as_a_whole_but_for_what_has_ended(runs, no_slurm, capsys):
    for number in range(3):
        write_run(runs, f"lr-{number}", group="lr", files={"job": str(number)})
    put(runs / "lr-0", {"results.json": {"test/accuracy": 0.9}})
    write_run(runs, "other", files={"job": "9"})
    assert main(["cancel", "--group", "lr", "--json"]) == 0
    assert sorted(one["run"] for one in json.loads(capsys.readouterr().out)) == ["lr-1", "lr-2"]
    assert not (runs / "other/cancelled").exists()
    assert main(["cancel", "--group", "nothing"]) == 2


def answered(run, slurm: str, state: str = "running"):
    """The run's state where SLURM says this of its job."""
    return statuses([Facts.read(run)], lambda jobs, owners: dict.fromkeys(jobs, JobState(state, slurm, slurm)))[0]


def test_a_job_that_waits_names_the_nodes_that_are_left_out_and_how_to_lift_it(runs):
    lines_of_nodes = f"n2 {time.time() - 60:.0f} no GPU\nn3 {time.time() - 13 * 3600:.0f} old\nmistyped\n"
    run = write_run(runs, "waits", files={"job": "7", "excluded": lines_of_nodes})
    facts = report(run, now=answered(run, "PENDING", "queued"))
    assert [(node["host"], node["reason"]) for node in facts["excluded"]] == [("n2", "no GPU")]
    assert facts["excluded"][0]["until"] == pytest.approx(time.time() + 12 * 3600 - 60, abs=5)
    text = " ".join(value for _, value in lines(facts))
    assert "n2 is left out (no GPU, until " in text
    assert f"remove their lines from {run.path}/excluded, then `scontrol update JobId=7 ExcNodeList=`" in text
    assert report(run, now=answered(run, "RUNNING"))["lift"] == ""


def test_a_cancelled_run_stays_so_while_the_controller_is_down(runs, no_slurm, monkeypatch):
    run = write_run(runs, "ended", files={"job": "7"})
    write_attempt(run, 1)
    monkeypatch.setattr(ENGINES["slurm"], "cancel", lambda run: None)
    assert cancel(run, answered(run, "RUNNING")) == ""
    assert status(run).state == "cancelled"
    (run.path / "cancel-taken").unlink()
    assert (status(run).state, "marked as cancelled" in status(run).detail) == ("unknown", True)


def test_a_job_that_is_marked_as_cancelled_is_said_to_be_and_its_completion_is_the_end(runs, monkeypatch, capsys):
    run = write_run(runs, "marked", files={"job": "7", "cancelled": "paperscale cancel\n"})
    assert answered(run, "PENDING", "queued").detail == "PENDING; marked as cancelled by `paperscale cancel`"
    assert answered(run, "COMPLETING").state == "cancelled"
    monkeypatch.setattr(ENGINES["slurm"], "state", lambda job: JobState("running", "COMPLETING", "COMPLETING"))
    assert main(["resume", "marked"]) == 2
    assert "its cancelled job 7 has not ended yet; try again in a minute" in capsys.readouterr().err


def test_an_attempt_that_has_ended_is_not_waited_for(runs, no_slurm, capsys):
    run = write_run(runs, "between", files={"job": "7", "progress.json": progress(time=time.time() - 90)})
    node = {"node": 0, "host": "n1", "time": time.time() - 90, "ranks": []}
    write_attempt(run, 1, exit_code="76\n", **{"node-0.json": node})
    text = said(capsys, "status", "between")
    assert "heartbeat none: attempt 1 has ended and waits to be requeued" in text
    assert "STALE" not in text
    with pytest.raises(UserError, match=r"attempt 1 has ended \(lost\).*try again once"):
        save(run, 60, print)
    assert not (run.path / "save").exists()


def test_what_is_left_is_estimated_after_five_steps_of_the_attempt(runs):
    run = write_run(runs, "early", files={"job": "7", "progress.json": progress(41, eta_s=None)})
    write_attempt(run, 1, **{"attempt.json": {"started": time.time(), "resumed_from": "step-00000040"}})
    assert report(run, now=answered(run, "RUNNING"))["eta_s"] is None
    put(run.path, {"progress.json": progress(45)})
    assert report(run, now=answered(run, "RUNNING"))["eta_s"] == pytest.approx(60, abs=5)


def test_the_step_is_that_of_the_newest_report_and_of_ranks_that_have_made_one(runs):
    run, now = write_run(runs, "beats", files={"job": "7"}), time.time()
    nodes = {}
    for number, (age, step) in enumerate([(0, 0), (1, 3069), (4, 3060)]):
        rank = {"rank": number, "step": step, "phase": "backward"}
        nodes[f"node-{number}.json"] = {"node": number, "host": f"n{number}", "time": now - age, "ranks": [rank]}
    write_attempt(run, 1, **nodes)
    told = [
        value.split(": ")[1] for _, value in lines(report(run, now=answered(run, "RUNNING"))) if "backward" in value
    ]
    assert told == ["backward", "backward of step 3070", "backward"]
