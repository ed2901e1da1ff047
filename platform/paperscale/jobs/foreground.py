"""``paperscale fit``: the same run and the same worker, in this process, without a job."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from paperscale.errors import FINISHED, OUT_OF_MEMORY, REQUEUE, ROLLBACK, USER_ERROR, UserError
from paperscale.jobs.engines import process_id
from paperscale.jobs.run import Attempt, Run, RunInfo, free_name, refuse_taken
from paperscale.jobs.submit import new_run, resolve
from paperscale.recipes import RecipeArguments
from paperscale.tracking.identity import new_id
from paperscale.training import signals
from paperscale.training.memory import keep_freed_memory


def fit(recipe: RecipeArguments, name: str | None, command: str) -> int:
    """Create a run and train it here; return the exit code.

    Raises:
        UserError: the recipe is wrong, its shards are missing, the name is taken, or a job of SLURM's that this is part
            of has several tasks.
    """
    if refuse_many_tasks(command):
        return USER_ERROR
    if name:
        refuse_taken(name)
    resolved = resolve(recipe, world_size=1)
    base = recipe.recipe.stem
    info = RunInfo(name or free_name(base), base, "here", "here", 1, 1, new_id(), time.time(), command, str(Path.cwd()))
    with new_run(info, resolved) as run:
        return train_here(run)


def refuse_many_tasks(command: str) -> bool:
    """Refuse a job with several tasks: ``fit`` is one process, and each task would train for itself.

    Returns:
        Whether this is one of several tasks that need not say it again.

    Raises:
        UserError: names the command that uses the whole job.
    """
    asked = os.environ
    in_step = "SLURM_STEP_ID" in asked and "SLURM_PROCID" in asked
    tasks = int(asked.get("SLURM_STEP_NUM_TASKS" if in_step else "SLURM_NTASKS", 1))
    nodes = int(asked.get("SLURM_STEP_NUM_NODES" if in_step else "SLURM_JOB_NUM_NODES", 1))
    tasks = max(tasks, nodes)
    if "SLURM_JOB_ID" not in asked or tasks == 1:
        return False
    if in_step and asked["SLURM_PROCID"] != "0":
        return True
    gpus = re.search(r"\d+$", asked.get("SLURM_GPUS_PER_NODE", ""))
    shape = f"--cluster slurm --nodes {nodes} --procs-per-node {tasks // nodes}"
    shape += f" --gpus-per-node {gpus[0]}" if gpus else ""
    whole = command.replace("paperscale fit", "paperscale submit", 1)
    raise UserError(
        f"this job has {tasks} tasks on {nodes} nodes, and `paperscale fit` is one process: the others would idle, or "
        f"each would train for itself; let Paperscale start them with `{whole} {shape}` from a login node, or ask "
        "for one task, as in `srun --ntasks=1 --nodes=1`"
    )


class _Tee:
    """Writes to the terminal and to the attempt's log."""

    def __init__(self, terminal: TextIO, log: TextIO):
        self.terminal, self.log = terminal, log

    def write(self, text: str) -> int:
        """Write to both."""
        self.log.write(text)
        return self.terminal.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.terminal, name)


def train_here(run: Run) -> int:
    """Train a run in this process; Ctrl-C checkpoints and stops."""
    signals.install()
    keep_freed_memory()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "SLURM_STEP_ID"):
        os.environ.pop(name, None)  # a shell inside a job may carry another job's
    run.set_job(process_id(os.getpid()))
    print(f"run {run.name} in {run.path}")
    while (code := _attempt(run)) in (ROLLBACK, OUT_OF_MEMORY):
        gc.collect()  # what the attempt has left on the device
    if code == REQUEUE:
        print(f"stopped; continue with `paperscale resume {run.name}`")
    elif code != FINISHED:
        print(f"failed; what was saved is in {run.path}", file=sys.stderr)
    return code


def _attempt(run: Run) -> int:
    """Carry out one attempt; return its exit code."""
    from paperscale.jobs import worker

    attempt = Attempt(run.path / "attempts" / f"{len(run.attempts()) + 1:04d}")
    attempt.path.mkdir()
    with attempt.log().open("a", buffering=1) as log:
        out, err = _Tee(sys.stdout, log), _Tee(sys.stderr, log)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = worker.main(str(run.path), attempt.number)
    (attempt.path / "exit_code").write_text(f"{code}\n")
    return code
