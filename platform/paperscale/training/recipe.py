"""A recipe, resolved by Lightning's own command line into a Trainer, a LightningModule and a DataModule."""

from __future__ import annotations

import importlib
import inspect
import re
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentError
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from paperscale.data import ShardStream
from paperscale.errors import UserError, nearest
from paperscale.training.checkpoint import CheckpointOptions
from paperscale.training.deferred import Initialisation, construct
from paperscale.training.ema import EMAOptions
from paperscale.training.guard import GuardOptions
from paperscale.training.quiet import quiet_libraries
from paperscale.training.sharding import sharding
from paperscale.training.speed import SpeedOptions
from paperscale.training.trainer import StreamTrainer


@dataclass
class TrackingOptions:
    """Where the run is tracked in Weights & Biases.

    Attributes:
        project: of the W&B run.
        entity: team or user; by default W&B's own default.
        tags: of the W&B run.
        enabled: ``False`` writes the local ``metrics.jsonl`` only.
    """

    project: str = "paperscale"
    entity: str | None = None
    tags: tuple[str, ...] = ()
    enabled: bool = True


class RecipeCLI(LightningCLI):
    """Lightning's command line with a recipe's further sections, such as ``checkpoint`` and ``tracking``.

    Args:
        args: ``--config=...`` and ``--key=value``.
        build: whether to make the objects; without it only the configuration is resolved and checked.
        defer: make a model whose weights the strategy divides without them: each process then makes its part alone.

    Raises:
        UserError: a key, a class or a value is wrong; suggests the nearest right one.
    """

    def __init__(self, args: list[str], build: bool = True, defer: bool = False):
        self.build, self.defer = build, defer
        self.initialisation: Initialisation | None = None
        quiet_libraries()
        super().__init__(
            args=args,
            run=False,
            save_config_callback=None,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            trainer_defaults={"num_sanity_val_steps": 0},
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the sections of our own."""
        parser.add_class_arguments(CheckpointOptions, "checkpoint")
        parser.add_class_arguments(EMAOptions, "ema")
        parser.add_class_arguments(GuardOptions, "guard")
        parser.add_class_arguments(SpeedOptions, "speed")
        parser.add_class_arguments(TrackingOptions, "tracking")
        weights = "weights to begin with: a run or checkpoint (also @best, @STEP), or a .safetensors file"
        parser.add_argument("--init_from", type=str | None, default=None, help=weights)
        prefix = "OLD/NEW: how their names begin, and how the model's do"
        parser.add_argument("--init_prefix", type=str | None, default=None, help=prefix)
        parser.add_argument("--test_after_fit", type=bool, default=True, help="score the test split at the end")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Resolve the configuration."""
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise UserError(self._where(args, explain(str(error), parser))) from error

    @staticmethod
    def _where(args: list[str], message: str) -> str:
        """Put the recipe files before a message about a key that was not set on the command line."""
        files = [arg.removeprefix("--config=") for arg in args if arg.startswith("--config=")]
        set_here = [arg[2:].partition("=")[0].rsplit(".", 1)[-1] for arg in args if not arg.startswith("--config=")]
        subject = re.split(r"[:;]| of ", message)[0]
        return message if any(key in subject for key in set_here) else f"{', '.join(files)}: {message}"

    def instantiate_classes(self) -> None:
        """Make the DataModule and the model; the Trainer is made by :meth:`trainer_for`."""
        if not self.build:
            return
        try:
            self.config_init = self._make()
        except Exception as error:  # whatever a constructor raises, the values of the recipe made it do so
            root: BaseException = error
            while not isinstance(root, UserError) and (cause := root.__cause__ or root.__context__):
                root = cause
            if isinstance(root, UserError):
                raise root from error
            place = traceback.extract_tb(root.__traceback__)[-1]
            where = f"{place.filename}, line {place.lineno}"
            raise UserError(f"the recipe's values do not fit: {type(root).__name__}: {root} ({where})") from error
        self.datamodule: ShardStream = self._get(self.config_init, "data")
        if not isinstance(self.datamodule, ShardStream):
            raise UserError(
                f"data.class_path: {type(self.datamodule).__name__} cannot be resumed exactly; use a DataModule of "
                "paperscale.data, or one that derives from paperscale.data.ShardStream"
            )
        self.model: LightningModule = self._get(self.config_init, "model")

    def _make(self) -> Any:
        """Make the objects."""
        if self.defer and "parameters" in sharding(self.config.trainer.strategy).divided:
            made, self.initialisation = construct(lambda: self.parser.instantiate_classes(self.config))
            return made
        return self.parser.instantiate_classes(self.config)

    def trainer_for(self, first: Sequence[Callback] = (), **settings: Any) -> Trainer:
        """Return the recipe's Trainer with settings of the job, which win over the recipe's.

        Args:
            first: callbacks that are called before the recipe's own; ``callbacks`` of the settings come after them.
            settings: of the Trainer.
        """
        config = {**self._get(self.config_init, "trainer", default={}), **settings}
        if "callbacks" in settings:
            recipes = self._get(self.config_init, "trainer.callbacks") or []
            config["callbacks"] = [*first, *recipes, *settings["callbacks"]]
        return StreamTrainer(**config)

    @property
    def accelerator(self) -> str:
        """Return the recipe's ``trainer.accelerator``."""
        return str(self._get(self.config_init, "trainer.accelerator"))

    def on_gpu(self) -> bool:
        """Return whether the recipe trains on this machine's GPUs."""
        import torch

        return self.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()

    @property
    def device(self) -> str:
        """Return the kind of device that the recipe trains on here: ``cpu``, ``cuda`` or ``mps``."""
        import torch

        if self.on_gpu():
            return "cuda"
        return "mps" if self.accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available() else "cpu"

    def resolved(self) -> str:
        """Return the whole configuration as YAML."""
        return self.parser.dump(
            self.config, skip_none=False, skip_link_targets=False
        )  # null may be another than the default


def built_on_meta(args: list[str]) -> RecipeCLI:
    """Return a recipe's objects, the model without its weights' memory where its constructor allows that.

    Raises:
        UserError: the recipe is wrong.
    """
    import torch

    try:
        with torch.device("meta"):
            return RecipeCLI(args)
    except Exception:  # a constructor that computes; if it is the recipe that is wrong, the second try says so
        return RecipeCLI(args)


def explain(message: str, parser: LightningArgumentParser) -> str:
    """Turn a parser's complaint into one line that names the key and the nearest right one."""
    if found := re.search(r"[Uu]nrecognized arguments: --([\w.]+)", message):
        return _unknown(found[1], known_keys(parser))
    if found := re.search(r"Key ['\"]([\w.]+)['\"] is not expected", message):
        return _unknown(found[1], known_keys(parser))
    classes = re.findall(r"Problem with given class_path '([\w.]+)'", message)
    if found := re.search(r"(?:Option|Key|Group key) '([\w.]+)' is not (?:accepted|expected)", message):
        return _unknown(found[1], _parameters(classes[-1]) if classes else known_keys(parser), classes[-1:])
    if found := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        module = importlib.import_module(found[1])
        return f"no class '{found[2]}' in {found[1]}{nearest(found[2], vars(module))}"
    keys = re.findall(r"Parser key ['\"]([\w.]+)['\"]", message)
    if causes := _causes(message):
        of = f"{keys[0]}: " if keys else ""
        owner = f"{classes[-1]}: " if classes else ""
        return f"{of}{owner}{causes[0]}"
    kinds = list(dict.fromkeys(re.findall(r"Expected an? <class '([\w.]+)'>", message)))
    given = re.findall(r"(?:Given|Got) value: (.+)", message)
    choices = _choices(message)
    if keys and (kinds or choices):
        nested = re.match(r"NestedArg\(key='(.*)', val='(.*)'\)", given[-1] if given else "")
        key = f"{keys[0]}.{nested[1]}" if nested else keys[-1]
        value = nested[2] if nested else given[-1] if given else ""
        if choices:
            return f"{key}: '{value}' is none of {', '.join(choices)}{nearest(value, choices) or '; use one'}"
        if nested:
            kinds = [kind for kind in kinds if kind != "NoneType"] or kinds
        return f"{key}: expected {' or '.join(kinds)}, got '{value}'"
    return " ".join(message.split())[:400]


def _choices(message: str) -> list[str]:
    """Return the words that a value is one of, where a parser's complaint lists them and takes nothing else."""
    innermost = message.rpartition("Parser key")[2]
    subtypes = "".join(re.findall(r"(?:Subtypes:|Expected an?) (.+)", innermost)[:1])
    if set(re.findall(r"<class '([\w.]+)'>", subtypes)) - {"NoneType"}:
        return []
    listed = re.findall(r"typing\.Literal\[(.*?)\]", subtypes)
    return list(dict.fromkeys(word.strip(" '\"") for words in listed for word in words.split(",")))


def _causes(message: str) -> list[str]:
    """Return the lines of a parser's complaint that say what is wrong, without those that only say where."""
    where = ("Expected a", "Problem with", "Parser key", "Subtypes", "Given value", "Does not validate", "Errors:")
    lines = [line.strip().removeprefix("- ").strip() for line in message.splitlines()]
    return [line for line in lines if line and not line.startswith(where)]


def _unknown(key: str, known: Iterable[str], owner: Sequence[str] = ()) -> str:
    known = sorted(set(known))
    of = f" of {owner[0].rsplit('.', 1)[-1]}, which takes {', '.join(known)}" if owner else ""
    return f"unknown key '{key}'{of}{nearest(key, known)}"


def _parameters(class_path: str) -> set[str]:
    """Return the names that a class's constructor takes, those that it passes on to its bases included."""
    module, _, name = class_path.rpartition(".")
    found: set[str] = set()
    for kind in getattr(importlib.import_module(module), name).__mro__:
        parameters = inspect.signature(kind.__init__).parameters.values()
        found |= {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return found - {"self"}


def known_keys(parser: LightningArgumentParser) -> Iterator[str]:
    """Yield every key that the parser knows."""
    for action in parser._actions:
        if action.dest not in ("help", "config", "print_config"):
            yield action.dest
