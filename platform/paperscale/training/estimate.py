"""How much memory of a GPU a recipe needs, found out without a GPU and without taking that memory.

Parameters, gradients and optimizer state are exact: the optimizer of ``configure_optimizers`` makes one step on tensors
that have shapes but no content. Activations are what autograd keeps for the backward pass of one micro-batch, counted
in a ``training_step`` on such tensors. Not counted are the workspaces of kernels and the CUDA context (about 0.5 GiB).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from paperscale.training.precision import MIXED, TRUE
from paperscale.training.recipe import RecipeCLI
from paperscale.training.sharding import Sharding, sharding

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

    @property
    def certain(self) -> int:
        """Return what is needed whatever the batch: parameters, gradients, optimizer state and buffers."""
        return self.parameters + self.gradients + (self.optimizer or 0) + self.buffers

    @property
    def total(self) -> int:
        """Return the sum of what is known."""
        return self.certain + self.buckets + (self.activations or 0)

    def __str__(self) -> str:
        """Return a table."""
        names = ("parameters", "gradients", "optimizer", "buffers", "buckets", "activations")
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
        cli: the recipe; its model may be on the meta device. It is not changed.
        world_size: processes.
        micro_batch: samples of a forward pass; by default what the recipe makes of its global batch.
        strategy: a name, or ``class_path`` and ``init_args``; by default the recipe's.

    Raises:
        UserError: the global batch cannot be divided over the processes, or the shards cannot be opened.
    """
    trainer = cli.config_init.trainer
    precision = _ALIASES.get(str(trainer.precision), str(trainer.precision))
    of = sharding(strategy or cli.config.trainer.strategy, world_size)
    if of.kind == "zero":  # keeps 32-bit weights beside 16-bit ones, whichever of the two it is called
        precision = {"16-true": "16-mixed", "bf16-true": "bf16-mixed"}.get(precision, precision)
    samples, batch = _first_batch(cli.datamodule, world_size, micro_batch)
    unknown: list[str] = []
    optimizer = _noting(unknown, "optimizer", lambda: on_ghost(cli, precision, world_size, _state_after_step))
    activations = _noting(unknown, "activations", lambda: _activation_bytes(cli, batch, precision, world_size))
    known = [p for p in cli.model.parameters() if not is_lazy(p)]
    weights = sum(_bytes(p, precision) for p in known)
    gradients = sum(_bytes(p, precision) for p in known if p.requires_grad)
    if of.kind == "zero" and precision in MIXED:  # 16-bit weights and gradients; 32-bit weights with the optimizer
        optimizer = None if optimizer is None else optimizer + weights
        weights, gradients = weights // 2, gradients // 2
    lazy = len(known) < len(list(cli.model.parameters()))
    unknown += _not_counted(of, lazy)

    def share(part: str, size: int) -> int:
        return 0 if part in of.offloaded else -(-size // (world_size if part in of.divided else 1))

    return Estimate(
        world_size,
        samples,
        of.name,
        precision,
        count=sum(p.numel() for p in known),
        parameters=share("parameters", weights),
        gradients=share("gradients", gradients),
        optimizer=None if optimizer is None else share("optimizer", optimizer),
        buffers=sum(_bytes(b, precision) for b in cli.model.buffers() if not is_lazy(b)),
        buckets=gradients if of.kind == "ddp" and world_size > 1 else 0,
        activations=activations,
        unknown=tuple(unknown),
    )


def _not_counted(of: Sharding, lazy: bool) -> Iterator[str]:
    """Say what is not counted: what has no shape yet, and what comes and goes during a step of a divided model."""
    if lazy:
        yield "parameters of lazy modules are not counted: they have no shape yet"
    if "parameters" in of.divided:
        yield "whole weights of the blocks that are being computed, gathered from the other processes, are not counted"
    if of.kind == "zero":
        yield "DeepSpeed's buckets, through which gradients are exchanged, are not counted"


def _noting(unknown: list[str], what: str, find: Callable[[], int]) -> int | None:
    """Return what is found, or note why it cannot be: a model may do what only tensors with content allow."""
    try:
        return find()
    except Exception as error:  # whatever a user's model raises on tensors without content
        reason = (str(error).strip().splitlines() or [""])[0]
        unknown.append(f"{what} unknown: {type(error).__name__}: {reason}"[:200])
        return None


def _bytes(tensor: Tensor, precision: str) -> int:
    return tensor.numel() * _dtype(tensor, precision).itemsize


def _dtype(tensor: Tensor, precision: str) -> torch.dtype:
    """Return a tensor's type once Lightning has converted it."""
    return TRUE.get(precision, tensor.dtype) if tensor.is_floating_point() else tensor.dtype


def _first_batch(datamodule: ShardStream, world_size: int, micro_batch: int | None) -> tuple[int, Batch]:
    """Return the number of samples and the tensors, allocated but not read, of rank 0's first forward pass."""
    stream = copy.copy(datamodule)
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


def _activation_bytes(cli: RecipeCLI, batch: Batch, precision: str, world_size: int) -> int:
    """Return the size of what one training step keeps for its backward pass, each storage counted once."""
    stream = copy.copy(cli.datamodule)  # its own, for what it computes here has no content
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    model = _ghost(cli, "cpu", precision, world_size, fake).train()
    with fake, torch.enable_grad():
        own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        batch = stream.on_after_batch_transfer(tree_map_only(Tensor, fake.from_tensor, batch), 0)
        batch = tree_map_only(Tensor, lambda t: t.to(_dtype(t, precision)), batch)
        kept: dict[int, Any] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage  # held, so that no other is given its address
            return tensor

        mixed = MIXED.get(precision)
        with (
            torch.autocast("cpu", mixed) if mixed else contextlib.nullcontext(),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            model.training_step(batch, 0)
    return sum(storage.nbytes() for key, storage in kept.items() if key not in own)
