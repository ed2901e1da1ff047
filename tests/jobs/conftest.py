"""A way to submit the tiny recipe to the local cluster, with processes that do not outlive the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers import wait_for
from paperscale.jobs.engines import ENGINES
from paperscale.jobs.run import Run
from paperscale.jobs.status import LIVE, status
from paperscale.jobs.submit import Shape, Turn, submit
from paperscale.recipes import RecipeArguments

Submit = Callable[..., Run]


@pytest.fixture
def submit_tiny(runs: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Submit]:
    """Submit the tiny recipe; ``callbacks`` are appended to a log of samples."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.chdir(tiny_recipe.parent)
    submitted: list[Run] = []

    def submit_it(
        name: str, *words: str, callbacks: tuple[str, ...] = (), turn: Turn | None = None, **shape: object
    ) -> Run:
        listed = ", ".join(["{class_path: helpers.SampleLog}", *callbacks])
        arguments = RecipeArguments.parse([str(tiny_recipe), f"trainer.callbacks=[{listed}]", *words])
        asked = Shape(**{"cluster": "local", "procs_per_node": 2, **shape})  # type: ignore[arg-type]
        run = submit(arguments, asked, name, False, "test", turn)
        assert isinstance(run, Run)
        submitted.append(run)
        return run

    yield submit_it
    for run in submitted:
        if status(run).state in LIVE:
            (run.path / "cancelled").write_text("the end of the test")
            ENGINES[run.info.engine].cancel(run)


def ended(run: Run, seconds: float = 120) -> str:
    """Wait until a run's job has ended; return the run's state."""
    engine = ENGINES[run.info.engine]
    wait_for(lambda: engine.state(run.job or "").state == "gone", seconds, f"end of {run.name}")
    return status(run).state


def callback(name: str, **arguments: object) -> str:
    """Return a callback of ``helpers`` as a recipe names it."""
    inside = ", ".join(f"{key}: {value}" for key, value in arguments.items())
    return f"{{class_path: helpers.{name}, init_args: {{{inside}}}}}"
