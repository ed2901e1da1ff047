"""``paperscale status``: everything about one run, from its directory and its engine."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from paperscale.jobs import queue
from paperscale.jobs.run import EXCLUDED_S, Attempt, Run, RunInfo
from paperscale.jobs.status import STALE_S, RunStatus, status
from paperscale.jobs.words import ago, clock, duration
from paperscale.training.sharding import sharding

_ENDINGS = {
    "": "was killed, with its job script",
    "finished": "finished",
    "failed": "failed",
    "killed": "was killed",
    "time-limit": "came to its time limit",
    "preemption": "was preempted",
    "requeue": "was requeued",
    "cancel": "was cancelled",
    "signal": "was ended by a signal",
    "stop": "was told to stop",
    "lost": "lost a rank",
    "hang": "hung",
    "bad-node": "met a bad node",
    "rollback": "went back",
    "out-of-memory": "ran out of memory",
    "node-failure": "lost its node",
    "unknown": "ended while the controller did not answer",
}

_OF_A_RANK = ("rank", "pid", "step", "phase", "beat", "step_s", "local_s", "state")


def report(run: Run, verify: bool = False, now: RunStatus | None = None) -> dict[str, Any]:
    """Return everything about a run; the keys are those of ``paperscale status --json`` (docs/runs.md).

    Args:
        run: the run.
        verify: read and hash the newest checkpoints rather than compare their files' sizes.
        now: its state, by default asked for.
    """
    now, info, attempts = now or status(run), run.info, run.attempts()
    progress, live = now.progress, now.state == "running"
    return {
        "run": run.name,
        "state": now.state,
        "detail": now.detail,
        **_identity(run, info),
        "strategy": _strategy(run, info),
        "slurm": _slurm(now),
        "attempt": len(attempts),
        "max_attempts": run.max_attempts,
        "attempts": [_attempt(attempt) for attempt in attempts],
        **_progress(progress, live),
        "heartbeats": _heartbeats(attempts, progress) if live or now.state == "unknown" else [],
        "slow_ranks": attempts[-1].stragglers if attempts else [],
        **_checkpoint(run, verify),
        **_excluded(run, now),
        **_failure(run, now, attempts),
        "results": now.results,
        "wandb": {"id": info.wandb_id, "mode": _wandb_mode(run)},
        "directory": str(run.path),
    }


def _identity(run: Run, info: RunInfo) -> dict[str, Any]:
    return {
        "recipe": info.recipe,
        "cluster": info.cluster,
        "engine": info.engine,
        "job": run.job,
        "nodes": info.nodes,
        "procs_per_node": info.procs_per_node,
        "group": info.group,
        "after": info.after,
        "created": info.created,
        "command": info.command,
    }


def _strategy(run: Run, info: RunInfo) -> str:
    """Return how the recipe's processes share the work; empty where it cannot be read."""
    try:
        strategy = yaml.safe_load(run.recipe.read_text())["trainer"]["strategy"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return ""
    if isinstance(strategy, dict):
        return str(strategy["class_path"]).rpartition(".")[2]
    return sharding(strategy, info.nodes * info.procs_per_node).name


def _slurm(now: RunStatus) -> dict[str, Any] | None:
    job = now.job
    if job is None or not job.slurm:
        return None
    return {
        "state": job.slurm,
        "reason": job.reason,
        "meaning": queue.meaning(job.reason),
        "restarts": job.restarts,
        "left_s": job.left_s,
        "start": job.start,
        "nodes": job.nodes,
    }


def _attempt(attempt: Attempt) -> dict[str, Any]:
    facts, ended = attempt.facts, attempt.ended
    return {
        "attempt": attempt.number,
        "cause": attempt.cause,
        "reason": facts.get("reason", ""),
        "error": attempt.error,
        "exit_code": attempt.exit_code,
        "host": facts.get("host", ""),
        "strategy": facts.get("strategy", ""),
        "nodes": facts.get("nodes"),
        "procs_per_node": facts.get("procs_per_node"),
        "started": attempt.started,
        "ended": ended,
        "ran_s": None if ended is None else max(0.0, ended - attempt.started),
        "resumed_from": facts.get("resumed_from"),
    }


def _excluded(run: Run, now: RunStatus) -> dict[str, Any]:
    """Return the nodes that are left out at present, each with until when, and how a job that waits gets them back."""
    latest = {node["host"]: node for node in run.excluded}
    if not latest:
        return {"excluded": [], "lift": ""}
    nodes = [{**node, "until": node["time"] + EXCLUDED_S} for node in latest.values()]
    nodes = [node for node in nodes if node["until"] > time.time()]
    waits = nodes and now.state == "queued" and run.info.engine == "slurm"
    lift = (
        f"to use them again, remove their lines from {run.path / 'excluded'}, "
        f"then `scontrol update JobId={run.job} ExcNodeList=`"
    )
    return {"excluded": nodes, "lift": lift if waits else ""}


def _progress(progress: dict[str, Any], live: bool) -> dict[str, Any]:
    """Return where the training is; what is left counts from now on, and only while it runs."""
    if not progress:
        return {"step": None, "progress": {}, "eta_s": None, "stale": False}
    age = max(0.0, time.time() - progress["time"])
    left = max(0.0, progress["eta_s"] - age) if live and progress.get("eta_s") else None
    return {
        "step": f"{progress['step']}/{progress['total_steps'] or '?'}",
        "progress": {**progress, "age_s": age},
        "eta_s": left,
        "stale": live and age > STALE_S,
    }


def _heartbeats(attempts: list[Attempt], progress: dict[str, Any]) -> list[dict[str, Any]]:
    """Return when each node was last heard of: from its agent, or from rank 0 where there are no agents.

    Of an attempt that has ended nothing more is to be heard.
    """
    if attempts and attempts[-1].exit_code is not None:
        return []
    agents = attempts[-1].nodes() if attempts else []
    if not agents and attempts and progress.get("attempt") == attempts[-1].number:
        agents = [{"node": 0, "host": attempts[-1].facts.get("host", ""), "time": progress["time"]}]
    now = time.time()
    return [
        {
            "node": agent["node"],
            "host": agent["host"],
            "time": agent["time"],
            "age_s": max(0.0, now - agent["time"]),
            "stale": now - agent["time"] > STALE_S,
            "ranks": [{key: rank.get(key) for key in _OF_A_RANK} for rank in agent.get("ranks", [])],
        }
        for agent in agents
    ]


def _checkpoint(run: Run, verify: bool) -> dict[str, Any]:
    """Return the newest checkpoint that is as its manifest says, and what is wrong with newer ones."""
    damaged: list[str] = []
    for folder in sorted(run.checkpoints.glob("step-*"), reverse=True):
        if problem := _problem(folder, verify):
            damaged.append(problem)
        else:
            written = (folder / "manifest.json").stat().st_mtime
            how = "hashes" if verify else "sizes"
            step = int(folder.name.removeprefix("step-"))
            return {
                "checkpoint": folder.name,
                "checkpoint_step": step,
                "checkpoint_time": written,
                "verified": how,
                "damaged": damaged,
            }
    return {
        "checkpoint": None,
        "checkpoint_step": None,
        "checkpoint_time": None,
        "verified": None,
        "damaged": damaged,
    }


def _problem(folder: Path, verify: bool) -> str:
    """Return what is wrong with a checkpoint, empty if nothing is."""
    from paperscale.errors import UserError
    from paperscale.training import checkpoint

    try:
        checkpoint.verify(folder, hashes=verify)
    except UserError as error:
        return f"{folder.name}: {str(error).removeprefix(f'{folder}/')}"
    return ""


def _failure(run: Run, now: RunStatus, attempts: list[Attempt]) -> dict[str, Any]:
    """Return why a run that has ended short of its goal did so, and the log to read."""
    if now.state not in ("failed", "stopped", "cancelled"):
        return {"why": "", "log": None}
    if not attempts:
        log = run.path / "job.log"
        return {"why": run.complaint() or now.detail, "log": str(log) if log.exists() else None}
    last = attempts[-1]
    log = last.log(last.first_rank)
    why = last.error or run.complaint()
    if (
        not why
        and last.exit_code is None
        and run.info.engine == "slurm"
        and (word := queue.how_it_ended(run.job or ""))
    ):
        why = f"SLURM ended the job: {word}"
    return {"why": why or now.detail, "log": str(log if log.exists() else run.path / "job.log")}


def _wandb_mode(run: Run) -> str:
    """Return where the run's W&B files go: ``online``, ``offline``, or ``none`` where it has written none."""
    folder = run.path / "wandb"
    if next(folder.glob("offline-run-*"), None):
        return "offline"
    return "online" if next(folder.glob("run-*"), None) else "none"


def lines(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a report as names and values for people; an empty name continues the line before."""
    yield "run", facts["run"]
    yield "state", facts["state"] + (f" ({facts['detail']})" if facts["detail"] else "")
    if facts["job"]:
        yield "job", f"{facts['job']} on {facts['cluster']}, {_shape(facts)}"
    yield from _lines_of_queue(facts)
    yield from _lines_of_attempts(facts)
    yield from _lines_of_progress(facts)
    yield from _lines_of_nodes(facts)
    yield from _lines_of_checkpoint(facts)
    for node in facts["excluded"]:
        why = f"{node['reason']}, until {clock(node['until'])}".removeprefix(", ")
        yield "excluded", f"{node['host']} is left out ({why})"
    if facts["lift"]:
        yield "", facts["lift"]
    if facts["why"]:
        yield "why", facts["why"]
    if facts["log"]:
        yield "log", facts["log"]
    if facts["state"] in ("failed", "stopped", "cancelled"):
        first = "once that is mended, " if facts["state"] == "failed" else ""
        where = f"from {facts['checkpoint']}" if facts["checkpoint"] else "at the start"
        if facts["damaged"] and not facts["checkpoint"]:
            yield "next", "no checkpoint is whole: restore one from a copy, or empty the folder to begin anew"
        else:
            yield "next", f"{first}`paperscale resume {facts['run']}` continues {where}"
    for name, value in facts["results"].items():
        yield name, f"{value:.4f}"
    yield "W&B", f"{facts['wandb']['id']}, {facts['wandb']['mode']}"
    yield "directory", facts["directory"]


def _lines_of_queue(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Say when SLURM starts the job, or what comes at its time limit."""
    slurm = facts["slurm"]
    if slurm and facts["state"] == "queued":
        start = slurm["start"]
        yield "starts", f"about {clock(start)}, as SLURM estimates" if start else "SLURM has made no estimate yet"
    elif slurm and slurm["left_s"] is not None:
        limit = time.time() + slurm["left_s"]
        end = f"at {clock(limit)}, in {duration(slurm['left_s'])}"
        if facts["eta_s"] and facts["eta_s"] > slurm["left_s"]:
            end += ": it writes a checkpoint before, and is queued again"
        yield "time limit", end


def _lines_of_attempts(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Say which attempt it is, and how and after how long each earlier one ended."""
    if not facts["attempts"]:
        return
    last, text = facts["attempts"][-1], str(facts["attempt"])
    text += f" of at most {facts['max_attempts']}" if facts["max_attempts"] else ""
    running = last["ended"] is None and facts["state"] in ("running", "unknown")
    if running:
        origin = f"from {last['resumed_from']}" if last["resumed_from"] else "from the start"
        text += f", for {duration(time.time() - last['started'])} now, {origin}"
    yield "attempt", text
    for one in facts["attempts"][:-1] if running else facts["attempts"]:
        how = _ENDINGS.get(one["cause"], one["cause"])
        ran = "" if one["ran_s"] is None else f" after {duration(one['ran_s'])}"
        why = one["error"] or one["reason"]
        where = f", on {_shape(one)}" if one["strategy"] and _shape(one) != _shape(facts) else ""
        yield "", f"{one['attempt']} {how}{ran}{where}" + (f": {why}" if why else "")


def _shape(facts: dict[str, Any]) -> str:
    """Return the processes of a job or an attempt, and how they share the work."""
    how = f", {facts['strategy']}" if facts["strategy"] else ""
    return f"{facts['nodes']} x {facts['procs_per_node']} processes{how}"


def _lines_of_progress(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    progress = facts["progress"]
    if not progress:
        return
    age = (
        f"  (as of {duration(progress['age_s'])} ago)"
        if facts["stale"] or facts["state"] in ("unknown", "queued")
        else ""
    )
    yield "step", f"{facts['step']}, epoch {progress['epoch']}, sample {progress['consumed']:,}{age}"
    if progress["loss"] is not None:
        unfit = "" if math.isfinite(progress["loss"]) else "  NOT FINITE"
        yield "loss", f"{progress['loss']:.4f}{unfit}"
    yield "throughput", f"{progress['samples_per_s']:,.1f} samples/s"
    if facts["eta_s"] is not None and not facts["stale"]:
        yield "left", f"{duration(facts['eta_s'])}, until about {clock(time.time() + facts['eta_s'])}"


def _lines_of_nodes(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Say when each node was last heard of and what its ranks did, and which ranks hold up the others.

    Nodes report seconds apart, ranks train in step: the step is told where the newest report is, and where a node
    has fallen silent. A rank that has made no step in this attempt does not know the run's step yet.
    """
    attempts = facts["attempts"]
    if attempts and attempts[-1]["exit_code"] is not None and facts["state"] in ("running", "unknown"):
        yield "heartbeat", f"none: attempt {facts['attempt']} has ended and waits to be requeued"
    knowing = [beat["time"] for beat in facts["heartbeats"] if any(rank["step"] for rank in beat["ranks"])]
    for index, beat in enumerate(facts["heartbeats"]):
        with_step = beat["stale"] or beat["time"] == max(knowing, default=None)
        doing = sorted({_doing(rank, with_step) for rank in beat["ranks"]})
        text = f"{beat['host'] or 'rank 0'} {duration(beat['age_s'])} ago" + (f": {', '.join(doing)}" if doing else "")
        yield "heartbeat" if index == 0 else "", text + ("  STALE" if beat["stale"] else "")
    for slow in facts["slow_ranks"]:
        times = f"{slow['slower']:.1f} times" if slow.get("slower") else "behind"
        yield "slow rank", f"rank {slow['rank']} on {slow['host']}: {times} the others' {slow['what']}"


def _doing(rank: dict[str, Any], with_step: bool) -> str:
    return f"{rank['phase']} of step {rank['step'] + 1}" if with_step and rank["step"] else str(rank["phase"])


def _lines_of_checkpoint(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for problem in facts["damaged"]:
        yield "DAMAGED", problem
    if facts["checkpoint"]:
        how = "every file hashed" if facts["verified"] == "hashes" else "complete"
        yield "checkpoint", f"{facts['checkpoint']}, {how}, written {ago(facts['checkpoint_time'])}"
    elif facts["damaged"]:
        yield "checkpoint", "none that is complete"
