"""What tests look for in a run on SLURM."""

from __future__ import annotations

from helpers import equal, final_state, rows, trained_samples, wait_for
from jobs.conftest import ended
from paperscale.jobs.run import Run


def at_least(run: Run, step: int) -> None:
    """Wait until a run has made a step."""
    wait_for(lambda: run.read_json("progress.json").get("step", 0) >= step, what=f"step {step} of {run.name}")


def log(run: Run) -> str:
    """Return what the job script has said."""
    return (run.path / "job.log").read_text()


def as_uninterrupted(run: Run, whole: Run, attempts: int = 2, seconds: float = 120) -> None:
    """The run finishes, and all is as if it had not been interrupted: bit for bit."""
    assert ended(run, seconds) == "finished", log(run)
    assert len(run.attempts()) == attempts, log(run)
    assert run.attempts()[-1].facts["resumed_from"] is not None
    assert equal(final_state(run), final_state(whole)), "bit for bit"
    assert rows(run) == rows(whole)
    assert trained_samples(run) == trained_samples(whole)
