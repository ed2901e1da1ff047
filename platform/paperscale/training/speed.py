"""What makes training faster or smaller without changing what is trained: the section ``speed`` of a recipe."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

from paperscale.errors import UserError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from lightning.pytorch import LightningModule
    from torch import Tensor, nn
    from torch.optim import Optimizer

_VARIANTS = 16  # of one block's graph: training and evaluation, whole and last batch, precisions


@dataclass
class SpeedOptions:
    """Switches that trade compute, memory and start-up time; none changes names of parameters or their layout.

    Attributes:
        compile: torch.compile each repeated block (starts soonest: equal blocks share a graph), or each network whole.
            Compiled dropout draws other random numbers than eager dropout does.
        compile_mode: of torch.compile.
        compile_backend: what makes kernels of the graphs: ``inductor``, which needs a C++ compiler, and Triton on GPUs;
            ``aot_eager`` runs them as they are, to find out what torch.compile does not understand.
        compile_dynamic: of torch.compile: graphs for any shapes; ``null`` lets it find out which dimensions vary.
        activation_checkpointing: keep only the inputs of each repeated block for the backward pass, and compute the
            rest again; the gradients are the same to the last bit, dropout and batch normalisation included.
        channels_last: compute on images in the layout NHWC, which tensor cores want; weights keep their layout.
        tf32: round the factors of 32-bit products to 10 bits of mantissa on NVIDIA GPUs, in matrices and convolutions;
            ``false`` in neither, ``null`` as PyTorch does by itself: in convolutions.
        optimizer: implementation of the paper's optimizers: ``fused`` (one kernel), ``foreach`` (a few for all
            parameters), ``loop`` (some for each), or what torch chooses.
        cudnn_benchmark: measure convolution algorithms for each new shape and take the fastest; not reproducible to
            the last bit.
    """

    compile: Literal["none", "blocks", "model"] = "none"
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    compile_backend: Literal["inductor", "aot_eager"] = "inductor"
    compile_dynamic: bool | None = None
    activation_checkpointing: Literal["none", "blocks"] = "none"
    channels_last: bool = False
    tf32: bool | None = None
    optimizer: Literal["auto", "fused", "foreach", "loop"] = "auto"
    cudnn_benchmark: bool = False


def apply(options: SpeedOptions, model: LightningModule) -> None:
    """Switch on what the recipe asks for, before a Trainer sets the model up.

    Blocks are compiled, then checkpointed around the graph: torch's compiler gives up on a checkpoint in which buffers
    change, and batch normalisation would then count each batch twice. A strategy divides the blocks afterwards. A deep
    copy of the model has the same switches on.

    Args:
        options: of the recipe.
        model: is changed in place; no tensor of it is touched, so that it may be on the meta device.

    Raises:
        UserError: an option does not fit the model; or later, when its optimizers are configured, does not fit these.
    """
    check(options, model)
    found = [block for _, block in _blocks(model)]
    checkpointing = options.activation_checkpointing == "blocks"
    if options.compile == "blocks" or (options.compile == "model" and checkpointing):
        _compile(options, found)
    if checkpointing:
        for block in found:
            _wrap_forward(block, _checkpointed)
    if options.compile == "model":
        _compile(options, networks(model))
    if options.channels_last:
        for network in networks(model):
            network.register_forward_pre_hook(_images_to_channels_last, with_kwargs=True)
    if options.optimizer != "auto":
        _wrap_configure_optimizers(model, options.optimizer)
    _set_backends(options)


def check(options: SpeedOptions, model: LightningModule) -> None:
    """Refuse options that do not fit a model.

    Raises:
        UserError: blocks are to be compiled or checkpointed and the model has none, or options exclude each other.
    """
    keys = [key for key in ("compile", "activation_checkpointing") if getattr(options, key) == "blocks"]
    if keys and not _blocks(model):
        other = "model" if keys[0] == "compile" else "none"
        raise UserError(
            f"speed.{keys[0]}=blocks: {type(model).__name__} repeats no block in an nn.ModuleList or nn.Sequential; "
            f"name the blocks' classes in an attribute block_classes of the network, or use speed.{keys[0]}={other}"
        )
    if options.compile_backend != "inductor" and options.compile_mode != "default":
        raise UserError(
            f"speed.compile_mode={options.compile_mode} is for speed.compile_backend=inductor; "
            f"use speed.compile_mode=default with {options.compile_backend}"
        )


def _blocks(model: LightningModule) -> list[tuple[str, nn.Module]]:
    from paperscale.training.blocks import blocks

    return blocks(model)


def networks(model: nn.Module) -> list[nn.Module]:
    """Return the outermost modules in a LightningModule that have parameters and a ``forward``."""
    from torch import nn

    found: list[nn.Module] = []
    for child in model.children():
        if not any(True for _ in child.parameters()):
            continue
        is_container = isinstance(child, (nn.ModuleList, nn.ModuleDict))
        found += networks(child) if is_container else [child]
    return found


def _wrap_forward(module: nn.Module, wrap: Callable[[Any], Any]) -> None:
    """Replace a module's ``forward``, which changes no name, by one that a deep copy of the module has as its own."""
    forward: Any = module.forward
    module.forward = MethodType(wrap(forward.__func__), module)


# -- activation checkpointing ------------------------------------------------------------------------------


@functools.cache
def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    import torch
    from torch.utils.checkpoint import checkpoint

    @torch.compiler.disable
    @functools.wraps(forward, updated=())  # the marks of a compiled function are not this one's
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(self, *args, **kwargs)
        contexts = functools.partial(_contexts, self)
        return checkpoint(forward, self, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return run


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return what surrounds the first computation of a block, which is about to begin, and what the second."""
    return nullcontext(), _BuffersAsNow(block)


class _BuffersAsNow:
    """Lets a block compute again with the buffers that it has now, and forgets what it writes into them.

    Batch normalisation would else count each batch twice.
    """

    def __init__(self, block: nn.Module):
        self.parts = [part for part in block.modules() if part._buffers]
        self.then = [_copy(part._buffers) for part in self.parts]

    def __enter__(self) -> None:
        self.now = [part._buffers for part in self.parts]
        for part, buffers in zip(self.parts, self.then, strict=True):
            part._buffers = _copy(buffers)

    def __exit__(self, *error: object) -> None:
        for part, buffers in zip(self.parts, self.now, strict=True):
            part._buffers = buffers


def _copy(buffers: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()}


# -- compilation and layout --------------------------------------------------------------------------------


def _compile(options: SpeedOptions, modules: list[nn.Module]) -> None:
    """Compile modules; those of one class share graphs where their shapes are equal."""
    import torch
    import torch._dynamo

    config: Any = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    kinds = len({tuple(parameter.shape for parameter in module.parameters()) for module in modules})
    setattr(
        config, limit, max(getattr(config, limit), _VARIANTS * kinds)
    )  # beyond it, torch computes without compiling

    @functools.cache
    def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
        mode = options.compile_mode if options.compile_backend == "inductor" else None
        return torch.compile(forward, backend=options.compile_backend, mode=mode, dynamic=options.compile_dynamic)

    for module in modules:
        _wrap_forward(module, compiled)


def _images_to_channels_last(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Lay out a network's images as NHWC; convolutions and what follows them keep the layout."""
    import torch

    def laid_out(value: Any) -> Any:
        is_image = isinstance(value, torch.Tensor) and value.dim() == 4 and value.is_floating_point()
        return value.contiguous(memory_format=torch.channels_last) if is_image else value

    return tuple(map(laid_out, args)), {name: laid_out(value) for name, value in kwargs.items()}


# -- optimizers and backends -------------------------------------------------------------------------------


def _wrap_configure_optimizers(model: LightningModule, kind: str) -> None:
    """Choose the implementation of the optimizers that the paper configures."""
    from paperscale.training.estimate import optimizers_of

    configure: Any = model.configure_optimizers

    @functools.wraps(configure.__func__)
    def configured(self: LightningModule) -> Any:
        result = configure.__func__(self)
        for optimizer in optimizers_of(result):
            use_implementation(optimizer, kind)
        return result

    model.configure_optimizers = MethodType(configured, model)  # type: ignore[method-assign]


def use_implementation(optimizer: Optimizer, kind: str) -> None:
    """Choose how an optimizer that has not stepped yet computes its step.

    Args:
        optimizer: one of torch's.
        kind: ``fused``, ``foreach`` or ``loop``.

    Raises:
        UserError: its class has no such implementation.
    """
    has = [name for name in ("fused", "foreach") if name in optimizer.defaults]
    if kind != "loop" and kind not in has:
        raise UserError(
            f"speed.optimizer={kind}: {type(optimizer).__name__} has no {kind} implementation; "
            f"use speed.optimizer={' or '.join([*has, 'auto'])}"
        )
    for settings in (optimizer.defaults, *optimizer.param_groups):
        settings.update({name: name == kind for name in has})
    if "fused" in has:  # as their constructors do: the scaler leaves unscaling to a fused step
        optimizer._step_supports_amp_scaling = kind == "fused"  # type: ignore[attr-defined]
        optimizer._need_device_dtype_check_for_fused = kind == "fused"  # type: ignore[attr-defined]


def _set_backends(options: SpeedOptions) -> None:
    import torch

    if options.tf32 is not None:
        torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = options.tf32
    if options.cudnn_benchmark:
        torch.backends.cudnn.benchmark = True
