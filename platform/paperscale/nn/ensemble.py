"""Ensembles: the mean of several classifiers' scores (He et al. 2015, table 5; Krizhevsky et al. 2012, section 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paperscale.errors import UserError


class Ensemble(nn.Module):
    """Networks whose softmax scores are averaged.

    Args:
        networks: each maps the same input to logits [..., K].
        names: what the networks are called in errors; by default their numbers.
    """

    def __init__(self, networks: Sequence[nn.Module], names: Sequence[str] = ()):
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.names = tuple(names) or tuple(f"network {number}" for number in range(1, len(networks) + 1))

    def forward(self, *inputs: Any) -> Tensor:
        """Return the logarithm of the mean score of each class, [..., K]: logits whose softmax is that mean.

        Raises:
            UserError: the networks tell other numbers of classes apart.
        """
        logits = [network(*inputs) for network in self.networks]
        for name, one in zip(self.names, logits, strict=True):
            if one.shape != logits[0].shape:
                raise UserError(
                    f"{name} gives {one.shape[-1]} classes and {self.names[0]} {logits[0].shape[-1]}: these "
                    "cannot be averaged; leave one of the two out"
                )
        dtype = torch.promote_types(logits[0].dtype, torch.float32)
        scores = torch.stack([one.log_softmax(dim=-1, dtype=dtype) for one in logits])
        return scores.logsumexp(dim=0) - math.log(len(logits))
