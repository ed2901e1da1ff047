"""Seeing runs: `runs`, `watch`, `logs`, `diff`, and the switches of a running job."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import wait_for
from jobs.conftest import callback, ended
from jobs.folders import progress, put, write_attempt, write_run
from paperscale.cli import main
from paperscale.cli.jobs import _SORTS
from paperscale.cli.options import complete_groups, complete_states
from paperscale.errors import UserError
from paperscale.jobs.listing import SORTS, Wanted, listing
from paperscale.jobs.logs import follow
from paperscale.jobs.run import Run
from paperscale.jobs.words import curve, duration
from paperscale.tracking.metrics import read_metrics

DAY = 86400


@pytest.fixture
def some(runs: Path) -> Path:
    """Four runs: finished, failed, stopped and cancelled, an hour apart, the first the oldest."""
    now = time.time()
    done = {"results.json": {"test/accuracy": 0.9}, "progress.json": progress(100, loss=0.1)}
    write_run(runs, "a-done", engine="local", created=now - 3 * DAY, files=done)
    failed = write_run(runs, "b-failed", engine="local", created=now - 2 * DAY, group="g", recipe="bert")
    write_attempt(failed, 1, exit_code="1\n", error="rank 0: no\n")
    stopped = write_run(runs, "c-stopped", engine="local", created=now - DAY, files={"progress.json": progress(40)})
    for number in (1, 2):
        write_attempt(stopped, number, exit_code="75\n")
    put(runs / "g", {"sweep.json": {}})
    files = {"cancelled": "scancel\n", "progress.json": progress(7, loss=None)}
    write_run(runs, "d-cancelled", engine="local", cluster="other", created=now - 60, files=files)
    return runs


@pytest.mark.parametrize(("metric", "best_first"), [("val/accuracy", "yxz"), ("val/loss", "xyz"), ("val/f1", "yzx")])
def test_runs_are_sorted_by_a_result_the_best_first(runs, metric, best_first, capsys):
    found = {"x": {"val/accuracy": 0.7, "val/loss": 1.0}, "y": {"val/accuracy": 0.8, "val/loss": 2.0, "val/f1": 0.5}}
    for number, name in enumerate("xyz"):
        files = {"results.json": found.get(name, {})}
        write_run(runs, name, engine="local", created=time.time() - 60 + number, files=files)
    listed = names("--sort", metric, capsys=capsys)
    known = [name for name in listed if metric in found.get(name, {})]
    assert listed[: len(known)] == known == [name for name in best_first if metric in found.get(name, {})]


def names(*words: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(["runs", *words, "--json"]) == 0
    return [row["name"] for row in json.loads(capsys.readouterr().out)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "dcba"),
        (["--reverse"], "abcd"),
        (["--state", "failed,stopped"], "cb"),
        (["--cluster", "other"], "d"),
        (["--group", "g"], "b"),
        (["--recipe", "tiny"], "dca"),
        (["--since", "36h"], "dc"),
        (["--since", "1w", "--limit", "3"], "dcb"),
        (["--sort", "name"], "abcd"),
        (["--sort", "step"], "acdb"),
        (["--sort", "loss"], "acdb"),
        (["--sort", "state"], "acbd"),
        (["--sort", "attempts", "--limit", "2"], "cb"),
        (["stop"], "c"),
        (["[ab]-*"], "ba"),
    ],
)
def test_runs_are_filtered_and_sorted(some, words, expected, capsys):
    assert [name[0] for name in names(*words, capsys=capsys)] == list(expected)


def test_the_newest_are_those_created_last_although_an_older_one_was_reshaped(some):
    os.utime(some / "a-done/run.json")
    rows, total = listing(Wanted(limit=2))
    assert [row.run.name for row in rows] == ["d-cancelled", "c-stopped"]
    assert total == 4


def test_a_damaged_run_does_not_hide_the_others(some, capsys):
    (some / "c-stopped/run.json").write_text("{")
    assert names(capsys=capsys) == ["d-cancelled", "b-failed", "a-done"]


def test_what_a_script_reads_has_a_line_a_run_and_tabs_between(some, capsys):
    assert main(["runs"]) == 0
    head, *rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert head == ["run", "state", "cluster", "attempts", "step", "loss", "created", "result or reason"]
    assert [row[1] for row in rows] == ["cancelled", "stopped", "failed", "finished"]
    assert rows[1][3:6] == ["2", "40/100", "0.5"]
    assert rows[3][-1] == "test/accuracy 0.9000"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs", "--state", "faild"], "no state 'faild'; did you mean 'failed'?"),
        (["runs", "--since", "soon"], "--since soon: write 30m, 12h, 2d, 1w or a date such as 2026-01-31"),
        (["runs", "--sort", "los"], "did you mean 'loss'?"),
        (["logs", "c-stopped", "--grep", "("], "write a regular expression"),
        (["logs", "c-stopped", "--node", "5"], "has nodes 0 to 1, not 5"),
        (["diff", "a-done", "b-faild"], "no run 'b-faild'"),
        (["drill", "g", "kill-rank"], "'g' is a sweep, not a run: `paperscale runs --group g` lists its runs"),
        (["checkpoint", "save", "g"], "'g' is a sweep"),
        (["cancel", "g"], "`paperscale cancel --group g` ends them"),
    ],
)
def test_a_mistake_ends_in_the_fix(some, words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_states_and_sweeps_are_completed(some):
    assert complete_states("fai")[4] == "failed"
    assert "failed,stopped" in complete_states("failed,st")
    assert complete_groups("") == ["g"]


def test_the_orders_on_offer_are_those_there_are():
    assert set(_SORTS) == set(SORTS)


def test_ten_thousand_runs_are_listed_in_a_second_and_a_half(runs, capsys):
    put(runs / "template", {"progress.json": progress(), "results.json": {"test/accuracy": 0.5}})
    for number in range(10_000):
        folder = runs / f"run-{number:05d}"
        folder.mkdir()
        info = {"name": folder.name, "recipe": "r", "cluster": "c", "engine": "slurm", "nodes": 1, "procs_per_node": 1}
        info |= {"wandb_id": "i", "created": 1e9 + number, "command": "c", "workdir": "/"}
        (folder / "run.json").write_text(json.dumps(info))
        for name in ("progress.json", "results.json"):
            (folder / name).hardlink_to(runs / "template" / name)
        os.utime(folder / "run.json", (1e9 + number, 1e9 + number))
    started = time.process_time()
    assert len(names(capsys=capsys)) == 10_000
    assert time.process_time() - started < 1.5
    started = time.process_time()
    rows, total = listing(Wanted(limit=50))
    assert (rows[0].run.name, len(rows), total) == ("run-09999", 50, 10_000)
    assert time.process_time() - started < 0.5


def test_a_replaced_attempt_that_goes_on_does_not_displace_the_rows_of_the_one_that_replaced_it(tmp_path):
    def row(attempt: int, step: int, loss: float) -> str:
        return json.dumps({"step": step, "attempt": attempt, "train/loss": loss}) + "\n"

    path = tmp_path / "metrics.jsonl"
    written = [(1, 1, 0.9), (1, 2, 0.8), (2, 2, 0.7), (1, 3, 9.0), (2, 3, 0.6), (1, 3, 9.0), (2, 4, 0.5), (1, 4, 9.0)]
    path.write_text("".join(row(*each) for each in written) + '{"step": 5, "attempt')
    assert [(r["attempt"], r["train/loss"]) for r in read_metrics(path)] == [(1, 0.9), (2, 0.7), (2, 0.6), (2, 0.5)]
    assert [r["step"] for r in read_metrics(path, last_bytes=100)] == [4]


@pytest.fixture
def logged(runs: Path) -> Run:
    """Two attempts of four ranks on two nodes."""
    run = write_run(runs, "logged", engine="local", procs_per_node=2, files={"job": "9@9", "job.log": "one\ntwo\n"})
    for number in (1, 2):
        logs = {f"rank-{rank}.log": f"begin\nloss {rank}.{number}\nend é\n" for rank in range(4)}
        write_attempt(run, number, exit_code="75\n", **logs)
    return run


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "begin\nloss 0.2\nend é\n"),
        (["--attempt", "1", "--rank", "3", "--tail", "1"], "end é\n"),
        (["--tail", "2"], "loss 0.2\nend é\n"),
        (["--tail", "99"], "begin\nloss 0.2\nend é\n"),
        (["--tail", "2", "--grep", "begin|loss"], "begin\nloss 0.2\n"),
        (["--job", "--tail", "1", "--grep", "o"], "two\n"),
        (["--rank", "all", "--grep", "los+"], "".join(f"rank {r}: loss {r}.2\n" for r in range(4))),
        (["--node", "1", "--grep", "loss"], "rank 2: loss 2.2\nrank 3: loss 3.2\n"),
        (["--rank", "all", "--attempt", "1", "--tail", "1", "--grep", "e"], "rank {}: end é\n" * 4),
        (["--job", "--tail", "1"], "two\n"),
        (["-f", "--attempt", "1", "--grep", "end"], "end é\n"),
    ],
)
def test_logs_of_ranks_nodes_and_attempts(logged, words, expected, capsys):
    assert main(["logs", "logged", *words]) == 0
    assert capsys.readouterr().out == expected.replace("{}", "%d") % ((0, 1, 2, 3) if "{}" in expected else ())


def test_lines_of_ranks_are_not_mixed_while_they_are_being_written(logged):
    log = logged.attempts()[1].log(0)
    log.write_text("half")
    pieces = follow(logged, None, 2, True, grep="half|begin")
    assert next(pieces) == "rank 1: begin\nrank 2: begin\nrank 3: begin\n"
    log.write_text("half a line\n")
    assert "".join(pieces) == "rank 0: half a line\n"


def test_the_last_lines_of_a_large_log_are_found_from_its_end(logged):
    log = logged.attempts()[1].log(0)
    log.write_text("".join(f"{number:>40}\n" for number in range(10_000)))
    text = "".join(follow(logged, 0, None, False, tail=3000))
    assert [int(line) for line in text.splitlines()] == list(range(7000, 10_000))


def test_diff_tells_what_two_runs_differ_in(runs, capsys):
    recipe = "model:\n  init_args: {{lr: {}}}\ntrainer:\n  callbacks: [{{class_path: a.B}}]\n  max_epochs: 3\n{}"
    code = {"code.json": {"commit": "abc", "dirty": False}, "code/my.py": "lr = 1\n", "code/same.py": "pass\n"}
    write_run(runs, "one", engine="local", files={**code, "recipe.yaml": recipe.format(0.1, "")})
    code |= {"code.json": {"commit": "abc", "dirty": True}, "code/my.py": "lr = 2\n", "code/new.bin": "\udc80"[:0]}
    results = {"results.json": {"test/accuracy": 0.5}}
    other = write_run(
        runs, "two", engine="local", nodes=4, files={**code, **results, "recipe.yaml": recipe.format(0.2, "seed: 1\n")}
    )
    (other.path / "code/new.bin").write_bytes(b"\xff\x00")
    assert main(["diff", "one", "two", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recipe"] == [{"key": "model.init_args.lr", "first": 0.1, "second": 0.2}, {"key": "seed", "second": 1}]
    assert found["cluster"] == [{"key": "nodes", "first": 2, "second": 4}]
    assert found["code"] == [{"key": "dirty", "first": False, "second": True}]
    assert found["files"] == ["my.py", "new.bin"]
    assert {"key": "test/accuracy", "second": 0.5} in found["results"]
    assert main(["diff", "one", "two"]) == 0
    assert "recipe.seed: (absent) -> 1\n" in capsys.readouterr().out
    assert main(["diff", "one", "two", "--code"]) == 0
    patch = capsys.readouterr().out
    assert "--- one/my.py\n+++ two/my.py\n@@ -1 +1 @@\n-lr = 1\n+lr = 2\n" in patch
    assert "Binary files one/new.bin and two/new.bin differ" in patch
    assert main(["diff", "one", "one"]) == 0
    assert capsys.readouterr().out == "one and one do not differ\n"


def test_watch_prints_a_snapshot_where_there_is_no_terminal(some, capsys):
    rows = [json.dumps({"step": step, "attempt": 1, "train/loss": 1 / (step + 1)}) + "\n" for step in range(50)]
    put(some / "c-stopped", {"metrics.jsonl": "".join(rows), "attempts/0002/rank-0.log": "the last line\n"})
    assert main(["watch", "c-stopped"]) == 0
    out = capsys.readouterr().out
    assert "step           40/100" in out
    assert "loss, steps 0 to 49: last 0.0200, least 0.0200" in out
    assert "the last line" in out
    assert not any("\u2500" <= character <= "\u28ff" for character in out), "neither rules nor a curve"
    assert main(["watch", "--once", "a-done", "b-failed"]) == 0
    head, *rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert head == ["run", "state", "step", "loss", "samples/s", "left", "last sign"]
    assert [row[:3] for row in rows] == [["a-done", "finished", "100/100"], ["b-failed", "failed", "-"]]
    assert main(["watch"]) == 0
    assert "no run is alive" in capsys.readouterr().out


def test_watch_on_a_terminal_ends_at_q(some):
    main_end, other_end = pty.openpty()
    command = [sys.executable, "-m", "paperscale", "watch", "c-stopped"]
    process = subprocess.Popen(command, stdin=other_end, stdout=other_end, stderr=other_end)
    os.close(other_end)
    shown = b""
    deadline = time.monotonic() + 20
    while b"q ends this" not in shown and time.monotonic() < deadline:
        if select.select([main_end], [], [], 0.2)[0]:
            shown += os.read(main_end, 65536)
    os.write(main_end, b"q")
    assert process.wait(20) == 0
    os.close(main_end)
    assert b"c-stopped" in shown
    assert b"\x1b[?1049h" in shown, "on a screen of its own, so that the terminal is as it was"


def test_a_running_job_is_seen_saved_and_stopped(submit_tiny, capsys):
    """On real processes: the agents see the switches within a second."""
    run = submit_tiny("live", "tracking.enabled=false", callbacks=(callback("Slowly", seconds=0.5),))
    wait_for(lambda: run.read_json("progress.json").get("step", 0) >= 2, 60, "the first steps")
    assert main(["checkpoint", "save", "live", "--timeout", "30", "--json"]) == 0
    saved = json.loads(capsys.readouterr().out)["checkpoint"]
    assert (run.checkpoints / saved / "manifest.json").exists()
    assert main(["status", "live", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["state"], facts["checkpoint"], facts["stale"]) == ("running", saved, False)
    assert facts["eta_s"] is not None
    assert not facts["heartbeats"][0]["stale"]
    assert main(["watch"]) == 0
    assert "live" in capsys.readouterr().out
    assert main(["cancel", "live", "--save", "--timeout", "60"]) == 0
    assert "cancelled live; its newest checkpoint is step-" in capsys.readouterr().out
    assert ended(run) == "cancelled"
    assert len(run.attempts()) == 1
    step = run.read_json("progress.json")["step"]
    assert f"step-{step:08d}" == max(path.name for path in run.checkpoints.glob("step-*"))
    assert not (run.path / "stop").exists(), "a resume is not stopped by it"
    assert not (run.path / "save").exists()


@pytest.mark.slow
def test_a_job_that_does_not_save_in_time_is_told(submit_tiny, capsys):
    run = submit_tiny("slow", "tracking.enabled=false", callbacks=(callback("Slowly", seconds=5),))
    wait_for(lambda: run.attempts() and run.attempts()[0].ranks(), 60, "the ranks")
    assert main(["checkpoint", "save", "slow", "--timeout", "1"]) == 2
    assert "has written no checkpoint within 1 s" in capsys.readouterr().err
    assert not (run.path / "save").exists(), "the request is withdrawn"
    assert main(["cancel", "slow", "--save", "--timeout", "1"]) == 2
    assert "`paperscale cancel slow` ends it without a checkpoint" in capsys.readouterr().err


def test_times_and_curves_are_written_as_people_read_them():
    assert [duration(s) for s in (0, 119, 120, 3900, 90000)] == ["0 s", "119 s", "2 min", "1 h 05 min", "1 d 1 h"]
    assert curve([], 10, 2) == []
    assert curve([float("nan")], 10, 2) == []
    drawn = curve([1.0] * 3 + [float("inf"), 0.0], 10, 2)
    assert [len(line) for line in drawn] == [3, 3]
    assert drawn[0] == "\u2809\u2801\u2800"
    assert len(curve(list(range(1000)), 10, 2)[0]) == 10
    with pytest.raises(UserError, match="write 30m"):
        Wanted(since="x") and listing(Wanted(since="x"))
