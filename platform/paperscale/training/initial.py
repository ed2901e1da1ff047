"""Fine-tuning: a run that begins with the weights of another, or of a file, under any strategy."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from paperscale.errors import UserError
from paperscale.nn.exchange import Names, part_of
from paperscale.training.pieces import Piece, piece_of
from paperscale.training.weights import Weight, Weights, aliases_of, open_weights, state_of, taken, with_rows

LIBRARIES = ("torchvision", "huggingface")
"""Whose names a module may know, by its ``export_names``."""
_COUNTER = "num_batches_tracked"  # of batch normalisation: nothing rests on it, and old files have none
_OF_TENSORFLOW = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
_CONFIG = "config.json"  # of Hugging Face's models, beside the weights
_SHAPELESS = (
    *("model_type", "is_decoder"),
    *("num_attention_heads", "n_head"),
    *("hidden_act", "activation_function", "afn"),
    *("layer_norm_eps", "layer_norm_epsilon"),
)
"""What a ``config.json`` says of a network that its tensors' shapes do not."""
_SHOWN = 10  # names of a kind
_TRIED = 5  # changes of names that are looked at closely


@dataclass(frozen=True)
class Match:
    """How given weights fit a model.

    Attributes:
        origin: of the weights.
        found: the model's names to the weights.
        missing: names of the model that the weights have not; they begin as the recipe draws them. Counts of batches
            are not among them.
        unexpected: names of the weights that the model has not.
        other_shape: names whose shapes differ, with both; they begin as the recipe draws them.
        repeated: names of which the model has more rows than the weights, with both shapes; see :func:`repeated_rows`.
        library: whose names the weights have, empty for the model's own.
    """

    origin: str
    found: dict[str, Weight]
    missing: list[str]
    unexpected: list[str]
    other_shape: list[str]
    repeated: list[str]
    library: str = ""

    @property
    def is_whole(self) -> bool:
        """Return whether everything fits."""
        return not (self.missing or self.unexpected or self.other_shape)

    def __str__(self) -> str:
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": self.other_shape}
        rest = "".join(f", {len(names)} {kind}" for kind, names in kinds.items() if names)
        named = f", named as {self.library} names them" if self.library else ""
        return f"{len(self.found)} tensors from {self.origin}{named}{rest}"

    def lines(self) -> Iterator[str]:
        """Yield the report, in which long lists are cut short."""
        yield f"begins with {self}"
        for what, names in (
            ("missing, drawn as the recipe says", self.missing),
            ("unexpected, left out", self.unexpected),
            ("of another shape, drawn as the recipe says", self.other_shape),
            ("repeated for the further rows", self.repeated),
        ):
            yield from (f"  {what}: {name}" for name in names[:_SHOWN])
            if len(names) > _SHOWN:
                yield f"  {what}: and {len(names) - _SHOWN} more"


def match(model: nn.Module, weights: Weights) -> Match:
    """Compare a model with weights, by names and shapes; nothing is read.

    Where the model has ``export_names``, and more fits under another library's names than under its own, the weights
    are taken to be named so.

    Args:
        model: whole, divided, or on the meta device.
        weights: what it is to begin with.

    Raises:
        UserError: nothing fits; names the change of names with which the most would.
    """
    shapes = {name: _shape(tensor) for name, tensor in state_of(model)}
    others, (foreign, refused), rows = _other_names(model), _foreign_names(model), repeated_rows(model)
    fits = _match(shapes, others, weights, rows)
    for library, names in foreign.items():
        translated = _match(shapes, others, _translated(weights, names, library), rows)
        if len(translated.found) > len(fits.found):
            fits = replace(translated, library=library)
    if not fits.found:
        raise UserError(_nothing_fits(weights, shapes, foreign.values(), refused))
    return fits


def matched(model: nn.Module, source: Path, prefix: str | None, whole: bool = False) -> Match:
    """Compare a model with the weights of a checkpoint or a file.

    Args:
        model: as of :func:`match`.
        source: folder of a checkpoint, or a file.
        prefix: change of names, see :func:`renamed`.
        whole: refuse weights that are not all of the model's.

    Raises:
        UserError: nothing fits, the weights cannot be read or are not all there; or the names are another library's,
            the network is not the same, and no prefix says that a part is wanted.
    """
    fits = match(model, renamed(open_weights(source), prefix))
    lacking = [*fits.missing, *fits.other_shape, *fits.repeated]
    if whole and lacking:
        raise UserError(f"{fits} ({lacking[0]}); use the recipe that made it")
    if fits.library and not prefix:
        if torn := _torn(model, fits):
            raise UserError(
                f"{fits} ({torn[0]}): they are of another network, perhaps of another depth; make model.network the "
                "same, or add init_prefix=/ to begin with what fits"
            )
        _compare_config(model, source, fits.library)
    return fits


def _torn(model: nn.Module, fits: Match) -> list[str]:
    """Return what does not fit, though the weights have the part of the network that it belongs to.

    A part is an attribute of the module's ``network``: new heads are what fine-tuning wants, half an encoder is not.
    Of the last layer anything may be missing.
    """
    (*_, (last, _)) = model.named_parameters()
    layer = last.rpartition(".")[0]
    there = {_part(name) for name in fits.found}
    torn = [*(name for name in fits.missing if _part(name) in there), *fits.other_shape]
    return [name for name in torn if not name.startswith(f"{layer}.")]


def _part(name: str) -> str:
    return ".".join(name.split(".")[:2])


def _compare_config(model: Any, source: Path, library: str) -> None:
    """Refuse weights that another network has computed with: one whose tensors have the same names and shapes.

    Raises:
        UserError: the ``config.json`` beside the weights differs from the model's in what shapes do not tell.
    """
    path = (source if source.is_dir() else source.parent) / _CONFIG
    if library != "huggingface" or not path.exists() or not hasattr(model, "export_config"):
        return
    try:
        theirs = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it, or remove it") from error
    ours = model.export_config(library)
    for key in _SHAPELESS:
        if key in theirs and key in ours and theirs[key] != ours[key]:
            raise UserError(
                f"{path}: {key} is {theirs[key]}, the model's is {ours[key]}; make model.network the same, or add "
                "init_prefix=/ to begin with these weights all the same"
            )


def repeated_rows(model: nn.Module) -> set[str]:
    """Return the names of weights whose rows are repeated where the model has more of them: those of its positions.

    A network that has learned short sequences so begins on longer ones (Longformer: Beltagy et al. 2020, section 5).
    A part of a network names them in ``repeated``.
    """
    parts = model.named_modules()
    return {f"{part}.{name}" for part, module in parts for name in getattr(module, "repeated", ())}


def _match(
    shapes: Mapping[str, tuple[int, ...]], others: Mapping[str, list[str]], weights: Weights, rows: set[str]
) -> Match:
    """Compare a model's names and shapes, and the further names of its tied weights, with weights."""
    found: dict[str, Weight] = {}
    missing: list[str] = []
    other_shape: list[str] = []
    repeated: list[str] = []
    for name, shape in shapes.items():
        weight = next(filter(None, map(weights.named, (name, *others.get(name, ())))), None)
        if weight is None:
            missing += [] if name.endswith(_COUNTER) else [name]
        elif weight.shape != shape:
            may = name in rows and weight.shape[0] < shape[0] and weight.shape[1:] == shape[1:]
            found |= {name: with_rows(weight, shape[0])} if may else {}
            kind = repeated if may else other_shape
            kind.append(f"{name}: {list(weight.shape)}, the model has {list(shape)}")
        else:
            found[name] = weight
    known = {*shapes, *(other for names in others.values() for other in names)}
    aliased = {kept for alias, kept in weights.aliases.items() if alias in known}
    unexpected = [name for name in weights.tensors if name not in known and name not in aliased]
    return Match(weights.origin, found, missing, unexpected, other_shape, repeated)


def _foreign_names(model: nn.Module) -> tuple[dict[str, Names], dict[str, str]]:
    """Return, for each library that has such a model, the model's names with the library's.

    And of those that have similar models alone, why not this one.
    """
    found: dict[str, Names] = {}
    refused: dict[str, str] = {}
    export_names: Any = getattr(model, "export_names", None)
    for library in LIBRARIES if export_names else ():
        try:
            if names := export_names(library):
                found[library] = names
        except UserError as error:
            refused[library] = str(error)
    return found, refused


def _translated(weights: Weights, names: Names, library: str) -> Weights:
    """Return weights of a library under the model's names; what has none there keeps its own."""
    parts = {name: part_of(other) for name, other in names.items()}
    base = _most_frequent_beginning(part.name for part in parts.values()) if library == "huggingface" else ""
    found: dict[str, Weight] = {}
    used: set[str] = set()
    for name, part in parts.items():
        for spelling in _spellings(part.name, base):
            if (weight := weights.named(spelling)) is not None:
                found[name] = taken(weight, part)
                used.add(spelling)
                break
    return replace(weights, tensors={n: w for n, w in weights.tensors.items() if n not in used} | found)


def _most_frequent_beginning(names: Iterable[str]) -> str:
    counts = Counter(name.partition(".")[0] for name in names)
    return f"{counts.most_common(1)[0][0]}."


def _spellings(name: str, base: str) -> Iterator[str]:
    """Yield how files of a library call a tensor.

    Those of a model without heads leave out the beginning that is the model's name; those that were converted from
    TensorFlow keep its names of layer norms.
    """
    for whole in (name, name.removeprefix(base)):
        yield whole
        for new, old in _OF_TENSORFLOW.items():
            if whole.endswith(new):
                yield whole.removesuffix(new) + old


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return () if is_lazy(tensor) else tuple(getattr(tensor, "ds_shape", tensor.shape))  # ZeRO stage 3 keeps it there


def _other_names(model: nn.Module) -> dict[str, list[str]]:
    """Return the further names of tied weights."""
    others: dict[str, list[str]] = {}
    for name, kept in aliases_of(model).items():
        others.setdefault(kept, []).append(name)
    return others


def _nothing_fits(
    weights: Weights,
    shapes: Mapping[str, tuple[int, ...]],
    foreign: Iterable[Names],
    refused: Mapping[str, str],
) -> str:
    """Return what to do where no name and shape is the model's, under its own names or another library's.

    Where not even half would fit under other prefixes, the names may be of a library that has no such model.
    """
    what = f"{weights.origin}: none of its {len(weights.tensors)} tensors has a name and shape of the model's"
    same = next((name for name in shapes if name in weights.tensors), None)
    if same is not None:
        given = list(weights.tensors[same].shape)
        return f"{what} ({same} is {given}, the model's {list(shapes[same])}): make the network of the same size"
    counts: Counter[str] = Counter()
    theirs = [
        {(part := part_of(other)).name: part.whole(shapes[name]) for name, other in names.items() if name in shapes}
        for names in foreign
    ]
    for named in (shapes, *theirs):
        for change in _changes(weights, named):
            changed = renamed(weights, change).tensors
            fitting = sum(name in changed and changed[name].shape == shape for name, shape in named.items())
            counts[change] = max(counts[change], fitting)
    if refused and 2 * max(counts.values(), default=0) < min(len(shapes), len(weights.tensors)):
        (library, reason), *_ = refused.items()
        return f"{what}; if its names are {library}'s: {reason}"
    if not counts:
        return (
            f"{what} (it has {next(iter(weights.tensors))}, the model {next(iter(shapes))}); use weights of this model"
        )
    (change, count), *_ = counts.most_common(1)
    old, new = change.split("/")
    how = f"'{old}' replaced by '{new}'" if old and new else f"'{old}' taken off" if old else f"'{new}' put before"
    return f"{what}; with {how} they give {count} of the model's {len(shapes)}: add init_prefix={change}"


def _changes(weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the changes of a prefix that let names fit, the most frequent first."""
    by_ending: dict[tuple[str, tuple[int, ...]], list[list[str]]] = {}
    for name, weight in weights.tensors.items():
        parts = name.split(".")
        by_ending.setdefault((".".join(parts[-2:]), weight.shape), []).append(parts)
    counts: Counter[str] = Counter()
    for name, shape in shapes.items():
        mine = name.split(".")
        for theirs in by_ending.get((".".join(mine[-2:]), shape), []):
            same = 0
            while same < min(len(mine), len(theirs)) and mine[-1 - same] == theirs[-1 - same]:
                same += 1
            old, new = ("".join(f"{part}." for part in parts[: len(parts) - same]) for parts in (theirs, mine))
            counts[f"{old}/{new}"] += 1
    return [change for change, _ in counts.most_common(_TRIED)]


def renamed(weights: Weights, change: str | None) -> Weights:
    """Return weights with another beginning of their names.

    Args:
        weights: the weights.
        change: ``OLD/NEW``; names that begin with OLD begin with NEW instead. Either may be empty.

    Raises:
        UserError: it is not of that form.
    """
    if not change:
        return weights
    old, slash, new = change.partition("/")
    if not slash or "/" in new:
        raise UserError(
            f"init_prefix={change}: write OLD/NEW, such as 'model./network.', 'model./' to take a prefix off, or "
            "'/network.' to put one before"
        )

    def name_of(name: str) -> str:
        return new + name.removeprefix(old) if name.startswith(old) else name

    tensors = {name_of(name): weight for name, weight in weights.tensors.items()}
    return replace(weights, tensors=tensors, aliases={name_of(a): name_of(b) for a, b in weights.aliases.items()})


def fill(pieces: Iterable[Piece], fits: Match) -> None:
    """Read into pieces of a model what fits it."""
    for piece in pieces:
        weight = fits.found.get(piece.name.removeprefix("model/"))
        if weight is not None and piece.tensor.numel():
            piece.fill(weight.read(piece.start, piece.stop))


def read_initial(model: nn.Module, source: Path, prefix: str | None, whole: bool = False) -> Match:
    """Give weights to a model that one process holds wholly; arguments and errors are those of :func:`matched`."""
    fits = matched(model, source, prefix, whole)
    fill([piece_of(f"model/{name}", tensor) for name, tensor in state_of(model)], fits)
    return fits


class InitialWeights(Callback):
    """Gives the model weights before the first step; each rank reads the elements that it holds.

    Args:
        source: folder of a checkpoint, or a file.
        prefix: change of names, see :func:`renamed`.
        say: prints a line of the report (rank 0).
    """

    def __init__(self, source: Path, prefix: str | None, say: Callable[[str], None] = print):
        self.source, self.prefix, self.say = source, prefix, say

    @torch.no_grad()
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read what fits: the strategy has divided the model.

        Raises:
            UserError: as of :func:`matched`.
        """
        strategy: Any = trainer.strategy
        fits = matched(pl_module, self.source, self.prefix)
        fill([*strategy.parameter_pieces(), *strategy.buffer_pieces()], fits)
        strategy.weights_changed()
        for line in fits.lines():
            self.say(line)
