"""A run that begins with the weights of another, which has not finished when it is submitted."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import losses
from jobs.conftest import callback, ended
from paperscale.cli import main
from paperscale.errors import UserError
from paperscale.jobs.checkpoints import promised
from paperscale.jobs.run import Run, find_run

SLOWLY = f"trainer.callbacks=[{callback('Slowly', seconds=0.1)}]"


@pytest.mark.slow
def test_it_waits_and_begins_with_the_last_weights(submit_tiny, tiny_recipe: Path, runs: Path, capsys):
    first = submit_tiny("first", SLOWLY, "tracking.enabled=false", procs_per_node=1)
    words = [str(tiny_recipe), "tracking.enabled=false", "--name", "second", "--after", "first", "--init-from", "first"]
    assert main(["submit", *words]) == 0
    assert "WARNING" not in capsys.readouterr().err
    second = find_run("second")
    assert f"init_from: {first.path}@last" in second.recipe.read_text()
    assert ended(first) == ended(second) == "finished"
    assert losses(second)[0][1] < losses(first)[0][1]
    said = (second.attempts()[0].path / "rank-0.log").read_text()
    assert f"tensors from {first.checkpoints / 'step-00000024'}" in said


def test_weights_that_would_not_fit_are_refused_before_anything_runs(
    submit_tiny, tiny_recipe: Path, runs: Path, capsys
):
    submit_tiny("first", SLOWLY, "tracking.enabled=false", procs_per_node=1)
    words = ["tracking.enabled=false", "--name", "second", "--after", "first", "--init-from", "first"]
    other = "model.network={class_path: paperscale.papers.resnet.VGG, init_args: {classes: 8, channels: 1}}"
    assert main(["submit", str(tiny_recipe), other, *words]) == 2
    assert "the run first, which is to finish first" in capsys.readouterr().err
    assert not (runs / "second").exists()
    assert main(["cancel", "first"]) == 0


def test_a_step_that_may_not_be_there_is_refused(tmp_path: Path):
    run = Run(tmp_path / "first")
    assert promised("first", run) == promised("first@last", run) == f"{run.path}@last"
    assert promised(f"{run.path}@best", run) == f"{run.path}@best"
    assert promised("other", run) is None
    with pytest.raises(UserError, match=r"first has not finished; name first@last or first@best"):
        promised("first@100", run)
