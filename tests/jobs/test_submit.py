"""What a submission refuses before anything is written or queued, and what it warns of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from helpers import BUILT_ON, wait_for
from jobs.conftest import callback, ended
from paperscale.cli import main
from paperscale.errors import UserError
from paperscale.jobs import submit as submission
from paperscale.jobs.engines import Local
from paperscale.jobs.resume import resume
from paperscale.jobs.status import status
from paperscale.jobs.submit import Shape
from paperscale.jobs.validation import Place, Validator, nearest_divisors
from paperscale.recipes import RecipeArguments

GPUS = Place(2, 4, 4, 80 << 30)
CPUS = Place(2, 4)


def validate(recipe: Path, *words: str, place: Place = CPUS) -> tuple[str, ...]:
    return Validator(place)(RecipeArguments.parse([str(recipe), *words])).warnings


@pytest.mark.parametrize(
    ("word", "place", "message"),
    [
        ("trainer.strategy=dpp", CPUS, "there is no such strategy; did you mean 'ddp'?"),
        ("trainer.strategy=ddp_spawn", CPUS, "the job starts the processes; use trainer.strategy=ddp"),
        ("trainer.strategy=single_device", CPUS, "for one process, this job has 8; use trainer.strategy=ddp"),
        ("trainer.precision=16-mixed", CPUS, "needs a GPU; on CPUs use trainer.precision=bf16-mixed"),
        ("trainer.precision=transformer-engine", GPUS, "needs the package transformer_engine, which is not installed"),
        ("trainer.accelerator=gpu", CPUS, "this job has no GPUs; ask for them with --gpus-per-node"),
        ("trainer.max_epochs=1", Place(1, 8, 4), "8 processes on a node with 4 GPUs: .* use --procs-per-node 4, or"),
        ("trainer.max_steps=-5", CPUS, "max_steps=-5: .* use a number of at least 1, or -1 for no limit"),
        ("trainer.max_epochs=0", CPUS, "max_epochs=0: .* use a number of at least 1, or -1 for no limit"),
        ("trainer.devices=2", CPUS, "use --nodes and --procs-per-node"),
        ("data.global_batch_size=6", CPUS, "such as --nodes 1 --procs-per-node 4"),
        ("data.global_batch_size=3", CPUS, "such as --nodes 1 --procs-per-node 3"),
    ],
)
def test_what_cannot_run_there_is_refused_with_the_fix(tiny_recipe, word, place, message):
    with pytest.raises(UserError, match=message):
        validate(tiny_recipe, word, place=place)


@pytest.mark.parametrize(
    ("word", "place"),
    [
        ("trainer.strategy=ddp", Place()),
        ("trainer.strategy=ddp_find_unused_parameters_true", CPUS),
        ("trainer.strategy={class_path: paperscale.training.strategies.ExactDDPStrategy}", CPUS),
        ("trainer.strategy=single_device", Place()),
        ("trainer.precision=16-mixed", GPUS),
        ("trainer.precision=bf16-mixed", CPUS),
        ("trainer.accelerator=gpu", GPUS),
        ("trainer.accelerator=cpu", Place(1, 8, 4)),
    ],
)
def test_what_can_run_is_let_through(tiny_recipe, word, place):
    assert validate(tiny_recipe, word, "data.global_batch_size=64", place=place) == ()


def test_a_network_with_fewer_classes_than_the_labels_have_is_refused(tiny_recipe, tiny_shards):
    words = ("model.network.classes=5", "model.classes=5")
    with pytest.raises(UserError, match=f"^{tiny_shards} has 8 classes, model.network.classes=5: set .*classes=8$"):
        validate(tiny_recipe, *words)
    dry = Validator(CPUS, with_data=False)
    assert dry(RecipeArguments.parse([str(tiny_recipe), *words, "data.path=/nowhere", "data.size=8"])).recipe


def test_batch_normalisation_over_few_samples_is_warned_of(tiny_recipe):
    (warning,) = validate(tiny_recipe, place=GPUS)
    assert warning == (
        "batch normalisation over 4 samples, those of a forward pass, costs accuracy: raise data.global_batch_size, or "
        "use fewer GPUs, 4 at most"
    )
    (warning,) = validate(tiny_recipe, "data.micro_batch_size=4", place=Place())
    assert warning.endswith("raise data.micro_batch_size")
    assert validate(tiny_recipe, "trainer.sync_batchnorm=true") == ()
    assert validate(tiny_recipe, "model.network=null", "model.network.class_path=helpers.Linear") == ()


def test_a_batch_that_does_not_divide_evenly_trains_all_the_same_and_is_remarked_on(tiny_recipe):
    (warning,) = validate(tiny_recipe, place=Place(1, 3))
    assert "global_batch_size=32 over 3 processes leaves some waiting" in warning
    assert warning.endswith("2 or 4 processes divide it evenly")
    assert nearest_divisors(36, 10) == (9, 12)


def test_memory_is_compared_with_the_gpus(tiny_recipe):
    """What is certain is refused, what depends on the batch is warned of."""
    small = Place(1, 1, 1, 100 << 10)
    with pytest.raises(UserError, match=r"take .* of a GPU's 0.1 MiB: this model does not fit; use GPUs with more"):
        validate(tiny_recipe, place=small)
    (warning,) = validate(tiny_recipe, place=Place(1, 1, 1, 2 << 20))
    assert "training will take about" in warning
    assert warning.endswith(
        "for 32 samples a pass: set data.micro_batch_size below 32, or speed.activation_checkpointing=blocks"
    )
    assert validate(tiny_recipe, "data.micro_batch_size=8", place=Place(1, 1, 1, 2 << 20)) == ()


def test_models_are_looked_at_without_their_weights_where_they_allow_it(tiny_recipe):
    """One that computes in its constructor is built as it is."""
    BUILT_ON.clear()
    validate(tiny_recipe, "model.class_path=helpers.Noted")
    assert BUILT_ON == ["meta"]
    validate(tiny_recipe, "model.class_path=helpers.Computing")
    assert BUILT_ON == ["meta", "meta", "cpu"]


def test_the_cheap_checks_come_first(runs, tiny_recipe, capsys):
    """A wrong key is named although the shards are missing too; a wrong cluster before either."""
    wrong = [str(tiny_recipe), "trainer.max_epoch=1", "data.path=/nowhere"]
    assert main(["submit", *wrong, "--cluster", "locall"]) == 2
    assert "no cluster profile 'locall'" in capsys.readouterr().err
    assert main(["submit", *wrong]) == 2
    assert "unknown key 'trainer.max_epoch'" in capsys.readouterr().err
    assert not runs.exists()


def test_a_submission_that_fails_leaves_nothing(submit_tiny, runs, monkeypatch):
    def refuse(self, run):
        assert run.script.exists()
        raise UserError("the queue is closed; come back")

    monkeypatch.setattr(Local, "submit", refuse)
    with pytest.raises(UserError, match="the queue is closed"):
        submit_tiny("lost")
    assert list(runs.iterdir()) == []


def test_an_interrupted_submission_leaves_nothing(submit_tiny, runs, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(submission.snapshot, "take", interrupt)
    with pytest.raises(KeyboardInterrupt):
        submit_tiny("lost")
    assert list(runs.iterdir()) == []


def test_what_was_asked_for_is_recorded_with_the_run(submit_tiny):
    run = submit_tiny("facts", "trainer.max_steps=1", "tracking.enabled=false", "test_after_fit=false")
    info = json.loads((run.path / "run.json").read_text())
    assert (info["nodes"], info["procs_per_node"], info["repeat"], info["group"], info["after"]) == (1, 2, 1, "", "")
    assert Path(yaml.safe_load(run.recipe.read_text())["data"]["init_args"]["path"]).is_absolute()
    assert json.loads((run.path / "code.json").read_text())["commit"] == ""
    assert ended(run) == "finished"


@pytest.mark.slow
def test_a_resumed_run_gets_the_script_of_this_release(submit_tiny):
    """And only what it can use: mended mistakes in the script reach runs that were submitted before."""
    run = submit_tiny("old", "tracking.enabled=false", callbacks=(callback("Slowly", seconds=0.2),))
    wait_for(lambda: run.read_json("progress.json").get("step", 0) >= 2)
    assert main(["cancel", "old"]) == 0
    script = run.script.read_text()
    run.script.write_text("#!/bin/bash\nexit 1\n")
    assert resume(run, Shape()) is None
    assert run.script.read_text() == script
    assert status(run).state == "running"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("trainer.max_steps=1.5", "trainer.max_steps: expected int, got '1.5'"),
        ("trainer.precision=8", r"trainer.precision: '8' is none of 64, 32, 16, transformer-engine, .*bf16; use one"),
        ("trainer.precision=bf16-mixd", r"is none of .*; did you mean 'bf16-mixed'\?"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_what_is_allowed(tiny_recipe, word, message):
    with pytest.raises(UserError, match=message):
        validate(tiny_recipe, word)


def test_a_dry_run_checks_all_but_the_data_and_the_cluster(runs, tiny_recipe, capsys):
    words = ["submit", str(tiny_recipe), "data.path=/nowhere", "--dry-run"]
    assert main(words) == 0
    assert main([*words, "--cluster", "slurm", "trainer.accelerator=gpu"]) == 2
    assert "this job has no GPUs" in capsys.readouterr().err
    assert not runs.exists()


def test_a_dry_run_warns_of_the_memory(runs, tiny_recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cluster/profiles").mkdir(parents=True)
    (tmp_path / "cluster/profiles/small.yaml").write_text("gpus_per_node: 1\nnode: {gpus: 1, gpu_memory: 2M}\n")
    assert main(["submit", str(tiny_recipe), "--cluster", "small", "--dry-run"]) == 0
    assert "WARNING training will take about" in capsys.readouterr().err
