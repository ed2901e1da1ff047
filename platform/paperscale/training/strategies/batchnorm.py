"""Batch normalisation in 32 bits where the weights are in 16: its averages need the bits, and the CPU has no other."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def normalise_in_32_bits(module: nn.Module) -> None:
    """Let every batch normalisation of a module compute in 32 bits and return what it was given; parameters stay."""
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.forward = MethodType(_forward, part)  # type: ignore[method-assign]


def _forward(self: Any, x: Tensor) -> Tensor:
    """Return the batch norm of ``x``, shape [B, C, ...], in its type."""
    self._check_input_dim(x)
    averaging = self.training and self.track_running_stats and self.num_batches_tracked is not None
    if averaging:
        self.num_batches_tracked.add_(1)
    momentum = 0.0 if self.momentum is None else self.momentum
    if averaging and self.momentum is None:
        momentum = 1.0 / float(self.num_batches_tracked)
    if self.running_mean is not None and self.running_mean.dtype != torch.float32:  # whoever converts modules wholly
        self.running_mean, self.running_var = self.running_mean.float(), self.running_var.float()
    kept = not self.training or self.track_running_stats
    with torch.autocast(x.device.type, enabled=False):
        return F.batch_norm(
            x.float(),
            self.running_mean if kept else None,
            self.running_var if kept else None,
            None if self.weight is None else self.weight.float(),
            None if self.bias is None else self.bias.float(),
            self.training or (self.running_mean is None and self.running_var is None),
            momentum,
            self.eps,
        ).to(x.dtype)
