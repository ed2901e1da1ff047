"""A model's weights outside a run: read from a checkpoint into a model that one process holds."""

from __future__ import annotations

from torch import nn

from paperscale.training.pieces import piece_of
from paperscale.training.strategies.portable import persistent_buffers
from paperscale.training.tensorfile import TensorReader


def read_weights(model: nn.Module, reader: TensorReader) -> None:
    """Fill a model's parameters and persistent buffers from a checkpoint.

    Raises:
        UserError: the checkpoint is of another model.
    """
    for name, tensor in (*model.named_parameters(), *persistent_buffers(model)):
        reader.fill(piece_of(f"model/{name}", tensor))
