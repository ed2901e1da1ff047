"""Strategies at submission and at resumption: what is refused before the queue, what a run is changed to."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from helpers import trained_samples
from jobs.conftest import ended
from jobs.folders import write_attempt, write_checkpoint, write_run
from paperscale.cli import main
from paperscale.errors import UserError
from paperscale.jobs.report import lines, report
from paperscale.jobs.resume import resume
from paperscale.jobs.run import Run
from paperscale.jobs.strategy_checks import check_strategy, element_wise
from paperscale.jobs.submit import Shape
from paperscale.jobs.validation import Place, Validator
from paperscale.papers.resnet import ResNetClassifier
from paperscale.recipes import RecipeArguments
from paperscale.training.strategies import NAMES

CPUS, GPUS = Place(1, 2), Place(2, 4, 4, 80 << 30)
QUIET = ("tracking.enabled=false", "test_after_fit=false")


class WithOptimizer(ResNetClassifier):
    """Configures another optimizer.

    Args:
        network: maps images to logits.
        name: of a class of torch.optim, or of ``paperscale.nn.optimizers``.
        classes: of the images.
    """

    def __init__(self, network: nn.Module, name: str = "AdamW", classes: int = 8):
        super().__init__(network, classes=classes)
        self.name = name

    def configure_optimizers(self) -> Any:
        from paperscale.nn import optimizers

        return (getattr(torch.optim, self.name, None) or getattr(optimizers, self.name))(self.parameters(), lr=1e-3)


class Two(ResNetClassifier):
    """Two optimizers, and Lightning is to step them."""

    def configure_optimizers(self) -> Any:
        halves = list(self.parameters())[::2], list(self.parameters())[1::2]
        return [torch.optim.Adam(half) for half in halves]


class ByHand(Two):
    """Two optimizers that it steps itself."""

    def __init__(self, network: nn.Module, classes: int = 8):
        super().__init__(network, classes=classes)
        self.automatic_optimization = False


class Cycle(ResNetClassifier):
    """A schedule that cannot go past its end."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def validate(recipe: Path, *words: str, place: Place = CPUS) -> tuple[str, ...]:
    return Validator(place)(RecipeArguments.parse([str(recipe), *words])).warnings


def model(name: str) -> str:
    return f"model.class_path=test_strategy_options.{name}"


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("deepspeed_zero4", r"there is no such strategy; did you mean 'deepspeed_zero\d'\?"),
        ("nonsense", "there is no such strategy; use one of ddp, fsdp, deepspeed_zero1"),
        ("deepspeed", "use trainer.strategy=deepspeed_zero2$"),
        ("deepspeed_stage_2", "use trainer.strategy=deepspeed_zero2$"),
        ("deepspeed_stage_3_offload", "use trainer.strategy=deepspeed_zero3_offload$"),
        ("deepspeed_stage_3_offload_nvme", "use trainer.strategy=deepspeed_zero3_nvme$"),
        ("zero3", "use trainer.strategy=deepspeed_zero3$"),
        ("fsdp2", "use trainer.strategy=fsdp$"),
        ("ddp_fork", "the job starts the processes; use trainer.strategy=ddp$"),
        ("xla", "there is no such strategy; use one of"),
        (
            Namespace(class_path="lightning.pytorch.strategies.DeepSpeedStrategy"),
            r"=deepspeed_zero2, or .*\.ZeroStrategy$",
        ),
        (Namespace(class_path="lightning.pytorch.strategies.FSDPStrategy"), r"=fsdp, or .*\.FSDP2Strategy$"),
    ],
)
def test_a_strategy_that_cannot_run_is_refused_with_the_one_that_can(strategy, message):
    with pytest.raises(UserError, match=message):
        check_strategy(strategy, 2)


def test_every_strategy_is_let_through(tiny_recipe):
    for strategy in (*NAMES, "auto", "ddp_find_unused_parameters_true"):
        assert check_strategy(strategy, CPUS.world_size).name == strategy.replace("auto", "ddp")
    for place in (CPUS, GPUS):
        words = ("trainer.strategy=deepspeed_zero3_offload", "data.global_batch_size=64")
        assert validate(tiny_recipe, *words, place=place) == ()


def test_a_strategy_may_be_a_class_with_options(tiny_recipe):
    zero = "{class_path: paperscale.training.strategies.ZeroStrategy, init_args: {stage: 3, offload_optimizer: cpu}}"
    assert validate(tiny_recipe, f"trainer.strategy={zero}") == ()
    with pytest.raises(UserError, match=r"stage: '7' is none of 1, 2, 3; use one"):
        validate(tiny_recipe, f"trainer.strategy={zero.replace('3', '7')}")
    with pytest.raises(UserError, match=r"unknown key 'stages' of ZeroStrategy, .*; did you mean 'stage'\?"):
        validate(tiny_recipe, f"trainer.strategy={zero.replace('stage', 'stages')}")


def test_a_strategy_without_its_package_is_refused(tiny_recipe, monkeypatch):
    """Stood in for: an installation without DeepSpeed."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"deepspeed_zero2 needs .* `pip install deepspeed`, or use .*=fsdp$"):
        validate(tiny_recipe, "trainer.strategy=deepspeed_zero2")


def test_a_strategy_that_divides_says_so_where_there_is_nothing_to_divide(tiny_recipe):
    (warning,) = validate(tiny_recipe, "trainer.strategy=fsdp", place=Place())
    assert warning.startswith("trainer.strategy=fsdp has nothing to divide on one process; --nodes and")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("trainer.precision=16-mixed",), "needs a GPU; on CPUs use trainer.precision=bf16-mixed$"),
        (("trainer.precision=64-true",), "DeepSpeed, .* has no such precision; use trainer.precision=bf16-mixed"),
        (("trainer.gradient_clip_val=1", "trainer.gradient_clip_algorithm=value"), "use .*_algorithm=norm, or .*fsdp$"),
        ((model("ByHand"),), r"model ByHand steps 2 optimizers by hand, .*; use trainer.strategy=ddp or .*=fsdp$"),
        ((model("Two"),), "model Two has 2 optimizers, .*; set `self.automatic_optimization = False`"),
        (
            (model("WithOptimizer"), "model.name=Adafactor"),
            "optimizer Adafactor of model WithOptimizer .*; use one that",
        ),
    ],
)
def test_what_zero_cannot_do_is_refused_before_the_queue(tiny_recipe, words, message):
    with pytest.raises(UserError, match=message):
        validate(tiny_recipe, "trainer.strategy=deepspeed_zero2", *words)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_models_that_step_their_optimizers_by_hand_train_with_ddp_and_fsdp(tiny_recipe, strategy):
    """But nothing that Lightning would do at its own steps."""
    words = (f"trainer.strategy={strategy}", model("ByHand"))
    assert validate(tiny_recipe, *words) == ()
    with pytest.raises(UserError, match=r"leave it out, and call `self\.clip_gradients`"):
        validate(tiny_recipe, *words, "trainer.gradient_clip_val=1")
    with pytest.raises(UserError, match=r"cannot be accumulated over 4 passes; leave data.micro_batch_size out, or"):
        validate(tiny_recipe, *words, "data.micro_batch_size=4")


def test_an_optimizer_that_looks_at_whole_tensors_is_known_by_trying_it():
    def one(kind: Any, **arguments: Any) -> bool | None:
        return element_wise(kind([nn.Parameter(torch.zeros(2, 2))], **arguments))

    for kind in (torch.optim.SGD, torch.optim.AdamW, torch.optim.NAdam, torch.optim.Rprop, torch.optim.Adagrad):
        assert one(kind, lr=1e-9) is True, kind
    for kind in (torch.optim.Adafactor, torch.optim.LBFGS):
        assert one(kind) is False, kind
    assert one(torch.optim.SparseAdam) is None


def test_lamb_and_lars_are_made_for_parts(tiny_recipe):
    for name in ("Lamb", "Lars"):
        words = ("trainer.strategy=deepspeed_zero3", model("WithOptimizer"), f"model.name={name}")
        assert validate(tiny_recipe, *words) == ()


# -- resuming ----------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(runs: Path, tiny_recipe: Path):
    """Write a run that has stopped after two of three epochs, or finished."""

    def write(name: str, *words: str, finished: bool = False, **info: Any) -> Run:
        recipe = Validator(CPUS)(RecipeArguments.parse([str(tiny_recipe), *words])).recipe
        progress = {"step": 24 if finished else 16, "epoch": 3 if finished else 2, "time": 0.0}
        files: dict[str, Any] = {"recipe.yaml": recipe, "progress.json": progress, "job": "999999@1"}
        if finished:
            files["results.json"] = {"test/accuracy": 0.5}
        about = {"engine": "local", "cluster": "local", "nodes": 1, "procs_per_node": 2, "workdir": str(Path.cwd())}
        run = write_run(runs, name, files=files, **{**about, **info})
        write_attempt(run, 1, exit_code="75\n")
        write_checkpoint(run, progress["step"])
        return run

    return write


def test_a_resume_that_cannot_be_is_refused_and_changes_nothing(stopped, capsys):
    run = stopped("one", model("Cycle"))
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    for words, message in (
        (["--strategy", "deepspeed_zero"], "there is no such strategy; did you mean 'deepspeed_zero"),
        (["--strategy", "deepspeed_stage_2"], "use trainer.strategy=deepspeed_zero2"),
        (["--strategy", "deepspeed_zero2", "trainer.strategy=ddp"], "trainer.strategy is set twice"),
        (["model.lr=1"], "model.lr: a run keeps its recipe but for trainer.max_epochs, trainer.max_steps, "),
        (["--trainer.max_epoch", "4"], "did you mean 'trainer.max_epochs'?"),
        (["trainer.max_epochs=4"], "OneCycleLR ends with the length that the training was begun with, and cannot"),
        (["more"], "'more' is not a key with a value; write for example `paperscale resume one trainer.max_epochs=20`"),
        (["--procs-per-node", "33"], "use at most 32 processes or a larger data.global_batch_size, such as --nodes 1"),
        (["--time", "1:00"], "--time: the local cluster sets no limits"),
    ):
        assert main(["resume", "one", *words]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def test_a_finished_run_says_how_it_is_trained_longer(stopped, capsys):
    stopped("done", finished=True)
    for words, message in (
        ([], "train it longer with `paperscale resume done trainer.max_epochs=N` (or trainer.max_steps), or submit"),
        (["trainer.max_steps=100"], "has trained 3 epochs and trainer.max_epochs is 3; raise that too, as in `papersc"),
    ):
        assert main(["resume", "done", *words]) == 2
        assert message in capsys.readouterr().err


def test_a_run_that_trains_here_changes_its_strategy_but_not_its_shape(stopped, capsys):
    stopped("here", engine="here", cluster="here", procs_per_node=1)
    for words, message in (
        (["--nodes", "2"], "run 'here' trains here in one process; submit it to a cluster for more"),
        (["--strategy", "zero2"], "use trainer.strategy=deepspeed_zero2"),
        (["--json"], "leave --json out"),
    ):
        assert main(["resume", "here", *words]) == 2
        assert message in capsys.readouterr().err


def test_a_strategy_is_an_option_of_fit_and_submit(runs, tiny_recipe, capsys):
    assert main(["fit", str(tiny_recipe), "--strategy", "fsdp", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["strategy"] == "fsdp"
    for words, message in (
        (["submit", "--strategy", "zero2"], "use trainer.strategy=deepspeed_zero2"),
        (["submit", "--strategy", "ddp", "trainer.strategy=fsdp"], "--strategy and trainer.strategy set the same key"),
        (["submit", "--strategy", "ddp", "--sweep", "trainer.strategy=[ddp,fsdp]"], "set the same key"),
        (["submit", "--json", "--dry-run"], "leave one of the two out"),
    ):
        assert main([words[0], str(tiny_recipe), *words[1:]]) == 2
        assert message in capsys.readouterr().err
    assert not runs.exists()


@pytest.mark.slow
def test_a_finished_run_is_trained_longer_with_another_strategy(submit_tiny, capsys):
    """On the samples of an uninterrupted run; each attempt keeps what it ran with and what came of it."""
    words = (*QUIET, "model.milestones=[]", "trainer.max_epochs=1")
    whole = submit_tiny("whole", *words, "trainer.max_epochs=2")
    assert ended(whole) == "finished"
    run = submit_tiny("run", *words)
    assert ended(run) == "finished"
    first = run.read_json("results.json")
    assert main(["resume", "run", "--strategy", "fsdp", "trainer.max_epochs=2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"run": "run", "job": run.job}
    assert ended(run) == "finished", run.attempts()[-1].error
    assert trained_samples(run) == trained_samples(whole)
    assert run.read_json("results.json") != first == json.loads((run.attempts()[0].path / "results.json").read_text())
    kept = yaml.safe_load((run.attempts()[0].path / "recipe.yaml").read_text())["trainer"]
    now = yaml.safe_load(run.recipe.read_text())["trainer"]
    assert [(trainer["strategy"], trainer["max_epochs"]) for trainer in (kept, now)] == [("auto", 1), ("fsdp", 2)]
    facts = report(run)
    assert facts["strategy"] == "fsdp"
    assert [one["strategy"] for one in facts["attempts"]] == ["ddp", "fsdp"]
    shown = [value for _, value in lines(facts)]
    assert any(value.endswith("1 x 2 processes, fsdp") for value in shown)
    assert any(value.startswith("1 finished") and value.endswith("on 1 x 2 processes, ddp") for value in shown)
    resume(run, Shape(procs_per_node=1), ["trainer.strategy=auto", "trainer.max_epochs=3", "data.micro_batch_size=8"])
    assert ended(run) == "finished"
    assert [one["procs_per_node"] for one in report(run)["attempts"]] == [2, 2, 1]
    assert len(trained_samples(run)) == 24
