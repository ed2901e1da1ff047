"""Run directories as jobs leave them, without the jobs."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paperscale.jobs.run import Attempt, Run, RunInfo
from paperscale.training.checkpoint import publish


def write_run(runs: Path, name: str, *, files: dict[str, Any] | None = None, **info: Any) -> Run:
    """Write a run's directory; a file's content is text, or what its JSON holds."""
    fixed = RunInfo(name, "tiny", "slurm-dev", "slurm", 2, 1, f"id-{name}", time.time(), "paperscale submit", "/")
    run = Run(runs / name)
    (run.path / "attempts").mkdir(parents=True)
    run.checkpoints.mkdir()
    put(run.path, {"run.json": {**asdict(fixed), **info}, "recipe.yaml": "model: {}\n", **(files or {})})
    return run


def write_attempt(run: Run, number: int, **files: Any) -> Attempt:
    """Write an attempt."""
    attempt = Attempt(run.path / "attempts" / f"{number:04d}")
    attempt.path.mkdir()
    put(attempt.path, {"attempt.json": {"started": time.time() - 600, "host": "n1"}, **files})
    return attempt


def put(folder: Path, files: dict[str, Any]) -> None:
    """Write files."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def progress(step: int = 40, **changes: Any) -> dict[str, Any]:
    """Return the content of ``progress.json``."""
    facts = {"attempt": 1, "step": step, "total_steps": 100, "epoch": 2, "consumed": 32 * step, "loss": 0.5}
    return {**facts, "samples_per_s": 1234.5, "eta_s": 60, "time": time.time(), **changes}


def write_checkpoint(run: Run, step: int, content: str = "weights") -> Path:
    """Write a checkpoint with a manifest that fits it."""
    import hashlib

    folder = run.checkpoints / f"step-{step:08d}"
    partial = folder.with_name(f".{folder.name}.partial")
    put(partial, {"state.pt": content})
    listed = {"state.pt": {"bytes": len(content), "sha256": hashlib.sha256(content.encode()).hexdigest()}}
    publish(partial, folder, listed, {"step": step, "consumed": 0, "world_size": 2})
    return folder
