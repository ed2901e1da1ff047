"""One rank of :mod:`test_optimizers`: the same training with whole and with divided layers."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from paperscale.nn.optimizers import Lamb, Lars, LayerwiseOptimizer, Segment

SHAPES = [(5, 3), (1, 4), (7,), (6, 2)]  # rows that two ranks do not share evenly; one row, of which rank 1 has none
REPLICATED = 2
STEPS = 4


def tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def optimizer_of(kind: str, parameters: list[Any]) -> LayerwiseOptimizer:
    groups = [{"params": parameters[:-1]}, {"params": parameters[-1:], "weight_decay": 0.2}]
    return Lamb(groups, lr=0.1) if kind == "Lamb" else Lars(groups, lr=2.0, trust=0.1)


def whole(kind: str) -> list[Tensor]:
    """Return the parameters after a training that knows of no other rank."""
    parameters = [nn.Parameter(t) for t in tensors(0)]
    optimizer = optimizer_of(kind, parameters)
    for step in range(STEPS):
        for parameter, gradient in zip(parameters, tensors(1 + step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [p.detach() for p in parameters]


def as_dtensors(kind: str, mesh: Any) -> list[Tensor]:
    """Return the same with rows on ranks, as FSDP2 divides layers, and one replica."""

    def divided(values: list[Tensor]) -> list[Any]:
        places = [Replicate() if number == REPLICATED else Shard(0) for number in range(len(values))]
        return [distribute_tensor(t, mesh, [place]) for t, place in zip(values, places, strict=True)]

    parameters = [nn.Parameter(t) for t in divided(tensors(0))]
    optimizer = optimizer_of(kind, parameters)
    for step in range(STEPS):
        for parameter, gradient in zip(parameters, divided(tensors(1 + step)), strict=True):
            parameter.grad = gradient
        SUMS.clear()
        optimizer.step()
    return [p.detach().full_tensor() for p in parameters]  # type: ignore[attr-defined]


def as_partitions(kind: str, rank: int) -> list[Tensor]:
    """Return the same with a stretch of a flat tensor for each rank and group, as ZeRO divides layers."""

    def flattened(values: list[Tensor]) -> list[Tensor]:
        return [torch.cat([t.reshape(-1) for t in values[:-1]] + [torch.zeros(4)]), values[-1].reshape(-1)]

    def mine(values: list[Tensor]) -> list[Tensor]:
        return [flat.chunk(2)[rank].clone() for flat in flattened(values)]

    flats = [nn.Parameter(t) for t in mine(tensors(0))]
    optimizer = optimizer_of(kind, flats)
    sizes = [t.numel() for t in tensors(0)]
    segments: dict[Tensor, list[Segment]] = {}
    for flat, layers in zip(flats, ([0, 1, 2], [3]), strict=True):
        own, first, at = [], flat.numel() * rank, 0
        for layer in layers:
            start, stop = max(at - first, 0), min(at + sizes[layer] - first, flat.numel())
            if start < stop:
                own.append(Segment(start, stop, layer))
            at += sizes[layer]
        segments[flat] = own
    optimizer.divide(segments, len(sizes), summed)
    for step in range(STEPS):
        for flat, gradient in zip(flats, mine(tensors(1 + step)), strict=True):
            flat.grad = gradient
        SUMS.clear()
        optimizer.step()
    groups = []
    for flat in flats:
        parts = [torch.empty_like(flat.detach()) for _ in range(2)]
        dist.all_gather(parts, flat.detach())
        groups.append(torch.cat(parts))
    layers_ = [*groups[0].split([*sizes[:-1], 4])[:-1], groups[1]]
    return [layer.view(shape) for layer, shape in zip(layers_, SHAPES, strict=True)]


SUMS: list[int] = []
_all_reduce = dist.all_reduce


def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    SUMS.append(tensor.numel())
    return _all_reduce(tensor, *args, **kwargs)


def summed(squares: Tensor) -> Tensor:
    dist.all_reduce(squares)
    return squares


def main(rank: int) -> None:
    """Print the largest difference of each case and its sums over ranks a step."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    dist.all_reduce = counted
    found = {}
    for kind in ("Lamb", "Lars"):
        expected = whole(kind)
        for how, values in (("DTensor", lambda k: as_dtensors(k, mesh)), ("flat", lambda k: as_partitions(k, rank))):
            trained = values(kind)
            sums = len(SUMS)
            apart = [float((a - b).abs().max()) for a, b in zip(trained, expected, strict=True)]
            found[f"{kind} {how}"] = [max(apart), sums]
    print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(os.environ["RANK"]))
