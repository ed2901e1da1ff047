"""Optimizers for large batches: LAMB and LARS, exact also where a layer's elements are divided over ranks.

Both scale the step of each layer by a ratio of two norms over the *whole* layer, where "layer" is one parameter
tensor. An optimizer that takes the norms of what it is given is wrong under sharding: a rank holds some rows of a
layer (FSDP2), or one flat tensor with stretches of several layers (ZeRO). Here the squared norms of all layers are
collected in one vector and summed over the ranks, once a step; the numbers are those of the undivided model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from paperscale.errors import UserError

Parameters: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]]

_ROW = 4096  # elements; the CPU's norm of more than some rows of these in float32 is wrong in the third digit


@dataclass(frozen=True)
class Segment:
    """Elements ``start`` to ``stop`` of a flat tensor, which belong to layer number ``index``."""

    start: int
    stop: int
    index: int


@dataclass(frozen=True)
class _Division:
    segments: Mapping[Tensor, Sequence[Segment]]
    count: int
    reduce: Callable[[Tensor], Tensor]


class _Home(NamedTuple):
    """Over what a layer is divided: layers of the same home share one sum over ranks."""

    mesh: DeviceMesh | None
    dims: tuple[int, ...]
    device: torch.device


@dataclass(frozen=True)
class _Work:
    """What a step does to one parameter group; item i of each list is this rank's elements of one layer.

    Attributes:
        group: the parameter group.
        weights: w.
        measured: whose norm is compared with that of w.
        directions: where w goes, before the layers' ratios.
        buffers: momenta that the directions are added to.
        homes: over what each layer is divided.
        indices: the layer's number in a division.
    """

    group: dict[str, Any]
    weights: list[Tensor]
    measured: list[Tensor]
    directions: list[Tensor]
    buffers: list[Tensor]
    homes: list[_Home]
    indices: list[int]


class LayerwiseOptimizer(Optimizer):
    """What LAMB and LARS have in common: a step whose length is set for each layer by the norms of the layer.

    A group's ``adapt`` says whether its layers are scaled: ``True``, ``False``, or ``None`` for "where there is weight
    decay". ``None`` is the default, as in the reference code of both papers' results, which leaves biases and
    normalisations (no decay) alone: their norms are small, often zero at the start, and say nothing of the step.

    A step needs memory for one more copy of what this rank holds of the parameters.

    Raises:
        UserError: a value is out of its range, or no group's layers would be scaled.
    """

    _averages: tuple[str, ...]
    _division: _Division | None = None

    def __init__(self, params: Parameters, defaults: dict[str, Any]):
        for name in ("lr", "weight_decay", "eps", "momentum", "trust"):
            if defaults.get(name, 0.0) < 0:
                raise UserError(f"{type(self).__name__}: {name} is {defaults[name]}; use a number of at least 0")
        super().__init__(params, defaults)
        if not any(map(adapts, self.param_groups)):
            raise UserError(
                f"{type(self).__name__}: no group has weight decay, so that no layer's step would be scaled; set a "
                "weight_decay, or adapt=True to scale layers without decay too"
            )

    def divide(
        self, segments: Mapping[Tensor, Sequence[Segment]], count: int, reduce: Callable[[Tensor], Tensor]
    ) -> None:
        """Say which layers' elements the flat tensors hold that this rank steps (ZeRO).

        Every rank must step the same groups in the same order. Elements in no segment (padding) are left alone.

        Args:
            segments: of every tensor in the parameter groups: where each layer's elements lie.
            count: number of layers; a segment's ``index`` is less than it.
            reduce: sums a vector of shape [2 count] over the ranks that the layers are divided over.
        """
        self._division = _Division(segments, count, reduce)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one optimization step; return the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [(group, self._parameters(group)) for group in self.param_groups]
        works = [self._prepare(group, parameters) for group, parameters in moving if parameters]
        self._scale([work for work in works if adapts(work.group)])
        for work in works:
            if work.weights:
                self._move(work)
        return loss

    def _prepare(self, group: dict[str, Any], parameters: list[Tensor]) -> _Work:
        """Update the running averages and return where the parameters go."""
        raise NotImplementedError

    def _ratios(self, group: dict[str, Any], weight_L: Tensor, measured_L: Tensor) -> Tensor:
        """Return each layer's factor from the norms of the weights and of what they are compared with, shape [L]."""
        raise NotImplementedError

    def _move(self, work: _Work) -> None:
        """Change the weights."""
        raise NotImplementedError

    def _parameters(self, group: dict[str, Any]) -> list[Tensor]:
        """Return the group's parameters with a gradient, after making the state of those that have none yet."""
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in parameters:
            if parameter.grad.is_sparse:
                raise UserError(f"{type(self).__name__} cannot take sparse gradients; make the embedding sparse=False")
            state = self.state[parameter]
            for name in self._averages:
                if name not in state:
                    state[name] = torch.zeros_like(parameter)
        return parameters

    def _work(
        self,
        group: dict[str, Any],
        parameters: list[Tensor],
        measured: list[Tensor],
        directions: list[Tensor],
        buffers: list[Tensor],
    ) -> _Work:
        """Cut the parameters' tensors into layers."""
        if self._division is None:
            homes = [_home(parameter) for parameter in parameters]
            return _Work(group, [_local(p) for p in parameters], measured, directions, buffers, homes, [])
        segments = [self._division.segments[parameter] for parameter in parameters]

        def cut(tensors: list[Tensor]) -> list[Tensor]:
            return [tensor[s.start : s.stop] for tensor, own in zip(tensors, segments, strict=False) for s in own]

        indices = [s.index for own in segments for s in own]
        return _Work(group, cut(parameters), cut(measured), cut(directions), cut(buffers), [], indices)

    def _scale(self, works: list[_Work]) -> None:
        """Multiply each layer's direction by its ratio."""
        weights = norms([weight for work in works for weight in work.weights])
        measured = norms([tensor for work in works for tensor in work.measured])
        if self._division and works:
            indices = [index for work in works for index in work.indices]
            weights, measured = _sum_segments(self._division, indices, weights, measured)
        else:
            homes = [home for work in works for home in work.homes]
            weights, measured = _sum_shards(homes, weights, measured)
        at = 0
        for work in works:
            if layers := len(work.weights):
                ratios = self._ratios(
                    work.group, torch.stack(weights[at : at + layers]), torch.stack(measured[at : at + layers])
                )
                torch._foreach_mul_(work.directions, list(ratios.unbind()))
                at += layers


def adapts(group: Mapping[str, Any]) -> bool:
    """Return whether the steps of a parameter group's layers are scaled."""
    return bool(group["weight_decay"] > 0 if group["adapt"] is None else group["adapt"])


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the 2-norms of tensors, each of shape [] and in float32 or better."""
    if not tensors:
        return []
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return list(torch._foreach_norm([_rows(tensor, dtype) for tensor in tensors], 2, dtype=dtype))


def _rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a shorter tensor of the same norm where the CPU would add up too many squares in float32."""
    if tensor.device.type != "cpu" or tensor.numel() <= 16 * _ROW:
        return tensor
    flat = tensor.reshape(-1)
    rows, rest = flat[: len(flat) // _ROW * _ROW].view(-1, _ROW), flat[len(flat) // _ROW * _ROW :]
    return torch.cat([torch.linalg.vector_norm(rows, dim=1, dtype=dtype), rest.to(dtype)])


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's elements."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _home(parameter: Tensor) -> _Home:
    """Return over what a parameter is divided; a replica over nothing, so that it is not summed."""
    if not isinstance(parameter, DTensor):
        return _Home(None, (), parameter.device)
    sharded = [dim for dim, placement in enumerate(parameter.placements) if not placement.is_replicate()]
    return _Home(parameter.device_mesh, tuple(sharded), parameter.to_local().device)


def _sum_segments(
    division: _Division, indices: list[int], weights: list[Tensor], measured: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the norms of the whole layers from those of this rank's segments."""
    places = [*indices, *(division.count + index for index in indices)]
    squares = [torch.zeros((), device=next(iter(division.segments)).device)] * (2 * division.count)
    for place, norm in zip(places, [*weights, *measured], strict=True):
        squares[place] = squares[place] + norm.square()
    sums = division.reduce(torch.stack(squares)).sqrt().unbind()
    whole = [sums[place] for place in places]
    return whole[: len(indices)], whole[len(indices) :]


def _sum_shards(homes: list[_Home], weights: list[Tensor], measured: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the norms of the whole layers from those of this rank's shards."""
    weights, measured = list(weights), list(measured)
    members: dict[_Home, list[int]] = {}
    for number, home in enumerate(homes):
        if home.mesh is not None and home.dims:
            members.setdefault(home, []).append(number)
    for (mesh, dims, device), numbers in members.items():
        assert mesh is not None  # noqa: S101  those without one were left out above
        own = torch.stack([weights[n] for n in numbers] + [measured[n] for n in numbers]).square()
        squares = own.to(mesh.device_type)  # parameters offloaded to the CPU are summed where their mesh is
        for dim in dims:
            dist.all_reduce(squares, group=mesh.get_group(dim))
        whole = squares.to(device).sqrt().unbind()
        for place, number in enumerate(numbers):
            weights[number], measured[number] = whole[place], whole[len(numbers) + place]
    return weights, measured


class Lamb(LayerwiseOptimizer):
    """LAMB: You et al. 2019, Large Batch Optimization for Deep Learning, https://arxiv.org/abs/1904.00962, algorithm 2.

    For each layer with weights x and gradient g::

        m = b1 m + (1 - b1) g          m' = m / (1 - b1^t)
        v = b2 v + (1 - b2) g^2        v' = v / (1 - b2^t)
        r = m' / (sqrt(v') + eps)
        x = x - lr phi(|x|) / |r + decay x| (r + decay x)

    phi is the identity, bounded by ``phi`` where it is given. The ratio is 1 where either norm is 0. The published
    runs clip the global gradient norm to 1 before this: ``trainer.gradient_clip_val: 1.0``.

    Args:
        params: parameters, or groups of them; see :func:`decay_groups`.
        lr: learning rate.
        betas: b1 and b2.
        eps: added to the denominator.
        weight_decay: decay.
        bias_correction: whether m and v are corrected; the paper's appendix finds warm-up to serve as well.
        phi: bounds of phi(|x|), as the paper's gamma_l and gamma_u.
        max_trust: upper bound of the ratio.
        adapt: whether a group's layers are scaled; ``None``: where there is weight decay.

    Raises:
        UserError: a value is out of its range, or no group's layers would be scaled.
    """

    _averages = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
        phi: tuple[float, float] | None = None,
        max_trust: float | None = None,
        adapt: bool | None = None,
    ):
        if not all(0 <= beta < 1 for beta in betas):
            raise UserError(f"Lamb: betas are {tuple(betas)}; use two numbers from 0 to below 1, such as (0.9, 0.999)")
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": tuple(betas),
                "eps": eps,
                "weight_decay": weight_decay,
                "bias_correction": bias_correction,
                "phi": phi,
                "max_trust": max_trust,
                "adapt": adapt,
            },
        )

    def _prepare(self, group: dict[str, Any], parameters: list[Tensor]) -> _Work:
        beta1, beta2 = group["betas"]
        states = [self.state[parameter] for parameter in parameters]
        for state in states:
            state.setdefault("step", torch.zeros((), device="cpu")).add_(1)  # there, reading it waits for no GPU
        steps = [float(state["step"]) if group["bias_correction"] else float("inf") for state in states]
        gradients = [_local(parameter.grad) for parameter in parameters]  # type: ignore[arg-type]
        averages, squares = _moved_averages(states, gradients, beta1, beta2)
        # r = m / (c1 (sqrt(v / c2) + eps)), in place: a quotient would be another copy of the parameters
        c1, c2 = ([1 - beta**step for step in steps] for beta in (beta1, beta2))
        directions = list(torch._foreach_sqrt(squares))
        torch._foreach_mul_(directions, [first / second**0.5 for first, second in zip(c1, c2, strict=True)])
        torch._foreach_add_(directions, [first * group["eps"] for first in c1])
        torch._foreach_reciprocal_(directions)
        torch._foreach_mul_(directions, averages)
        if group["weight_decay"]:
            torch._foreach_add_(directions, [_local(p) for p in parameters], alpha=group["weight_decay"])
        return self._work(group, parameters, directions, directions, [])

    def _ratios(self, group: dict[str, Any], weight_L: Tensor, measured_L: Tensor) -> Tensor:
        ratios = (weight_L.clamp(*group["phi"]) if group["phi"] else weight_L) / measured_L
        ratios = ratios.where((weight_L != 0) & (measured_L != 0), 1.0)
        return ratios if group["max_trust"] is None else ratios.clamp(max=group["max_trust"])

    def _move(self, work: _Work) -> None:
        torch._foreach_add_(work.weights, work.directions, alpha=-work.group["lr"])


class Lars(LayerwiseOptimizer):
    """LARS: You et al. 2017, Large Batch Training of Convolutional Networks, https://arxiv.org/abs/1708.03888.

    For each layer with weights w and gradient g (equation 6 and algorithm 1)::

        l = trust |w| / (|g| + decay |w|)
        v = momentum v + lr l (g + decay w)
        w = w - v

    As in the paper, and unlike PyTorch's SGD, v holds steps of past learning rates. l is 1 where either norm is 0,
    and in groups that are not adapted.

    Args:
        params: parameters, or groups of them; see :func:`decay_groups`.
        lr: the global learning rate.
        momentum: of v.
        weight_decay: decay.
        trust: the coefficient eta of equation 6.
        adapt: whether a group's layers are scaled; ``None``: where there is weight decay.

    Raises:
        UserError: a value is out of its range, or no group's layers would be scaled.
    """

    _averages = ("momentum_buffer",)

    def __init__(
        self,
        params: Parameters,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        trust: float = 0.001,
        adapt: bool | None = None,
    ):
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "adapt": adapt},
        )

    def _prepare(self, group: dict[str, Any], parameters: list[Tensor]) -> _Work:
        gradients = [_local(parameter.grad) for parameter in parameters]  # type: ignore[arg-type]
        weights = [_local(parameter) for parameter in parameters]
        directions = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
        buffers = [_local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        return self._work(group, parameters, gradients, directions, buffers)

    def _ratios(self, group: dict[str, Any], weight_L: Tensor, measured_L: Tensor) -> Tensor:
        ratios = group["trust"] * weight_L / (measured_L + group["weight_decay"] * weight_L)
        return ratios.where((weight_L != 0) & (measured_L != 0), 1.0)

    def _move(self, work: _Work) -> None:
        torch._foreach_mul_(work.buffers, work.group["momentum"])
        torch._foreach_add_(work.buffers, work.directions, alpha=work.group["lr"])
        torch._foreach_sub_(work.weights, work.buffers)


def _moved_averages(
    states: list[dict[str, Any]], gradients: list[Tensor], beta1: float, beta2: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Update Adam's running averages of gradients and of their squares, and return them."""
    averages, squares = ([_local(state[name]) for state in states] for name in ("exp_avg", "exp_avg_sq"))
    torch._foreach_lerp_(averages, gradients, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
    return averages, squares


class BertAdam(Optimizer):
    """Adam as BERT's own code has it, without bias correction (Devlin et al. 2019, ``optimization.py``).

    With gradient g of weights x::

        m = b1 m + (1 - b1) g
        v = b2 v + (1 - b2) g^2
        x = x - lr (m / (sqrt(v) + eps) + decay x)

    The first steps are longer than Adam's, by up to (1 - b1) / sqrt(1 - b2), about 3; on small data sets fine-tuning
    with it fails more often (Mosbach et al. 2021, section 5).

    Args:
        params: parameters, or groups of them; see :func:`decay_groups`.
        lr: learning rate.
        betas: b1 and b2.
        eps: added to the denominator.
        weight_decay: decay.

    Raises:
        UserError: a value is out of its range.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ):
        if not all(0 <= beta < 1 for beta in betas):
            raise UserError(f"BertAdam: betas are {tuple(betas)}; use two numbers from 0 to below 1")
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value < 0:
                raise UserError(f"BertAdam: {name} is {value}; use a number of at least 0")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one optimization step; return the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if parameters := [p for p in group["params"] if p.grad is not None]:
                self._move(group, parameters)
        return loss

    def _move(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                if name not in state:
                    state[name] = torch.zeros_like(parameter)
        weights = [_local(p) for p in parameters]
        gradients = [_local(p.grad) for p in parameters]  # type: ignore[arg-type]
        averages, squares = _moved_averages(states, gradients, *group["betas"])
        directions = list(torch._foreach_sqrt(squares))
        torch._foreach_add_(directions, group["eps"])
        torch._foreach_reciprocal_(directions)
        torch._foreach_mul_(directions, averages)
        if group["weight_decay"]:
            torch._foreach_add_(directions, weights, alpha=group["weight_decay"])
        torch._foreach_add_(weights, directions, alpha=-group["lr"])


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return a module's parameters in two groups: matrices and kernels with weight decay, biases and norms without.

    Args:
        module: with the parameters; those that need no gradient are left out.
        weight_decay: of parameters with two dimensions or more.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    # ZeRO-3 empties a parameter that it has divided and keeps the shape beside it
    vectors = {parameter for parameter in parameters if len(getattr(parameter, "ds_shape", parameter.shape)) < 2}
    groups = [
        {"params": [p for p in parameters if p not in vectors], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p in vectors], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
