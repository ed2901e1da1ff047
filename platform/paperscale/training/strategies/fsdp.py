"""FSDP2: weights, gradients and optimizer state are divided by rows, block by block."""

from __future__ import annotations

import functools
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torchmetrics import Metric

from paperscale.errors import UserError
from paperscale.training.blocks import separable_blocks
from paperscale.training.memory import freed_at_once
from paperscale.training.pieces import Piece, piece_of
from paperscale.training.precision import MIXED
from paperscale.training.strategies.batchnorm import normalise_in_32_bits
from paperscale.training.strategies.portable import PortableStrategy

_STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")


class FSDP2Strategy(PortableStrategy, ModelParallelStrategy):
    """Lightning's strategy for FSDP2, which divides a paper's model without the paper's help.

    Each repeated block (:func:`paperscale.training.blocks.separable_blocks`) is gathered, computed and freed on its
    own; what is left over belongs to the module itself. Under 16-bit mixed precision weights are gathered in 16 bits
    and gradients are averaged in 32. A module with a ``configure_model`` of its own divides itself.

    Args:
        reshard_after_forward: free a block's gathered weights after its forward pass, and gather them again for the
            backward pass; ``False`` keeps them, as ZeRO stage 2 does.
        offload: keep weights, gradients and optimizer state in the memory of the CPU.
    """

    strategy_name = "fsdp"

    def __init__(self, reshard_after_forward: bool = True, offload: bool = False):
        super().__init__(tensor_parallel_size=1)
        self.reshard_after_forward, self.offload = reshard_after_forward, offload

    def setup_environment(self) -> None:
        """Make the mesh of all processes, and let the module be divided where Lightning expects it."""
        module = self.lightning_module
        assert module is not None  # noqa: S101  connected before
        self._data_parallel_size = self.world_size  # Lightning's default is the number of nodes
        if not is_overridden("configure_model", module):
            module.configure_model = functools.partial(self.divide, module)  # type: ignore[method-assign]
        super().setup_environment()

    @property
    def _offloads(self) -> bool:
        return self.offload and self.root_device.type != "cpu"

    def divide(self, module: LightningModule) -> None:
        """Divide the module's blocks, then the rest of it; nothing where that is done."""
        if any(isinstance(part, FSDPModule) for part in module.modules()):
            return
        whole = {
            name: tensor if tensor.is_meta else tensor.detach().clone()
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
            if self.initial is not None
        }
        dtype = MIXED.get(str(self.precision_plugin.precision))
        policy = MixedPrecisionPolicy(dtype, torch.float32 if dtype else None, cast_forward_inputs=False)
        settings: dict[str, Any] = {
            "mesh": self.device_mesh["data_parallel"],
            "mp_policy": policy,
            "offload_policy": CPUOffloadPolicy() if self._offloads else OffloadPolicy(),
        }
        if dtype is not None:
            normalise_in_32_bits(module)
        for _, block in separable_blocks(module):
            fully_shard(block, reshard_after_forward=self.reshard_after_forward, **settings)
        for root in _roots(module):
            fully_shard(root, reshard_after_forward=False, **settings)
        if isinstance(module, FSDPModule):
            for name in _STEPS:
                register_fsdp_forward_method(module, name)
        if whole:
            self._materialise(module, whole)

    def _materialise(self, module: nn.Module, whole: dict[str, Tensor]) -> None:
        """Give each process its rows, one tensor at a time."""
        assert self.initial is not None  # noqa: S101  who builds on the meta device knows the values
        for part in reversed(list(module.modules())):  # a divided module after those whose weights it holds
            if not isinstance(part, Metric):  # it would empty what the metric counts with
                part.to_empty(device="cpu" if self._offloads else self.root_device, recurse=False)
        with torch.no_grad(), freed_at_once():
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                piece = piece_of(name, tensor)
                piece.fill(self.initial(whole[name]).reshape(-1)[piece.start : piece.stop])

    def setup(self, trainer: Trainer) -> None:
        """Set up the optimizers for the divided weights."""
        super().setup(trainer)
        self.initial = None

    def parameter_names(self) -> dict[int, str]:
        """Return the name of each divided parameter, by its id."""
        self.weights_changed()
        return super().parameter_names()

    def parameter_pieces(self) -> list[Piece]:
        """Return this rank's rows of the weights."""
        self.weights_changed()
        return super().parameter_pieces()

    def weights_changed(self) -> None:
        """Free gathered weights: what a forward pass without a backward pass has left is a copy of what was."""
        assert self.lightning_module is not None  # noqa: S101
        for module in self.lightning_module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _roots(module: LightningModule) -> list[nn.Module]:
    """Return what is gathered as one: the module, around its step; its networks where it steps optimizers by hand.

    Backward passes are then inside the step, and their gradients are divided by the networks' own forward passes.

    Raises:
        UserError: the module has weights of its own, which no forward pass but its step's would gather.
    """
    if module.automatic_optimization:
        return [module]
    if own := [name for name, _ in module.named_parameters(recurse=False)]:
        raise UserError(
            f"model {type(module).__name__} steps its optimizers by hand and holds the weight {own[0]} itself: put it "
            "into a module of its own, or use trainer.strategy=ddp"
        )
    return [child for child in module.children() if any(True for _ in child.parameters())]
