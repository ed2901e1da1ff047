"""Losses whose memory does not grow with the vocabulary."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_ELEMENTS = {"cpu": 1 << 21}
"""Elements of the logits that are there at once: what a core's cache holds."""
_ON_GPUS = 1 << 25


class Entropies(NamedTuple):
    """What :func:`linear_cross_entropy` finds.

    Attributes:
        loss: the weighted sum of the rows' cross-entropies, shape []; it alone has a gradient.
        entropy_M: of each row, float32.
        hit_M: whether the target has the highest logit, bool.
    """

    loss: Tensor
    entropy_M: Tensor
    hit_M: Tensor


def linear_cross_entropy(
    hidden_MH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_M: Tensor, share_M: Tensor
) -> Entropies:
    """Return the cross-entropy of a linear layer's logits, of which a few rows are there at a time.

    The gradient is computed beside the loss: nothing of the size of the logits is kept for the backward pass, nor
    computed twice.

    Args:
        hidden_MH: what the layer is applied to.
        weight_VH: of the layer; V is the vocabulary.
        bias_V: of the layer.
        target_M: the right class of each row, int64.
        share_M: the weight of each row in the loss, float32.
    """
    if torch.is_autocast_enabled(hidden_MH.device.type):
        dtype = torch.get_autocast_dtype(hidden_MH.device.type)
    else:
        dtype = hidden_MH.dtype
    return Entropies(*_LinearCrossEntropy.apply(hidden_MH, weight_VH, bias_V, target_M, share_M, dtype))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        share: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            found = _chunks(hidden, weight, bias, target, share, dtype, any(ctx.needs_input_grad[:3]))
        loss, entropy, hit, *gradients = found
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(entropy, hit)
        return loss, entropy, hit

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        for saved in (kept := ctx.saved_tensors):
            if saved is not None:
                saved.mul_(gradients[0])  # in place: that of the weights is as large as these
        return (*kept, None, None, None)


def _chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    share: Tensor,
    dtype: torch.dtype,
    differentiate: bool,
) -> tuple[Any, ...]:
    """Return loss, entropies, hits and, where they are wanted, the gradients of hidden, weight and bias."""
    rows = max(1, _ELEMENTS.get(weight.device.type, _ON_GPUS) // len(weight))
    weight_now = weight.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    entropies, hits, of_hidden = [], [], []
    of_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if differentiate else None
    of_bias = torch.zeros(len(weight), dtype=wide, device=weight.device) if differentiate and bias is not None else None
    for x, y, part in zip(hidden.split(rows), target.split(rows), share.split(rows), strict=True):
        x_now = x.to(dtype)
        logits = (x_now @ weight_now.T).to(wide)
        if bias is not None:
            logits += bias
        highest, place = logits.max(1, keepdim=True)
        hits.append(place[:, 0] == y)
        of_target = logits.gather(1, y[:, None]) - highest
        slope = logits.sub_(highest).exp_()
        total = slope.sum(1, keepdim=True)
        entropies.append((total.log() - of_target)[:, 0])
        if of_weight is None:
            continue
        slope *= part[:, None] / total
        slope.scatter_add_(1, y[:, None], -part[:, None].to(slope.dtype))
        if of_bias is not None:
            of_bias += slope.sum(0)
        slope_now = slope.to(dtype)
        of_hidden.append((slope_now @ weight_now).to(hidden.dtype))
        of_weight += slope_now.T @ x_now
    entropy = torch.cat(entropies)
    gradients: tuple[Tensor | None, ...] = (None, None, None)
    if of_weight is not None:
        cast = of_bias if of_bias is None or bias is None else of_bias.to(bias.dtype)
        gradients = (torch.cat(of_hidden), of_weight.to(weight.dtype), cast)
    return (entropy * share).sum(), entropy, torch.cat(hits), *gradients
