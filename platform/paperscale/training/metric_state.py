"""Metrics in the middle of an epoch, saved per rank and handed over to any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

State = dict[str, dict[str, Any]]


def _metrics(module: nn.Module) -> Iterator[tuple[str, Metric]]:
    return ((name, part) for name, part in module.named_modules() if isinstance(part, Metric))


def metric_state(module: nn.Module) -> State:
    """Return what this rank's metrics have accumulated, by metric and state name."""
    return {
        name: {key: getattr(metric, key) for key in metric._defaults} | {"_update_count": metric._update_count}
        for name, metric in _metrics(module)
    }


def restore_metric_state(module: nn.Module, states: list[State]) -> None:
    """Continue from what the given ranks had accumulated (none: from nothing).

    Sums are added, maxima and minima taken, lists joined, as the metric itself reduces over ranks.
    """
    for name, metric in _metrics(module):
        metric.reset()
        found = [state[name] for state in states if name in state]
        if not found:
            continue
        for key in metric._defaults:
            setattr(metric, key, _merge(metric, key, [state[key] for state in found]))
        metric._update_count = sum(state["_update_count"] for state in found)


def _merge(metric: Metric, key: str, parts: list[Any]) -> Any:
    if isinstance(parts[0], list):
        return [item.to(metric.device) for part in parts for item in part]
    tensors: list[Tensor] = [part.to(metric.device) for part in parts]
    if len(tensors) == 1:
        return tensors[0]
    reduce = metric._reductions[key]
    return reduce(torch.stack(tensors)) if callable(reduce) else tensors[0]
