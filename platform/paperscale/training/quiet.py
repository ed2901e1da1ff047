"""Keeping the libraries' chatter out of logs and command lines."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Keep the log to what concerns the run: these lines tell of nothing that the user could or should mend."""
    for message in (
        ".*`srun` command is available",  # we know how we were started
        ".*LeafSpec.* is deprecated",
        "Grad strides do not match bucket view strides",  # a convolution of one input channel
        "You're resuming from a checkpoint that ended before the epoch",  # the DataModule restores its position
    ):
        warnings.filterwarnings("ignore", message)
    for name in ("lightning.pytorch", "lightning.fabric"):
        for logger in (name, f"{name}.utilities.rank_zero", f"{name}.utilities.seed"):
            logging.getLogger(logger).setLevel(logging.WARNING)
