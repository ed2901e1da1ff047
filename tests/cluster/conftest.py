"""Runs on a real SLURM of at least two nodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.dev import dev_cluster  # noqa: F401  a fixture
from jobs.conftest import ended, submit_tiny  # noqa: F401  a fixture
from paperscale.jobs.run import Run

Submit = Callable[..., Run]
NO_WANDB = "tracking.enabled=false"

_whole: list[Run] = []


@pytest.fixture
def submit(submit_tiny: Submit, tiny_recipe: Path) -> Submit:  # noqa: F811
    """Submit the tiny recipe to two nodes of one process each; cluster ``watchful`` takes 4 s for a hang."""
    profiles = tiny_recipe.parent / "cluster/profiles"
    profiles.mkdir(parents=True, exist_ok=True)
    (profiles / "watchful.yaml").write_text("extends: slurm-dev\nwatchdog: {hang_s: 4}\n")

    def submit_it(name: str, *words: str, **options: object) -> Run:
        return submit_tiny(name, *words, **{"cluster": "slurm-dev", "nodes": 2, "procs_per_node": 1, **options})

    return submit_it


@pytest.fixture
def whole(submit: Submit) -> Run:
    """The uninterrupted run of two ranks, trained once for all tests."""
    if not _whole:
        run = submit("whole", NO_WANDB)
        assert ended(run) == "finished"
        _whole.append(run)
    return _whole[0]
