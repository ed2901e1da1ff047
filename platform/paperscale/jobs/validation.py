"""What can be known of a recipe before a job waits for hours; the cheapest checks come first."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paperscale.errors import UserError
from paperscale.jobs import snapshot
from paperscale.jobs.profile import Profile
from paperscale.jobs.run import Run
from paperscale.jobs.strategy_checks import check_optimizers, check_options, check_strategy
from paperscale.jobs.units import size_bytes
from paperscale.jobs.vocabulary import check_tokenizer, missing
from paperscale.recipes import RecipeArguments
from paperscale.training.checkpoint import RECIPE
from paperscale.training.sharding import Sharding

if TYPE_CHECKING:
    from paperscale.training.weights import Weights

_PRECISIONS = {"16-mixed": "bf16-mixed", "16": "bf16-mixed", "16-true": "bf16-true"}
_ON_GPU = ("gpu", "cuda")
_WRITTEN_FRACTION = re.compile(r"[-+]?(?=.*[.eE])(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_WHOLE = re.compile(r"0|[1-9]\d{0,8}")
_FRACTION = re.compile(r"(\s*\w+: )-?(\d+\.\d*(e[-+]?\d+)?|\d+e[-+]?\d+)\n")  # as it is written into a resolved recipe
SEED = "seed_everything"
FEW = 8
"""Samples of a forward pass below which batch normalisation costs accuracy: 1.2 points of ResNet-50's error on ImageNet
at 8 samples, 3.7 at 4 (Wu & He 2018, table 2)."""

Values = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Place:
    """What a recipe is to run on.

    Attributes:
        nodes: of the job.
        procs_per_node: processes of a node.
        gpus_per_node: GPUs of a node, 0 for none.
        gpu_memory: bytes of a GPU, ``None`` where it is not known.
    """

    nodes: int = 1
    procs_per_node: int = 1
    gpus_per_node: int = 0
    gpu_memory: int | None = None

    @property
    def world_size(self) -> int:
        """Return the number of processes."""
        return self.nodes * self.procs_per_node

    @classmethod
    def of(cls, profile: Profile) -> Place:
        """Return what a job of this profile runs on."""
        procs = profile.processes_per_node
        if profile.engine == "local":
            return cls.here(procs)
        memory = profile.node.gpu_memory
        return cls(profile.nodes, procs, profile.gpus_per_node or 0, size_bytes(memory) if memory else None)

    @classmethod
    def here(cls, procs: int = 1) -> Place:
        """Return what this machine has."""
        import torch

        if not torch.cuda.is_available():
            return cls(1, procs)
        return cls(1, procs, torch.cuda.device_count(), torch.cuda.get_device_properties(0).total_memory)


@dataclass(frozen=True)
class Validated:
    """A recipe that can run where it is to run.

    Attributes:
        recipe: the resolved configuration as YAML.
        data: folders on a file system that are read: of the shards, and of weights to begin with.
        warnings: what the user should know.
    """

    recipe: str
    data: tuple[str, ...]
    warnings: tuple[str, ...]


class Validator:
    """Checks recipes for one place; what recipes of a sweep have in common is looked at once.

    Args:
        place: where they are to run.
        without_memory: build models without their weights. Only for a process that does not train afterwards: a
            user's module may keep such a tensor.
        with_data: refuse a recipe whose shards are missing; without it, what needs them is left out if they are.
        lengthened: whether a run that has begun is to be trained for longer than its schedules were made for.
        begun: whether a run has checkpoints to continue from: the weights that it began with may be gone.
        earlier: a run that has to finish before; its weights to begin with are not there yet.
    """

    def __init__(
        self,
        place: Place,
        without_memory: bool = True,
        with_data: bool = True,
        lengthened: bool = False,
        begun: bool = False,
        earlier: Run | None = None,
    ):
        self.earlier = earlier
        self.place, self.without_memory, self.with_data = place, without_memory, with_data
        self.lengthened, self.begun = lengthened, begun
        self._initial: dict[str, Path] = {}
        self._done: set[str] = set()
        self._warnings: dict[str, None] = {}

    def __call__(self, arguments: RecipeArguments) -> Validated:
        """Check one recipe wholly.

        Raises:
            UserError: the recipe is wrong, its shards are missing, it does not fit the number of processes, or needs
                more memory than a GPU has.
        """
        from paperscale.training import speed
        from paperscale.training.recipe import RecipeCLI

        cli = RecipeCLI(arguments.to_cli(), build=False)
        of = check_trainer(cli.config.trainer, self.place)
        if of.divided and not of.offloaded and self.place.world_size == 1:
            alone = f"trainer.strategy={of.name} has nothing to divide on one process"
            self._warnings[f"{alone}; --nodes and --procs-per-node give it more"] = None
        if self._new({**cli.config.as_dict(), "seed_everything": None}):
            cli = self._built(arguments)
            speed.check(cli.config_init.speed, cli.model)
            self._check_data(cli)
            self._check_optimizers(cli, of)
            if self.lengthened:
                self._check_schedules(cli)
            self._check_memory(cli)
            if cli.config.init_from and not self.begun:
                self._check_initial(cli)
        paths = cli.config.data.init_args.get("path") or []
        paths = [paths] if isinstance(paths, str) else paths
        if paths:
            paths = [path if "://" in path else str(Path(path).absolute()) for path in paths]
            cli.config.data.init_args.path = paths[0] if len(paths) == 1 else paths
        local = [path for path in paths if "://" not in path]
        if cli.config.init_from and not self.begun:
            if promised := self._promised(cli.config.init_from):
                assert self.earlier is not None  # noqa: S101  whose they are
                cli.config.init_from = promised
                local.append(str(self.earlier.path))
            else:
                source = self._initial_from(cli.config.init_from)
                cli.config.init_from = str(source)
                local.append(str(source if source.is_dir() else source.parent))
        return Validated(cli.resolved(), tuple(local), tuple(self._warnings))

    def _new(self, content: Any) -> bool:
        """Return whether this is seen for the first time."""
        text = str(content)
        known = text in self._done
        self._done.add(text)
        return not known

    def _built(self, arguments: RecipeArguments) -> Any:
        from paperscale.training.recipe import RecipeCLI, built_on_meta

        return (built_on_meta if self.without_memory else RecipeCLI)(arguments.to_cli())

    def _check_data(self, cli: Any) -> None:
        """Check the shards and the division of the batch over the processes."""
        if self.with_data and self._new(("data", _without_floats(cli.config.data.as_dict()))):
            cli.datamodule.check()
        with contextlib.nullcontext() if self.with_data else contextlib.suppress(UserError):
            _check_classes(cli)
            if (check := getattr(cli.model, "check_data", None)) and not missing(cli.datamodule):
                check(cli.datamodule)
        try:
            cli.datamodule.accumulate(self.place.world_size)
        except UserError as error:
            raise UserError(f"{error}{self._smaller(cli.datamodule)}") from error
        batch, size = cli.datamodule.global_batch_size, self.place.world_size
        if getattr(cli.datamodule, "max_tokens", None) is None and batch % size:
            below, above = nearest_divisors(batch, size)
            self._warnings[
                f"data.global_batch_size={batch} over {size} processes leaves some waiting for others at each step; "
                f"{below} or {above} processes divide it evenly"
            ] = None
        if few := few_to_normalise(cli, size, "GPUs" if self.place.gpus_per_node else "processes"):
            self._warnings[few] = None

    def _smaller(self, datamodule: Any) -> str:
        """Name the largest job of this shape over which the batch can be divided."""
        procs = self.place.procs_per_node
        for nodes, count in ((n, p) for p in range(procs, 0, -1) for n in range(self.place.nodes, 0, -1)):
            try:
                datamodule.accumulate(nodes * count)
            except UserError:
                continue
            return f", such as --nodes {nodes} --procs-per-node {count}"
        return ""

    def _promised(self, text: str) -> str | None:
        """Return what the recipe says of weights that the earlier run is still to make; ``None`` for others."""
        from paperscale.jobs.checkpoints import promised

        return promised(text, self.earlier) if self.earlier else None

    def _initial_from(self, text: str) -> Path:
        """Return where the weights are that the training begins with."""
        from paperscale.jobs.checkpoints import resolve_initial

        if text not in self._initial:
            self._initial[text] = resolve_initial(text)
        return self._initial[text]

    def _check_initial(self, cli: Any) -> None:
        """Compare the model with the weights that it begins with."""
        from paperscale.training.initial import match, matched, renamed

        if self.earlier and self._promised(cli.config.init_from):
            fits = match(cli.model, renamed(_weights_to_come(self.earlier), cli.config.init_prefix))
            check_tokenizer(cli.datamodule, self.earlier.recipe)
        else:
            source = self._initial_from(cli.config.init_from)
            fits = matched(cli.model, source, cli.config.init_prefix)
            check_tokenizer(cli.datamodule, source / RECIPE)
        if len(fits.other_shape) > len(fits.found):
            raise UserError(
                f"init_from: {fits} ({fits.other_shape[0]}): they are of a network of another size; make model.network "
                "the same"
            )
        if not fits.is_whole:
            self._warnings[f"init_from: {fits}; the log names them"] = None

    def _check_optimizers(self, cli: Any, of: Sharding) -> None:
        """Check how the model is optimized, as far as that can be found out without training."""
        config = cli.config.as_dict()
        if not self._new(("optimizers", [_without_floats(config[part]) for part in ("model", "data", "trainer")])):
            return
        from paperscale.training.estimate import on_ghost, optimizers_of

        optimizers = None
        with contextlib.suppress(Exception):  # whatever a user's model raises where there is no Trainer
            optimizers = on_ghost(
                cli, "32-true", self.place.world_size, lambda model: list(optimizers_of(model.configure_optimizers()))
            )
        accumulate = cli.datamodule.accumulate(self.place.world_size)
        check_optimizers(cli.model, optimizers, cli.config.trainer, of, accumulate)

    def _check_schedules(self, cli: Any) -> None:
        """Look for schedules whose state, which is restored, says how long the training was to be."""
        from paperscale.training.estimate import on_ghost, schedules_of

        def states(times: int) -> list[tuple[str, dict[str, Any]]]:
            return on_ghost(
                cli,
                "32-true",
                self.place.world_size,
                lambda model: [(type(s).__name__, s.state_dict()) for s in schedules_of(model.configure_optimizers())],
                times,
            )

        kept: list[tuple[str, dict[str, Any]]] = []
        with contextlib.suppress(Exception):  # as above
            kept = [once for once, twice in zip(states(1), states(2), strict=True) if once != twice]
        for name, state in kept:
            if "total_steps" in str(state):  # OneCycleLR, by itself or as a part of another
                raise UserError(
                    f"{name} ends with the length that the training was begun with, and cannot go on; submit the "
                    "recipe with the new length under another --name"
                )
            self._warnings[
                f"{name} keeps to the length that the training was begun with, and goes on from its end; for a "
                "schedule over the new length submit the recipe under another --name"
            ] = None

    def _check_memory(self, cli: Any) -> None:
        """Compare what the training needs with what a GPU has."""
        config = cli.config.as_dict()
        parts = [_without_floats(config[part]) for part in ("model", "data", "trainer", "speed")] + [config["ema"]]
        memory = self.place.gpu_memory
        if not (memory and self.place.gpus_per_node) or not self._new(("memory", parts)):
            return
        from paperscale.training.estimate import estimate, gib

        try:
            found = estimate(cli, self.place.world_size)
        except UserError:
            if self.with_data:
                raise
            return  # without shards there is no batch to look at
        if found.certain > memory:
            raise UserError(
                f"parameters, gradients and optimizer state take {gib(found.certain)} of a GPU's {gib(memory)}: this "
                "model does not fit; use GPUs with more memory, a smaller model, or --strategy deepspeed_zero3_offload"
            )
        if found.total > memory:
            self._warnings[
                f"training will take about {gib(found.total)} of a GPU's {gib(memory)}, {gib(found.activations or 0)} "
                f"of it for {found.samples} samples a pass: set data.micro_batch_size below {found.samples}, or "
                "speed.activation_checkpointing=blocks"
            ] = None


def _weights_to_come(run: Run) -> Weights:
    """Return the names and shapes of the weights that a run trains, made from its recipe."""
    from paperscale.training.recipe import built_on_meta
    from paperscale.training.weights import of_model

    imports = sys.path.copy()
    snapshot.use(run)
    try:
        return of_model(
            built_on_meta([f"--config={run.recipe}"]).model, f"the run {run.name}, which is to finish first"
        )
    finally:
        sys.path[:] = imports


class Alike:
    """Recipes that differ in the values of some keys; those of fractions and the seed are not parsed in every product.

    Each value is checked with the others at their first. Where it changes one line of the resolved recipe, from one
    fraction to another, that line is put into the other recipes as it is; where not, those are checked wholly.

    Args:
        check: checks a recipe with these values wholly.
        first: the values that others are compared with.
    """

    def __init__(self, check: Callable[[Values], Validated], first: Values):
        self.check, self.first = check, first
        self.base = check(first)
        self.lines = self.base.recipe.splitlines(keepends=True)
        self._changes: dict[tuple[str, str], tuple[int, str] | None] = {}
        self._checked = {first: self.base}

    def __call__(self, values: Values) -> Validated:
        """Return the recipe with these values.

        Raises:
            UserError: it is wrong.
        """
        changes = [self._change(pair) for pair in values if pair not in self.first]
        if values in self._checked:
            return self._checked[values]
        places = {change[0] for change in changes if change}
        if len(places) < len(changes):
            return self.check(values)
        lines = self.lines.copy()
        for place, line in filter(None, changes):
            lines[place] = line
        return replace(self.base, recipe="".join(lines))

    def _change(self, pair: tuple[str, str]) -> tuple[int, str] | None:
        """Return the line that a value changes, and what it becomes; ``None`` where it changes anything else."""
        if pair not in self._changes:
            self._changes[pair] = self._seed(pair) or self._fraction(pair)
        return self._changes[pair]

    def _seed(self, pair: tuple[str, str]) -> tuple[int, str] | None:
        before = f"{SEED}: {dict(self.first).get(SEED)}\n"
        if pair[0] != SEED or not _WHOLE.fullmatch(pair[1]) or self.lines.count(before) != 1:
            return None
        return self.lines.index(before), f"{SEED}: {pair[1]}\n"

    def _fraction(self, pair: tuple[str, str]) -> tuple[int, str] | None:
        values = tuple(pair if pair[0] == key else (key, value) for key, value in self.first)
        self._checked[values] = self.check(values)
        lines = self._checked[values].recipe.splitlines(keepends=True)
        changed = [place for place, (old, new) in enumerate(zip(self.lines, lines, strict=False)) if old != new]
        if len(lines) != len(self.lines) or len(changed) != 1:
            return None
        old, new = _FRACTION.fullmatch(self.lines[changed[0]]), _FRACTION.fullmatch(lines[changed[0]])
        return (changed[0], lines[changed[0]]) if old and new and old[1] == new[1] else None


def validate_all(check: Callable[[Values], Validated], chosen: Iterable[Values]) -> Iterator[Validated]:
    """Yield each recipe of a sweep, checked; see :class:`Alike`.

    Args:
        check: checks a recipe with these values wholly.
        chosen: the values of each, in the order of their product.

    Raises:
        UserError: one is wrong.
    """
    alike: dict[Values, Alike] = {}
    for values in chosen:
        apart = tuple(pair for pair in values if not _free(*pair))
        if apart not in alike:
            alike[apart] = Alike(check, values)
        yield alike[apart](values)


def _free(key: str, value: str) -> bool:
    return bool((_WHOLE if key == SEED else _WRITTEN_FRACTION).fullmatch(value))


def _check_classes(cli: Any) -> None:
    """Refuse a network that has no score for some of the labels.

    Raises:
        UserError: it has fewer classes than the manifest names, or the shards are missing.
    """
    classes = getattr(getattr(cli.model, "network", None), "classes", None)
    if not isinstance(classes, int) or getattr(cli.datamodule, "label", None) != "cls":
        return
    for shards in cli.datamodule.source("train").sets:
        if (named := len(shards.manifest.classes)) > classes:
            raise UserError(
                f"{shards.path} has {named} classes, model.network.classes={classes}: set model.network.classes={named}"
            )


def few_to_normalise(cli: Any, world_size: int, of: str) -> str | None:
    """Return a warning of batch normalisation over too few samples, ``None`` where there is no need for one.

    Args:
        cli: the recipe.
        world_size: processes.
        of: what there are so many of: ``GPUs`` or ``processes``.
    """
    from torch.nn.modules.batchnorm import _BatchNorm

    data = cli.datamodule
    batch, passes = data.global_batch_size, data.accumulate(world_size)
    samples = -(-batch // (world_size * passes))
    if samples >= FEW or getattr(data, "max_tokens", None) is not None or cli.config.trainer.sync_batchnorm:
        return None
    if not any(isinstance(module, _BatchNorm) for module in cli.model.modules()):
        return None
    fix = f"raise data.{'micro' if passes > 1 else 'global'}_batch_size"
    if passes == 1 and world_size > 1 and batch >= FEW:
        fix += f", or use fewer {of}, {batch // FEW} at most"
    return f"batch normalisation over {samples} samples, those of a forward pass, costs accuracy: {fix}"


def check_trainer(trainer: Any, place: Place) -> Sharding:
    """Check the section ``trainer`` against where it is to run; return what its strategy divides.

    Raises:
        UserError: a value contradicts the job's, or cannot run there.
    """
    if trainer.devices not in ("auto", 1, "1") or trainer.num_nodes != 1:
        raise UserError(
            "trainer.devices and trainer.num_nodes are the job's: "
            "use --nodes and --procs-per-node of `paperscale submit`"
        )
    for name in ("max_steps", "max_epochs"):
        value = getattr(trainer, name)
        if value is not None and (value == 0 or value < -1):
            raise UserError(
                f"trainer.{name}={value}: nothing would be trained; use a number of at least 1, or -1 for no limit"
            )
    of = check_strategy(trainer.strategy, place.world_size)
    _check_accelerator(trainer.accelerator, place)
    on_gpu = bool(place.gpus_per_node) and trainer.accelerator != "cpu"
    precision = str(trainer.precision)
    if not on_gpu and precision in _PRECISIONS:
        raise UserError(
            f"trainer.precision={precision} needs a GPU; on CPUs use trainer.precision={_PRECISIONS[precision]}"
        )
    for start, package in (("transformer-engine", "transformer_engine"), ("nf4", "bitsandbytes")):
        if precision.startswith(start) and importlib.util.find_spec(package) is None:
            raise UserError(
                f"trainer.precision={precision} needs the package {package}, which is not installed; install it, "
                "or use trainer.precision=bf16-mixed"
            )
    check_options(trainer, of)
    return of


def _check_accelerator(accelerator: Any, place: Place) -> None:
    gpus, procs = place.gpus_per_node, place.procs_per_node
    if accelerator in _ON_GPU and not gpus:
        raise UserError(
            f"trainer.accelerator={accelerator}: this job has no GPUs; ask for them with --gpus-per-node (or "
            "gpus_per_node in the cluster's profile), or leave trainer.accelerator out"
        )
    if gpus and accelerator != "cpu" and procs > gpus:
        raise UserError(
            f"{procs} processes on a node with {gpus} GPUs: each process trains on a GPU of its own; use "
            f"--procs-per-node {gpus}, or trainer.accelerator=cpu"
        )


def nearest_divisors(batch: int, size: int) -> tuple[int, int]:
    """Return the divisors of ``batch`` next to ``size``, below and above it; ``size`` is less than ``batch``."""
    divisors = [number for number in range(1, batch + 1) if batch % number == 0]
    return max(d for d in divisors if d < size), min(d for d in divisors if d > size)


def _without_floats(value: Any) -> Any:
    """Return a configuration without its fractions: rates and factors change no shape."""
    if isinstance(value, dict):
        return {key: _without_floats(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_floats(inner) for inner in value]
    return None if isinstance(value, float) else value
