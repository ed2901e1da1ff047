"""How much memory of a GPU a recipe needs, found out without a GPU and without taking that memory.

Parameters, gradients and optimizer state are exact: the optimizer of ``configure_optimizers`` makes one step on tensors
that have shapes but no content. Activations are what autograd keeps for the backward pass of one micro-batch, counted
in a ``training_step`` on such tensors; with activation checkpointing what it keeps, and what the largest block keeps
while it is computed again. Not counted are the workspaces of kernels and the CUDA context (about 0.5 GiB).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_leaves, tree_map_only
from torchmetrics import Metric

from paperscale.data.batching import BatchPlan
from paperscale.data.stream import Batch, Cursor, Places, ShardStream
from paperscale.training import speed
from paperscale.training.blocks import blocks
from paperscale.training.precision import MIXED, TRUE
from paperscale.training.recipe import RecipeCLI
from paperscale.training.sharding import Sharding, sharding
from paperscale.training.speed import SpeedOptions

_ALIASES = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true", "None": "32-true"}
Found = TypeVar("Found")

_STEPS = 1000  # for schedules that ask how long the training is; no size depends on it


@dataclass(frozen=True)
class Estimate:
    """Memory of one GPU, in bytes.

    Attributes:
        world_size: processes.
        samples: of one forward pass of one process.
        strategy: as a recipe names it.
        precision: as Lightning names it.
        count: parameters of the model, as a number.
        parameters: the model's weights.
        gradients: of the trainable ones.
        optimizer: its state; ``None`` where it cannot be found out.
        buffers: such as the averages of batch normalisation.
        buckets: DDP's second copy of the gradients, for communication.
        activations: what a micro-batch leaves for its backward pass; ``None`` where it cannot be found out.
        unknown: why something is ``None``, and what is not counted.
        averages: of the weights, where the recipe's section ``ema`` asks for them.
    """

    world_size: int
    samples: int
    strategy: str
    precision: str
    count: int
    parameters: int
    gradients: int
    optimizer: int | None
    buffers: int
    buckets: int
    activations: int | None
    unknown: tuple[str, ...] = ()
    averages: int = 0

    @property
    def certain(self) -> int:
        """Return what is needed whatever the batch: parameters, gradients, optimizer state, buffers and averages."""
        return self.parameters + self.gradients + (self.optimizer or 0) + self.buffers + self.averages

    @property
    def total(self) -> int:
        """Return the sum of what is known."""
        return self.certain + self.buckets + (self.activations or 0)

    def __str__(self) -> str:
        """Return a table."""
        averages = ("averages",) if self.averages else ()
        names = ("parameters", "gradients", "optimizer", "buffers", *averages, "buckets", "activations")
        shape = f"{self.strategy} on {self.world_size} processes, {self.precision}, {self.samples} samples a pass"
        lines = [f"memory of a GPU   {shape}"]
        for name in names:
            value = getattr(self, name)
            lines.append(f"{name:12}  {gib(value):>12}" if value is not None else f"{name:12}  {'unknown':>12}")
        lines[1] += f"   {self.count:,} of them"
        return "\n".join([*lines, f"{'total':12}  {gib(self.total):>12}", *self.unknown])


def gib(size: float) -> str:
    """Return bytes in words."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def estimate(cli: RecipeCLI, world_size: int, micro_batch: int | None = None, strategy: Any = None) -> Estimate:
    """Return the memory that a recipe needs on each GPU.

    Args:
        cli: the recipe; its model may be on the meta device, its shards may be missing. It is not changed.
        world_size: processes.
        micro_batch: samples of a forward pass; by default what the recipe makes of its global batch.
        strategy: a name, or ``class_path`` and ``init_args``; by default the recipe's.

    Raises:
        UserError: the global batch cannot be divided over the processes, the shards cannot be opened, or they are
            missing and the recipe does not tell the shapes of their samples.
    """
    return Passes(cli, world_size, micro_batch).under(strategy)


class Passes:
    """What training steps of a recipe take, whatever the strategy; each is made once, on tensors without memory.

    Args:
        cli: as of :func:`estimate`.
        world_size: processes.
        micro_batch: as of :func:`estimate`.

    Attributes:
        samples: of one forward pass of one process.
        missing: paths of shards that are not there.

    Raises:
        UserError: as :func:`estimate` does.
    """

    def __init__(self, cli: RecipeCLI, world_size: int, micro_batch: int | None = None):
        speed.check(cli.config_init.speed, cli.model)
        self.cli, self.world_size = cli, world_size
        stream, self.missing = cli.datamodule.without_shards(_channels(cli.model))
        self._batch: Batch | None = None  # where a pipeline of the user's own makes the batches
        if stream.paths:
            self.samples, self._batch = _first_batch(stream, world_size, micro_batch)
        else:
            self.samples = micro_batch or -(-stream.global_batch_size // (world_size * stream.accumulate(world_size)))
        self._found: dict[tuple[str, str, int], tuple[int | None, str]] = {}
        self._on_line: set[str] = set()  # precisions in which activations were seen to grow as a line does

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of one sample's part of each tensor that the model is given, as far as that is known."""
        try:
            batch = self._batch_on(FakeTensorMode(allow_non_fake_inputs=True), None)
        except Exception:  # whatever a user's DataModule raises on tensors without content
            return {}
        return {
            name: tuple(value.shape[1:])
            for name, value in batch.items()
            if isinstance(value, Tensor) and name != "sample"
        }

    def under(self, strategy: Any = None) -> Estimate:
        """Return the memory of a GPU under a strategy, by default the recipe's."""
        model, of = self.cli.model, sharding(strategy or self.cli.config.trainer.strategy, self.world_size)
        precision = self.precision(of)
        optimizer, no_optimizer = self._once("optimizer", precision, 0)
        activations, no_activations = self._once("activations", precision, self.samples)
        known = [p for p in model.parameters() if not is_lazy(p)]
        weights = sum(_bytes(p, precision) for p in known)
        gradients = sum(_bytes(p, precision) for p in known if p.requires_grad)
        if of.kind == "zero" and precision in MIXED:  # 16-bit weights and gradients; 32-bit weights with the optimizer
            optimizer = None if optimizer is None else optimizer + weights
            weights, gradients = weights // 2, gradients // 2
        lazy = len(known) < len(list(model.parameters()))
        averages = 0 if self.cli.config_init.ema.decay is None else sum(p.numel() * max(4, p.itemsize) for p in known)

        def share(part: str, size: int) -> int:
            return 0 if part in of.offloaded else -(-size // (self.world_size if part in of.divided else 1))

        return Estimate(
            self.world_size,
            self.samples,
            of.name,
            precision,
            count=sum(p.numel() for p in known),
            parameters=share("parameters", weights),
            gradients=share("gradients", gradients),
            optimizer=None if optimizer is None else share("optimizer", optimizer),
            buffers=sum(_bytes(b, precision) for b in model.buffers() if not is_lazy(b)),
            buckets=gradients if of.kind == "ddp" and self.world_size > 1 else 0,
            activations=activations,
            unknown=(*filter(None, (no_optimizer, no_activations)), *_not_counted(of, lazy)),
            averages=share("optimizer", averages),  # they lie where the 32-bit weights do that the optimizer steps
        )

    def precision(self, of: Sharding) -> str:
        """Return the precision that a strategy makes of the recipe's, as Lightning names it."""
        asked = str(self.cli.config_init.trainer.precision)
        precision = _ALIASES.get(asked, asked)
        if of.kind == "zero":  # keeps 32-bit weights beside 16-bit ones, whichever of the two it is called
            return {"16-true": "16-mixed", "bf16-true": "bf16-mixed"}.get(precision, precision)
        return precision

    def largest(self, precision: str, room: int) -> int | None:
        """Return the most samples of a forward pass whose activations fit into ``room`` bytes.

        Activations grow with the samples as a line does: it is drawn through two passes, and where a third one, of the
        number that was found, does not lie on it, drawn anew through that one.

        Returns:
            0 where not even one fits, ``None`` where activations are unknown or do not grow.
        """
        few, many = self.samples, 2 * self.samples
        while True:
            less, more = (self._once("activations", precision, count)[0] for count in (few, many))
            if less is None or more is None or (more - less) * (many - few) <= 0:
                return None
            most = max(0, few + (room - less) * (many - few) // (more - less))
            if most in (0, few, many) or many != 2 * few or precision in self._on_line:
                return most
            if self._once("activations", precision, most)[0] == less + (most - few) * (more - less) // (many - few):
                self._on_line.add(precision)
                return most
            many = most

    def _once(self, what: str, precision: str, samples: int) -> tuple[int | None, str]:
        """Return what is found, or why it cannot be: a model may do what only tensors with content allow."""
        key = (what, precision, samples)
        if key not in self._found:
            try:
                if what == "optimizer":
                    found = on_ghost(self.cli, precision, self.world_size, _state_after_step)
                else:
                    found = self._activation_bytes(precision, samples)
                self._found[key] = (found, "")
            except Exception as error:  # whatever a user's model raises on tensors without content
                self._found[key] = (None, why_unknown(what, error))
        return self._found[key]

    def prepared(
        self, precision: str, samples: int | None = None, switches: SpeedOptions | None = None
    ) -> tuple[FakeTensorMode, LightningModule, Batch]:
        """Return what a training step is made of, on tensors without memory, and the mode that they live in.

        Args:
            precision: as Lightning names it.
            samples: of the batch; by default a forward pass's.
            switches: in place of the recipe's section ``speed``.

        Raises:
            LookupError: what a batch is like is not known.
        """
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        batch = self._batch_on(fake, samples)
        model = _ghost(self.cli, "cpu", precision, self.world_size, fake).train()
        switches = switches or self.cli.config_init.speed
        # the others change neither shapes nor what is kept; some of them are switches of the whole process
        only = SpeedOptions(
            activation_checkpointing=switches.activation_checkpointing, channels_last=switches.channels_last
        )
        speed.apply(only, model)
        with fake:
            return fake, model, tree_map_only(Tensor, lambda t: t.to(_dtype(t, precision)), batch)

    def _batch_on(self, fake: FakeTensorMode, samples: int | None) -> Batch:
        """Return the batch as it comes to the model, on tensors without memory."""
        if self._batch is None:
            raise LookupError("batches are made by data.pipeline, which is not asked for one")
        stream, _ = self.cli.datamodule.without_shards(_channels(self.cli.model))  # keeps what has no content

        def resized(tensor: Tensor) -> Tensor:
            if not tensor.dim() or samples is None:
                return fake.from_tensor(tensor)
            return torch.empty_strided((samples, *tensor.shape[1:]), tensor.stride(), dtype=tensor.dtype)

        full = stream.full_batch(self.samples if samples is None else samples)
        with fake:
            if full is None:
                known = tree_map_only(Tensor, resized, self._batch)
            else:
                known = tree_map_only(Tensor, fake.from_tensor, {**full, "cursor": self._batch["cursor"]})
            batch: Batch = stream.on_after_batch_transfer(known, 0)
        return batch

    def _activation_bytes(self, precision: str, samples: int) -> int:
        """Return the size of what one training step keeps for its backward pass, each storage counted once."""
        fake, model, batch = self.prepared(precision, samples)
        own, kept = _addresses(model), _Kept()
        with fake, torch.enable_grad(), autocast(precision), kept:
            model.training_step(batch, 0)
        checkpointed = self.cli.config_init.speed.activation_checkpointing != "none"
        return kept.bytes(own) + (self._largest_block(precision, samples) if checkpointed else 0)

    def _largest_block(self, precision: str, samples: int) -> int:
        """Return the most that a block keeps beside its inputs: what there is of it while it is computed again."""
        switches = replace(self.cli.config_init.speed, activation_checkpointing="none")
        fake, model, batch = self.prepared(precision, samples, switches)
        own, sizes = _addresses(model), [0]
        for _, block in blocks(model):
            _measure(block, own, sizes)
        with fake, torch.enable_grad(), autocast(precision):
            model.training_step(batch, 0)
        return max(sizes)


class _Kept(torch.autograd.graph.saved_tensors_hooks):
    """The storages of what autograd keeps for the backward pass while this is entered."""

    def __init__(self) -> None:
        self.storages: dict[int, torch.UntypedStorage] = {}  # held, so that no other is given an address of theirs
        super().__init__(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        self.storages[_address(tensor)] = tensor.untyped_storage()
        return tensor

    def bytes(self, without: Container[int]) -> int:
        """Return their size, without those at some addresses."""
        return sum(storage.nbytes() for address, storage in self.storages.items() if address not in without)


def _address(tensor: Tensor) -> int:
    """Return what tells a tensor's storage from others, also where it has no memory."""
    return tensor.untyped_storage()._cdata


def _addresses(model: nn.Module) -> set[int]:
    """Return the addresses of what a model holds itself."""
    return {_address(tensor) for tensor in (*model.parameters(), *model.buffers())}


def _measure(block: nn.Module, own: set[int], sizes: list[int]) -> None:
    """Let a block note what it keeps for its backward pass, beside parameters and inputs, each time it computes."""
    entered: list[tuple[_Kept, set[int]]] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        inputs = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        entered.append((_Kept(), inputs))
        entered[-1][0].__enter__()

    def after(*_: Any) -> None:
        kept, inputs = entered.pop()
        kept.__exit__()
        sizes.append(kept.bytes(own | inputs))

    block.register_forward_pre_hook(before, with_kwargs=True)
    block.register_forward_hook(after)


def autocast(precision: str) -> contextlib.AbstractContextManager[Any]:
    """Return what surrounds a training step in a precision, as Lightning names it."""
    mixed = MIXED.get(precision)
    return torch.autocast("cpu", mixed) if mixed else contextlib.nullcontext()


def why_unknown(what: str, error: Exception) -> str:
    """Return in a line why something cannot be found out."""
    reason = (str(error).strip().splitlines() or [""])[0]
    return f"{what} unknown: {type(error).__name__}: {reason}"[:200]


def _channels(model: nn.Module) -> int:
    """Return the channels of the images that a model is for, as its first convolution has them: 1 or 3."""
    first = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
    return 1 if first == 1 else 3


def _not_counted(of: Sharding, lazy: bool) -> Iterator[str]:
    """Say what is not counted: what has no shape yet, and what comes and goes during a step of a divided model."""
    if lazy:
        yield "parameters of lazy modules are not counted: they have no shape yet"
    if "parameters" in of.divided:
        yield "whole weights of the blocks that are being computed, gathered from the other processes, are not counted"
    if of.kind == "zero":
        yield "DeepSpeed's buckets, through which gradients are exchanged, are not counted"


def _bytes(tensor: Tensor, precision: str) -> int:
    return tensor.numel() * _dtype(tensor, precision).itemsize


def _dtype(tensor: Tensor, precision: str) -> torch.dtype:
    """Return a tensor's type once Lightning has converted it."""
    return TRUE.get(precision, tensor.dtype) if tensor.is_floating_point() else tensor.dtype


def _first_batch(stream: ShardStream, world_size: int, micro_batch: int | None) -> tuple[int, Batch]:
    """Return the number of samples and the tensors, allocated but not read, of rank 0's first forward pass."""
    if micro_batch is not None:
        stream.global_batch_size, stream.micro_batch_size = micro_batch * world_size, micro_batch
    source = stream.source("train")
    order, batches = stream.batches(source, stream._base_order(source))
    largest = sum(samples for _, samples in stream.batch_ramp)  # where batches have grown to their size
    piece = next(iter(BatchPlan(batches, world_size, stream.accumulate(world_size)).pieces(0, largest)))
    places = Places(source, *order.take(piece.epoch, piece.start, max(piece.stop, piece.start + 1)))
    cursor = Cursor(piece.consumed, piece.weight, piece.last)
    batch = stream.allocate_for(source, places, True)
    return len(places), {**batch, "sample": torch.from_numpy(places.samples.copy()), "cursor": cursor}


def _ghost(
    cli: RecipeCLI,
    device: str,
    precision: str,
    world_size: int,
    mode: FakeTensorMode | None = None,
    times: int = 1,
) -> LightningModule:
    """Return a copy of the model with tensors that have no memory, and a Trainer that only answers questions."""
    plain = [value for module in cli.model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    memo: dict[int, Any] = {}
    with mode or contextlib.nullcontext():
        for tensor in (*cli.model.parameters(), *cli.model.buffers(), *plain):
            dtype = _dtype(tensor, precision)
            ghost = torch.empty_strided(tensor.size(), tensor.stride(), dtype=dtype, device=device)
            memo[id(tensor)] = nn.Parameter(ghost, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else ghost
    model: LightningModule = copy.deepcopy(cli.model, memo)
    answers = {"global_step": 0, "current_epoch": 0, "global_rank": 0, "local_rank": 0, "is_global_zero": True}
    model._trainer = SimpleNamespace(  # type: ignore[assignment]
        **answers,
        world_size=world_size,
        estimated_stepping_batches=_STEPS * times,
        max_steps=_STEPS * times,
        max_epochs=(cli.config_init.trainer.max_epochs or 1) * times,
        datamodule=cli.datamodule,
        loggers=[],
        logger=None,
    )
    model.log = lambda *_, **__: None  # type: ignore[method-assign]
    model.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    for module in model.modules():
        if isinstance(module, Metric):  # they look at values
            module.update = lambda *_, **__: None  # type: ignore[method-assign]
            module.forward = module.compute = lambda *_, **__: torch.zeros(())  # type: ignore[method-assign]
    return model


def on_ghost(
    cli: RecipeCLI, precision: str, world_size: int, find: Callable[[LightningModule], Found], times: int = 1
) -> Found:
    """Return what can be found out on a copy of the model without memory, such as by ``configure_optimizers``.

    Args:
        cli: the recipe; its model is not changed.
        precision: as Lightning names it.
        world_size: processes.
        find: is given the copy.
        times: how many times as long as it is it is told that the training is.
    """
    try:
        return find(_ghost(cli, "meta", precision, world_size, times=times))
    except Exception:  # fused optimizers refuse the meta device
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        model = _ghost(cli, "cpu", precision, world_size, fake, times)
        with fake:
            return find(model)


def _state_after_step(model: LightningModule) -> int:
    tensors: dict[int, Tensor] = {}
    for optimizer in optimizers_of(model.configure_optimizers()):
        for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad):
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        tensors.update((id(t), t) for t in tree_leaves(list(optimizer.state.values())) if isinstance(t, Tensor))
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


def optimizers_of(configured: Any) -> Iterator[torch.optim.Optimizer]:
    """Yield the optimizers in whatever ``configure_optimizers`` has returned."""
    if isinstance(configured, torch.optim.Optimizer):
        yield configured
    elif isinstance(configured, dict):
        yield from optimizers_of(configured.get("optimizer"))
    elif isinstance(configured, (list, tuple)):
        for part in configured:
            yield from optimizers_of(part)


def schedules_of(configured: Any) -> list[LRScheduler]:
    """Return the learning-rate schedules in whatever ``configure_optimizers`` has returned."""
    return [leaf for leaf in tree_leaves(configured) if isinstance(leaf, LRScheduler)]
