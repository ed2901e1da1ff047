"""How fast a recipe can train on a GPU, found out without one: its operations, and the roofline of the GPU.

The operations of one training step are counted on tensors without memory: the multiply-adds of products and
convolutions, as torch counts them, and the bytes that each operation reads and writes. An operation takes at least as
long as the GPU's peak rate needs for the first, or its memory for the second, or the start of a kernel: the roofline
(Williams et al. 2009). Kernels reach a share of it.

Not counted are the optimizer's step, communication, and waiting for data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from paperscale.training.estimate import Passes, autocast
from paperscale.training.gpus import GPU

UTILISATION = (0.4, 0.8)
"""The share of the roofline that kernels reach: docs/estimate.md has the measurements."""
_LAUNCH_S = 5e-6
_RATES = {torch.float16: ("fp16", "fp32"), torch.bfloat16: ("bf16", "fp32"), torch.float32: ("fp32",)}


@dataclass(frozen=True)
class Operation:
    """One operation on the GPU.

    Attributes:
        name: as ATen calls it.
        flops: two for each multiply-add of products and convolutions, 0 for all others.
        bytes: of the tensors that it reads and writes.
        dtype: of the numbers that it computes with.
    """

    name: str
    flops: int
    bytes: int
    dtype: torch.dtype | None

    def seconds(self, gpu: GPU, tf32: bool | None) -> float:
        """Return the least time that it takes; infinite where the GPU's rate is not known."""
        rates = _RATES.get(self.dtype or torch.float32, ())
        if self.dtype == torch.float32 and (tf32 or (tf32 is None and "conv" in self.name)):
            rates = ("tf32", *rates)
        rate = gpu.rate(*rates)
        if not gpu.bandwidth or (self.flops and not rate):
            return float("inf")
        return max(self.bytes / gpu.bandwidth, self.flops / rate if self.flops else 0.0, _LAUNCH_S)


@dataclass(frozen=True)
class Work:
    """What one forward and backward pass computes.

    Attributes:
        samples: of the pass.
        forward: its operations.
        backward: those of the backward pass; with activation checkpointing blocks are computed again in it.
    """

    samples: int
    forward: tuple[Operation, ...]
    backward: tuple[Operation, ...]

    @property
    def forward_flops(self) -> float:
        """Return the operations of one sample's forward pass, two for each multiply-add."""
        return sum(operation.flops for operation in self.forward) / self.samples

    @property
    def backward_flops(self) -> float:
        """Return those of its backward pass."""
        return sum(operation.flops for operation in self.backward) / self.samples

    @property
    def bytes(self) -> float:
        """Return what is read and written for one sample."""
        return sum(operation.bytes for operation in (*self.forward, *self.backward)) / self.samples

    def seconds(self, gpu: GPU, tf32: bool | None = None) -> float | None:
        """Return the least time that the pass takes on a GPU, ``None`` where that is not known.

        Args:
            gpu: the GPU.
            tf32: ``speed.tf32`` of the recipe.
        """
        total = sum(operation.seconds(gpu, tf32) for operation in (*self.forward, *self.backward))
        return total if 0 < total < float("inf") else None


def work(passes: Passes, precision: str) -> Work:
    """Return what one pass of a recipe computes.

    Args:
        passes: of the recipe.
        precision: as Lightning names it.

    Raises:
        Exception: whatever a model raises that does what only tensors with content allow.
    """
    fake, model, batch = passes.prepared(precision)
    with fake, torch.enable_grad(), _Counter() as counter:
        with autocast(precision):
            result = model.training_step(batch, 0)
        forward = tuple(counter.found)
        loss: Any = result["loss"] if isinstance(result, dict) else result
        loss.backward()
    return Work(passes.samples, forward, tuple(counter.found[len(forward) :]))


class _Counter(TorchDispatchMode):
    """Notes each operation that computes or copies; not those that only look at memory otherwise, or ask for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        read, written = _tensors((args, kwargs)), _tensors(result)
        storages = {tensor.untyped_storage()._cdata for tensor in read}
        is_view = not func._schema.is_mutable and any(t.untyped_storage()._cdata in storages for t in written)
        if written and not is_view and "empty" not in name:
            formula = flop_registry.get(func._overloadpacket)
            flops = formula(*args, **kwargs, out_val=result) if formula else 0
            dtype = next((tensor.dtype for tensor in read if tensor.is_floating_point()), None)
            moved = sum(tensor.numel() * tensor.itemsize for tensor in (*read, *written))
            self.found.append(Operation(name, flops, moved, dtype))
        return result


def _tensors(values: Any) -> Sequence[Tensor]:
    return list({id(leaf): leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}.values())
