"""Statistics of batch normalisation computed after training, in place of moving averages.

The released models of He et al. 2015 have the mean and the variance of "a sufficiently large training batch after
training"; Wu & Johnson 2021 ("Rethinking Batch in BatchNorm", section 3) call it precise batch normalisation. Moving
averages lag behind the weights, and remember the last few dozen batches only.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from paperscale.data import ImageShards
from paperscale.data.batching import Piece as Positions
from paperscale.data.loader import OrderedLoader
from paperscale.errors import UserError
from paperscale.training.callbacks import datamodule
from paperscale.training.checkpoint import random_state, restore_random_state
from paperscale.training.ema import EMA
from paperscale.training.heartbeat import Heartbeat
from paperscale.training.logbook import all_callbacks
from paperscale.training.pieces import Piece, piece_of
from paperscale.training.pulse import Pulse
from paperscale.training.tensorfile import TensorReader

_REPORT_S = 5.0
_SUFFIXES = ("running_mean", "running_var")

T = TypeVar("T")


class RecomputeBatchNorm(Callback):
    """Replaces running means and variances by those of training samples, once the weights are trained.

    The samples are the first of the epoch that would follow, augmented as it would augment them, in batches of
    ``data.eval_batch_size``. Each batch is normalised by its own statistics, as in training; all else computes as in
    evaluation, without dropout. Over all batches the mean is that of the elements, the variance E[x^2] - E[x]^2, added
    up in float64: the same on all ranks, and but for rounding at any number of ranks. Nothing else changes: not the
    weights, the position in the data, or random numbers.

    It happens after the last step, before the last validation and checkpoint (after an early stop, before the
    checkpoint); a run that is ended in the middle of it repeats its last steps and this. Where averages of the weights
    are evaluated (``ema``), these have statistics of their own, ``ema/...`` in the checkpoint. Normalisations that the
    module keeps in evaluation mode while it trains stay as they are.

    Args:
        samples: over which the statistics are computed; at most an epoch.

    Raises:
        UserError: there are too few samples.
    """

    def __init__(self, samples: int = 50_000):
        if samples < 2:
            raise UserError(f"RecomputeBatchNorm: samples={samples} have no variance; use 2 or more, such as 50_000")
        self.samples = samples
        self._of_averages: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] | None = None

    def pieces(self) -> list[Piece]:
        """Return the statistics of the averaged weights, for the checkpoint; every rank holds all of them."""
        return [piece_of(f"ema/{name}", value) for name, value in self._of_averages.items()]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what has no statistics to recompute, before anything is trained.

        Raises:
            UserError: the model has no batch normalisation, or the data are not images.
        """
        if not _statistics(pl_module):
            raise UserError(
                f"RecomputeBatchNorm: {type(pl_module).__name__} has no batch normalisation with running statistics; "
                "remove it from trainer.callbacks"
            )
        if not isinstance(datamodule(trainer), ImageShards):
            raise UserError(
                f"RecomputeBatchNorm needs batches of images, not those of {type(datamodule(trainer)).__name__}; "
                "remove it from trainer.callbacks or use paperscale.data.ImageShards"
            )

    def conclude(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Recompute the statistics: the weights are trained. Called on all ranks."""
        averages = _averages(trainer)
        if averages is not None:
            before = _copies(pl_module)
            averages.on_validation_start(trainer, pl_module)
            self._recompute(trainer, pl_module, "averaged weights")
            self._of_averages = _copies(pl_module)
            averages.on_validation_end(trainer, pl_module)
            _put(pl_module, before)
        self._recompute(trainer, pl_module, "weights")

    # -- where averages are evaluated --------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the averages with their own statistics, once there are any."""
        if self._of_averages and trainer.state.fn == "fit":
            self._kept = _copies(pl_module)
            _put(pl_module, self._of_averages)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the weights theirs back."""
        if self._kept is not None:
            _put(pl_module, self._kept)
            self._kept = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the averages' statistics in the model, as the averages are left in it."""
        _put(pl_module, self._of_averages)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test the averages with theirs also where the checkpoint was of the end already."""
        averages = _averages(trainer)
        if self._of_averages or averages is None or averages.resume is None:
            return
        reader = TensorReader(averages.resume)
        for name, buffer in _statistics(pl_module).items():
            if f"ema/{name}" in reader:
                reader.fill(piece_of(f"ema/{name}", buffer))

    # -- the pass over the samples -----------------------------------------------------------------------------

    def _recompute(self, trainer: Trainer, module: LightningModule, what: str) -> None:
        """Replace the statistics of one set of weights."""
        start = reported = time.monotonic()
        layers = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.training]
        sums = [_Sums(layer) for layer in layers if layer.running_mean is not None]
        parts = self._parts(trainer)
        done, total = 0, parts[-1].stop
        mine = deal(parts, trainer.global_rank, trainer.world_size)
        with evaluating(trainer, module), contextlib.ExitStack() as stack:
            for layer in sums:
                stack.enter_context(layer)
            for batch, (part, counts) in zip(_batches(trainer, [part for part, _ in mine]), mine, strict=True):
                for layer in sums:
                    layer.counts = counts and batch["cursor"].weight > 0
                forward(trainer, module, batch["image"])
                done = min(total, done + (part.stop - part.start) * trainer.world_size)
                if (now := time.monotonic()) - reported > _REPORT_S:
                    reported = now
                    _say(trainer, f"batch normalisation: {done:,} of {total:,} samples")
        if trainer.world_size > 1:
            _add_over_ranks(sums)
        for layer in sums:
            layer.replace()
        seconds = time.monotonic() - start
        _say(trainer, f"batch normalisation: statistics of the {what} over {total:,} samples, {seconds:.1f} s")

    def _parts(self, trainer: Trainer) -> list[Positions]:
        """Return the batches of the pass: stretches of the next epoch's order, the same at any number of ranks."""
        stream = datamodule(trainer)
        first, last = stream.epoch_around(stream.consumed)
        epoch = first // (last - first) + (stream.consumed > first)
        samples = min(self.samples, last - first)
        count = max(1, min(-(-samples // stream.eval_batch_size), samples // 2))  # one image may have no variance
        bounds = [samples * part // count for part in range(count + 1)]
        return [Positions(epoch, start, stop, 1.0, stream.consumed, True) for start, stop in pairwise(bounds)]


def _batches(trainer: Trainer, parts: list[Positions]) -> Iterator[Any]:
    """Yield training batches on the device; the stream stays where it is."""
    stream = datamodule(trainer)
    loader = stream.train_dataloader()
    reader: Any = loader.reader
    remote = stream.source("train").is_remote
    loader.plans = lambda: reader.looked_ahead(iter(parts)) if remote else parts
    return on_device(trainer, loader)


class _Sums:
    """Lets a batch normalisation add up what it normalises, while the ``with`` statement lasts.

    Args:
        layer: with running statistics; they do not change before :meth:`replace`.
    """

    def __init__(self, layer: _BatchNorm):
        assert layer.running_mean is not None  # noqa: S101  the caller's choice
        self.layer, self.counts = layer, True
        wide = torch.float64 if layer.running_mean.device.type != "mps" else torch.float32
        self.totals = torch.zeros(3, layer.num_features, dtype=wide, device=layer.running_mean.device)
        """Of the elements' values, their squares, and their number, for each channel."""

    def __enter__(self) -> None:
        self._own = vars(self.layer).get("forward")  # of batch normalisation in 32 bits
        self.layer.forward = self.forward  # type: ignore[method-assign, assignment]

    def __exit__(self, *error: object) -> None:
        del self.layer.forward
        if self._own is not None:
            self.layer.forward = self._own  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, shape [B, C, ...], normalised by its own statistics, of this rank alone."""
        layer: Any = self.layer
        layer._check_input_dim(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        weight, bias = (None if p is None else p.to(wide.dtype) for p in (layer.weight, layer.bias))
        mean, variance = wide.new_zeros(2, layer.num_features)
        with torch.autocast(x.device.type, enabled=False):  # with momentum 1, running statistics are the batch's
            y = F.batch_norm(wide, mean, variance, weight, bias, True, 1.0, layer.eps)
        if self.counts:
            n = x.numel() // x.shape[1]
            mean = mean.to(self.totals.dtype)
            squares = variance.to(self.totals.dtype) * ((n - 1) / n) + mean.square()  # torch keeps the unbiased one
            self.totals += torch.stack([n * mean, n * squares, torch.full_like(mean, n)])
        return y.to(x.dtype)

    def replace(self) -> None:
        """Give the layer the statistics; a layer that no sample has reached keeps its own."""
        values, squares, count = self.totals
        if count[0] > 0:
            mean = values / count
            self.layer.running_mean.copy_(mean)  # type: ignore[union-attr]
            self.layer.running_var.copy_((squares / count - mean.square()).clamp_(min=0))  # type: ignore[union-attr]


def _add_over_ranks(sums: Sequence[_Sums]) -> None:
    """Add up all layers' sums over the ranks."""
    if sums:
        flat = torch.cat([layer.totals.reshape(-1) for layer in sums])
        dist.all_reduce(flat)
        parts = flat.split([layer.totals.numel() for layer in sums])
        for layer, part in zip(sums, parts, strict=True):
            layer.totals.copy_(part.view_as(layer.totals))


def _statistics(module: nn.Module) -> dict[str, Tensor]:
    """Return the running means and variances by the names that a checkpoint gives them."""
    return {
        f"{name}.{suffix}" if name else suffix: getattr(part, suffix)
        for name, part in module.named_modules()
        if isinstance(part, _BatchNorm) and part.running_mean is not None
        for suffix in _SUFFIXES
    }


def _copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in _statistics(module).items()}


def _put(module: nn.Module, values: dict[str, Tensor]) -> None:
    found = _statistics(module)
    for name, value in values.items():
        found[name].copy_(value)


def _averages(trainer: Trainer) -> EMA | None:
    """Return what keeps averages of the weights that are evaluated, if there is such."""
    found = (callback for callback in all_callbacks(trainer) if isinstance(callback, EMA))
    return next((ema for ema in found if ema.options.evaluate), None)


def _say(trainer: Trainer, line: str) -> None:
    if trainer.is_global_zero:
        with contextlib.suppress(OSError):  # a log on a full disk must not end the training
            print(line, flush=True)


# -- a look at the model between steps, beside Lightning's loops ---------------------------------------------


def deal(parts: Sequence[T], rank: int, world_size: int) -> list[tuple[T, bool]]:
    """Return what one rank computes, and whether it counts.

    Parts are dealt out in turn. All ranks get equally many, as forward passes of divided models are collective: where
    none is left, the last one once more, which does not count.
    """
    numbers = range(rank, -(-len(parts) // world_size) * world_size, world_size)
    return [(parts[min(number, len(parts) - 1)], number < len(parts)) for number in numbers]


@contextlib.contextmanager
def evaluating(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Let a module compute as in evaluation, and leave modes, random numbers and graphs as they were.

    What was compiled runs uncompiled, so that every layer's own ``forward`` and hooks are called.
    """
    modes = {part: part.training for part in module.modules()}
    random = random_state()
    module.eval()
    try:
        with torch.inference_mode(False), torch.no_grad(), _uncompiled():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode
        restore_random_state(random)


def _uncompiled() -> AbstractContextManager[Any]:
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and its import takes seconds
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def on_device(trainer: Trainer, loader: OrderedLoader[Any, Any]) -> Iterator[Any]:
    """Yield batches as the model is given them, and mark the rank's pulse."""
    pulses = [callback.pulse for callback in all_callbacks(trainer) if isinstance(callback, Heartbeat)]
    pulse = pulses[0] if pulses else Pulse()
    pulse.mark("starting")
    for batch in loader:
        pulse.mark("validation")
        yield trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))


def forward(trainer: Trainer, module: LightningModule, images: Tensor) -> Tensor:
    """Return what the module makes of images, shape [B, C, H, W], in the run's precision."""
    with trainer.precision_plugin.forward_context():
        return module(images)
