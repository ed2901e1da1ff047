"""``self.log`` without its cost: what Lightning checks and builds at every call is done once an epoch.

Lightning's ``log`` validates the value, the hook, the arguments and the batch, and describes the entry anew, at every
call: some 200 microseconds in which nothing changes from step to step. Here the first call of a name in an epoch goes
through Lightning, which makes the entry; the calls after it write their value into that entry. So every reader (the
loggers, ``trainer.callback_metrics``, a progress bar, a scheduler's monitor, the epoch's mean) finds at any time what
it would have found, to the last bit. A value stays on its device: nothing waits for it until a row is written.

What needs more goes Lightning's way at each call: values that ranks reduce at each step (``on_step=True`` with
``sync_dist=True``), that keep their graph or have dimensions, and everything in validation and test.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics import MetricCollection

EpochSums = dict[str, dict[str, Tensor]]
"""Of each entry, by Lightning's name for it: ``value`` and, of means, ``weight``, so far in the epoch."""

_WIDE = (torch.float32, torch.float64)
_USED = ("_forward_cache", "_computed", "has_reset", "is_tensor", "meta", "value")


class Entry:
    """One name that one hook logs: Lightning's entry, and what a value does to it.

    Args:
        results: Lightning's entries.
        key: of this one.
        options: what the name is logged with, but for the value and the batch's size.

    Raises:
        RuntimeError: this release of Lightning keeps its entries in another way.
    """

    def __init__(self, results: Any, key: str, options: dict[str, Any]):
        result = results[key]
        for name in _USED:
            if not hasattr(result, name):
                raise RuntimeError(
                    f"this release of Lightning has no {type(result).__name__}.{name}; use lightning<2.7"
                )
        meta = result.meta
        self.results, self.result, self.options = results, result, options
        self.on_step, self.on_epoch, self.reduce = meta.on_step, meta.on_epoch, meta.reduce_fx
        self.weighted = result.is_tensor and meta.on_epoch and meta.is_mean_reduction
        self.sums = self.weighted or meta.is_sum_reduction
        reduced_at_each_step = meta.on_step and result.is_tensor and meta.sync.should
        self.quick = not meta.enable_graph and not reduced_at_each_step

    def write(self, value: Tensor, weight: int) -> None:
        """Take a value in, in the operations of Lightning's entry.

        Args:
            value: shape [], float32 or float64.
            weight: in the epoch's mean.
        """
        result = self.result
        result._computed = None
        if self.on_step:
            result._forward_cache = value
        if not self.on_epoch:
            result.value = value
            return
        result.value = result.value + value * weight if self.weighted else self._joined(result.value, value)
        if self.weighted:
            result.cumulated_batch_size = result.cumulated_batch_size + weight

    def continue_from(self, earlier: Iterable[dict[str, Tensor]]) -> None:
        """Add what these ranks had logged in this epoch before an interruption."""
        result = self.result
        for rank in earlier:
            result.value = self._joined(rank["value"].to(result.value.device), result.value)
            if self.weighted:
                weight = rank["weight"].to(result.value.device)
                result.cumulated_batch_size = weight + result.cumulated_batch_size

    def _joined(self, first: Tensor, second: Tensor) -> Tensor:
        return first + second if self.sums else self.reduce(first, second)


class Logbook(Callback):
    """Takes the module's ``log`` and ``log_dict`` over while the Trainer runs.

    In validation and test a plain ``self.log`` becomes the mean over all ranks' samples, not over rank 0's: Lightning
    reduces it at the end of the epoch, weighted by batch sizes; no step waits for another rank.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str | None, str], Entry] = {}
        self.earlier: list[EpochSums] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put this book's methods in the place of the module's."""
        self._trainer, self._module = trainer, pl_module
        self._entries.clear()
        for owner in (pl_module, *all_callbacks(trainer)):  # Lightning has given the module's to the callbacks
            vars(owner).update(log=self.record, log_dict=self.record_all)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its own back."""
        for owner in (pl_module, *all_callbacks(trainer)):
            for name in ("log", "log_dict"):
                vars(owner).pop(name, None)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The next epoch begins with nothing."""
        self.earlier = []

    @torch.compiler.disable
    def record(self, name: str, value: Any, *arguments: Any, batch_size: int | None = None, **options: Any) -> None:
        """Log as ``LightningModule.log`` does."""
        entry = self._entries.get((self._module._current_fx_name, name))
        known = entry is not None and not entry.result.has_reset and entry.options == options and not arguments
        if entry is None or not known or (taken := self._taken(value, entry.result)) is None:
            self._log_in_full(name, value, arguments, batch_size, options)
            return
        if not entry.result.is_tensor:
            entry.result._forward_cache = taken._forward_cache
            return
        if batch_size is None and entry.weighted:
            batch_size = entry.results._extract_batch_size(entry.result, None, entry.result.meta)
        entry.write(taken, batch_size or 0)

    @staticmethod
    def _taken(value: Any, result: Any) -> Any:
        """Return a value as its entry keeps it; ``None`` for one that Lightning has to look at."""
        if not result.is_tensor:
            return value if value is result.value else None
        if isinstance(value, Tensor) and not value.ndim:
            value = value.detach()  # a copy: the caller may go on to change it in place
            return value.clone() if value.dtype in _WIDE else value.to(_dtype())
        return torch.tensor(value, dtype=_dtype()) if isinstance(value, (int, float)) else None

    def record_all(self, dictionary: Mapping[str, Any], *arguments: Any, **options: Any) -> None:
        """Log as ``LightningModule.log_dict`` does."""
        if arguments or isinstance(dictionary, MetricCollection):
            type(self._module).log_dict(self._module, dictionary, *arguments, **options)
            return
        for name, value in dictionary.items():
            self.record(name, value, **options)

    def _log_in_full(
        self, name: str, value: Any, arguments: tuple[Any, ...], batch_size: int | None, options: dict[str, Any]
    ) -> None:
        """Log through Lightning, and keep the entry that it makes in training."""
        trainer, module = self._trainer, self._module
        given = dict(options)
        if batch_size is not None:
            given["batch_size"] = batch_size
        if trainer.validating or trainer.testing or trainer.sanity_checking:
            given.setdefault("sync_dist", trainer.world_size > 1)
        if given.get("prog_bar") and trainer.progress_bar_callback is None:
            given["prog_bar"] = False  # Lightning would read the value from the device at each step, for nobody
        type(module).log(module, name, value, *arguments, **given)
        if not trainer.training:
            return
        hook = module._current_fx_name
        key = f"{hook}.{name}"
        entry = Entry(trainer._results, key, options)
        entry.continue_from(sums.pop(key) for sums in self.earlier if key in sums)
        if entry.quick:
            self._entries[hook, name] = entry


# -- an epoch that is interrupted --------------------------------------------------------------------------------


def epoch_sums(trainer: Trainer) -> EpochSums:
    """Return what this rank has logged for the epoch's means, sums and extremes so far."""
    entries: Any = trainer.fit_loop.epoch_loop._results
    return {
        key: {"value": entry.value, "weight": getattr(entry, "cumulated_batch_size", torch.tensor(0))}
        for key, entry in entries.items()
        if entry.is_tensor and entry.meta.on_epoch and not entry.has_reset
    }


def continue_epoch(trainer: Trainer, earlier: Sequence[EpochSums]) -> None:
    """Let the epoch go on from what the given ranks had logged in it."""
    for callback in all_callbacks(trainer):
        if isinstance(callback, Logbook):
            callback.earlier = [dict(sums) for sums in earlier]


def all_callbacks(trainer: Trainer) -> list[Callback]:
    """Return the run's callbacks."""
    return trainer.callbacks  # type: ignore[attr-defined]


def _dtype() -> torch.dtype:
    """Return the dtype that Lightning gives to a number."""
    dtype = torch.get_default_dtype()
    return dtype if dtype in _WIDE else torch.float32
