"""What every strategy of ours can do: hand out its state as pieces, and take it back from any checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from paperscale.errors import UserError
from paperscale.nn.optimizers import norms
from paperscale.training.checkpoint import read_state
from paperscale.training.pieces import Piece, persistent_buffers, piece_of
from paperscale.training.tensorfile import TensorReader

STATE = "state.pt"
_OURS = "paperscale"
_IMPLEMENTATION = ("params", "foreach", "fused", "capturable", "differentiable")
"""Entries of a parameter group that say how the optimizer computes, not what: the run's own are kept."""


class PortableStrategy(Strategy):
    """A strategy whose checkpoints any other one can continue from.

    Written for strategies whose optimizers work on the model's own parameters, whole or as DTensors; ZeRO, whose
    optimizers work on flat partitions, overrides what differs.
    """

    captured: dict[str, Any] | None = None
    keeps_pieces = True
    """Whether pieces show the weights also after further steps; else they are copies, to be asked for anew."""
    initial: Callable[[Tensor], Tensor] | None = None
    """Returns the content of a tensor of a model that was constructed without it (:mod:`..deferred`)."""

    # -- what Lightning calls ----------------------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights are read into the model as the strategy has divided it."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimizers are restored with the weights."""
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return nothing: tensors are handed out as pieces."""
        return {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return nothing: tensors are handed out as pieces."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Keep what Lightning wants to save, with the optimizers' small state, for :class:`Checkpointing` to write."""
        checkpoint[_OURS] = {"optimizers": self.optimizer_settings(), "loss_scale": self.loss_scaling()}
        self.captured = checkpoint

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read Lightning's state, and restore model and optimizers from the tensors beside it.

        Raises:
            UserError: the checkpoint is not of this model or optimizer.
        """
        path = Path(checkpoint_path)
        state = read_state(path)
        reader = TensorReader(path.parent)
        self.restore_weights(reader)
        if self.optimizers:
            self.restore_optimizers(reader, state[_OURS]["optimizers"])
            self.restore_loss_scaling(state[_OURS]["loss_scale"])
        return state

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """The weights are there already."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """The optimizers are restored already."""

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Move a batch, and let what a DataModule makes of it on the device have the model's type as well."""
        batch = super().batch_to_device(batch, device, dataloader_idx)
        plugin = self.precision_plugin
        if str(plugin.precision).startswith("32") or not isinstance(batch, dict):
            return batch
        floats = {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.is_floating_point()}
        return {**batch, **plugin.convert_input(floats)}

    # -- weights -----------------------------------------------------------------------------------------------

    def parameter_names(self) -> dict[int, str]:
        """Return the name of each parameter, by its id."""
        assert self.lightning_module is not None  # noqa: S101  connected before anything else
        return {id(parameter): name for name, parameter in self.lightning_module.named_parameters()}

    def parameter_pieces(self) -> list[Piece]:
        """Return what this rank holds of the weights: the fp32 masters where there are any."""
        assert self.lightning_module is not None  # noqa: S101
        return [piece_of(f"model/{name}", p) for name, p in self.lightning_module.named_parameters()]

    def buffer_pieces(self) -> list[Piece]:
        """Return the persistent buffers, which every rank holds wholly; rank 0's count."""
        assert self.lightning_module is not None  # noqa: S101
        return [piece_of(f"model/{name}", buffer) for name, buffer in persistent_buffers(self.lightning_module)]

    def weights_changed(self) -> None:
        """Let the model have what was written into the pieces of its weights. Called on all ranks."""

    def share_buffers(self) -> None:
        """Give every rank rank 0's buffers, which a checkpoint keeps: all ranks evaluate one model."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            for piece in self.buffer_pieces():
                dist.broadcast(piece.tensor, 0)

    def on_validation_start(self) -> None:
        """Evaluate one model on all ranks."""
        super().on_validation_start()
        self.share_buffers()

    def on_test_start(self) -> None:
        """Evaluate one model on all ranks."""
        super().on_test_start()
        self.share_buffers()

    def restore_weights(self, reader: TensorReader) -> None:
        """Read weights and buffers.

        Raises:
            UserError: they are not this model's.
        """
        for piece in (*self.parameter_pieces(), *self.buffer_pieces()):
            reader.fill(piece)
        self.weights_changed()

    # -- gradients ---------------------------------------------------------------------------------------------

    def gradient_norm(self) -> Tensor:
        """Return the 2-norm of all gradients before clipping; in ``on_before_optimizer_step``, on all ranks."""
        gradients: list[Any] = [p.grad for p in _trained(self.optimizers) if p.grad is not None]
        if not gradients:
            return torch.zeros((), device=self.root_device)
        sharded = isinstance(gradients[0], DTensor)
        total = torch.linalg.vector_norm(torch.stack(norms([g.to_local() if sharded else g for g in gradients])))
        if sharded:
            total = total.square().to(self.root_device)
            dist.all_reduce(total)
            total = total.sqrt()
        return total

    def drop_gradients(self) -> None:
        """Let this optimizer step change nothing; in ``on_before_optimizer_step``, on all ranks."""
        for parameter in _trained(self.optimizers):
            parameter.grad = None

    def loss_scaling(self) -> dict[str, float] | None:
        """Return the scale of the loss under fp16, ``None`` without one."""
        scaler = getattr(self.precision_plugin, "scaler", None)
        if scaler is None:
            return None
        return {"scale": scaler.get_scale(), "good_steps": scaler.state_dict().get("_growth_tracker", 0)}

    def restore_loss_scaling(self, saved: dict[str, float] | None) -> None:
        """Continue with a scale of the loss that any strategy has found."""
        scaler = getattr(self.precision_plugin, "scaler", None)
        if scaler is not None and saved:
            state = {**scaler.state_dict(), "scale": saved["scale"], "_growth_tracker": int(saved["good_steps"])}
            scaler.load_state_dict(state)

    # -- optimizers --------------------------------------------------------------------------------------------

    def optimizer_pieces(self) -> list[Piece]:
        """Return what this rank holds of the optimizers' state."""
        names = self.parameter_names()
        return [
            piece_of(f"optimizer{index}/{names[id(parameter)]}/{key}", value)
            for index, optimizer in enumerate(self.optimizers)
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
            if is_piece(value)
        ]

    def optimizer_settings(self) -> list[dict[str, Any]]:
        """Return what is small: each optimizer's class, groups (by parameter names) and numbers of each parameter."""
        names = self.parameter_names()
        return [
            {
                "class": type(optimizer).__name__,
                "groups": [
                    settings_of(group, [names[id(p)] for p in group["params"]]) for group in optimizer.param_groups
                ],
                "numbers": {names[id(p)]: numbers_of(state) for p, state in optimizer.state.items()},
            }
            for optimizer in self.optimizers
        ]

    def restore_optimizers(self, reader: TensorReader, saved: list[dict[str, Any]]) -> None:
        """Read the optimizers' state.

        Raises:
            UserError: the optimizers are not those of the checkpoint.
        """
        check_count(reader, saved, len(self.optimizers))
        names = self.parameter_names()
        for index, (optimizer, settings) in enumerate(zip(self.optimizers, saved, strict=True)):
            groups = merged_groups(
                reader, optimizer, settings, [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups]
            )
            state: dict[int, dict[str, Any]] = {}
            for group, numbered in zip(optimizer.param_groups, groups, strict=True):
                for parameter, number in zip(group["params"], numbered["params"], strict=True):
                    name = names[id(parameter)]
                    found = {
                        **settings["numbers"].get(name, {}),
                        **_tensors(reader, f"optimizer{index}/{name}/", parameter),
                    }
                    if found:
                        state[number] = found
            optimizer.load_state_dict({"state": state, "param_groups": groups})


def is_piece(value: Any) -> bool:
    """Return whether an entry of an optimizer's state is kept as a piece; single numbers are kept as they are."""
    return isinstance(value, Tensor) and value.dim() > 0


def numbers_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of an optimizer's state that are single numbers, on the CPU."""
    return {
        key: value.detach().cpu().clone() if isinstance(value, Tensor) else value
        for key, value in state.items()
        if not is_piece(value)
    }


def settings_of(group: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Return a parameter group with its parameters by name."""
    return {**{key: value for key, value in group.items() if key not in _IMPLEMENTATION}, "params": names}


def check_count(reader: TensorReader, saved: list[dict[str, Any]], count: int) -> None:
    """Check the number of optimizers.

    Raises:
        UserError: the checkpoint has another number.
    """
    if len(saved) != count:
        raise UserError(
            f"{reader.checkpoint} holds {len(saved)} optimizers, the recipe has {count}; continue with the recipe that "
            "made it, or begin a new run from its weights with `fit --init-from`"
        )


def merged_groups(
    reader: TensorReader, optimizer: Optimizer, saved: dict[str, Any], names: list[list[str]]
) -> list[dict[str, Any]]:
    """Return an optimizer's parameter groups, numbered as its ``state_dict`` numbers them, with the saved settings.

    Raises:
        UserError: the checkpoint's groups hold other parameters.
    """
    own = optimizer.state_dict()["param_groups"]
    theirs = [group["params"] for group in saved["groups"]]
    if [sorted(group) for group in theirs] != [sorted(group) for group in names]:
        other = sorted(set(chain(*names)) ^ set(chain(*theirs)))
        raise UserError(
            f"{reader.checkpoint}: its optimizer trained other parameters"
            + (f", such as {other[0]}" if other else " or in other groups")
            + "; continue with the recipe that made it, or begin a new run from its weights with `fit --init-from`"
        )
    return [{**mine, **group, "params": mine["params"]} for mine, group in zip(own, saved["groups"], strict=True)]


def _trained(optimizers: list[Optimizer]) -> Iterator[nn.Parameter]:
    return (p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])


def _tensors(reader: TensorReader, prefix: str, parameter: Tensor) -> dict[str, Tensor]:
    """Return the state of one parameter, divided as the parameter is."""
    found = {}
    for name in reader.names_of(prefix):
        stored = reader.tensors[name]
        if stored.shape == tuple(parameter.shape):
            tensor = torch.zeros_like(parameter, dtype=stored.dtype, requires_grad=False)
        else:
            tensor = torch.zeros(stored.shape, dtype=stored.dtype, device=parameter.device)
        reader.fill(piece_of(name, tensor))
        found[name.removeprefix(prefix)] = tensor
    return found
