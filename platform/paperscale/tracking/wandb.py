"""Logging to Weights & Biases and to ``metrics.jsonl``.

W&B's service is a process of its own: a scheduler's signal ends it together with the ranks, what it had not yet
written is lost, and every later call raises. So it is made to write every second, its errors are kept out of the
training, and each row also goes to ``metrics.jsonl`` in the run's directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from paperscale.errors import REQUEUE
from paperscale.tracking.metrics import read_metrics as read_metrics
from paperscale.tracking.pictures import MEDIA, as_captions, as_images, write_picture
from paperscale.tracking.wandb_files import read_segment

_FLUSH = "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL"


def is_online() -> bool:
    """Return whether a key is configured and the mode does not forbid its use."""
    if os.environ.get("WANDB_MODE", "online") != "online":
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    with contextlib.suppress(OSError):
        return "machine api.wandb.ai" in (Path.home() / ".netrc").read_text()
    return False


class GuardedWandbLogger(WandbLogger):
    """Lightning's W&B logger that stops logging, and says so once, where W&B fails.

    Args:
        run_dir: the run's directory; W&B's files go to ``wandb/`` in it.
        name: the run's name.
        run_id: the W&B id, the same in every attempt.
        options: ``project``, ``entity``, ``group``, ``tags`` and ``config`` of the W&B run.
        say: prints a line.
    """

    def __init__(self, run_dir: Path, name: str, run_id: str, say: Callable[[str], None], **options: Any):
        os.environ.setdefault(_FLUSH, "1")
        os.environ.setdefault("WANDB_SILENT", "true")
        online = is_online()
        super().__init__(
            name=name,
            id=run_id,
            save_dir=run_dir,
            offline=not online,
            resume="allow" if online else None,
            **options,
        )
        self._run_dir = run_dir
        self._wandb_init.pop("anonymous", None)  # Lightning still passes what W&B warns of
        self.say = say
        self.lost = False

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Keep W&B's errors out of the training."""
        try:
            yield
        except Exception as error:  # whatever it is, it is not worth the training
            if not self.lost:
                self.say(f"WARNING W&B stopped ({type(error).__name__}: {error}); metrics go on in metrics.jsonl")
            self.lost = True

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Log a row, unless W&B was lost."""
        if not self.lost:
            with self.guarded():
                super().log_metrics(metrics, step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Log the hyperparameters, unless W&B was lost."""
        if not self.lost:
            with self.guarded():
                super().log_hyperparams(params)

    @rank_zero_only
    def log_image(  # type: ignore[override]
        self, key: str, images: Any, step: int | None = None, caption: str | Sequence[str] | None = None
    ) -> None:
        """Log pictures, see :meth:`JsonlLogger.log_image`, unless W&B was lost."""
        if not self.lost:
            made, captions = as_images(images), as_captions(caption)  # W&B would want torchvision for a tensor
            with self.guarded():
                super().log_image(key, made, step, **({"caption": captions} if captions else {}))

    @rank_zero_only
    def recover(self, rows: list[dict[str, Any]]) -> None:
        """Log rows of the previous attempt again that its W&B service did not live to write.

        Args:
            rows: what that attempt logged, as :func:`read_metrics` gives it.
        """
        segments = sorted((self._run_dir / "wandb").glob("offline-run-*"))
        if not rows or not segments:
            return
        try:
            history = read_segment(segments[-1]).history
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            self.say(f"WARNING {segments[-1]} cannot be read back ({error}); rows it lacks are in metrics.jsonl")
            return
        written = {_row_key(row["trainer/global_step"], row) for row in history if "trainer/global_step" in row}
        for row in rows:
            values = {key: value for key, value in row.items() if key not in ("step", "attempt")}
            if _row_key(row["step"], values) not in written:
                self.log_metrics(values, row["step"])

    @rank_zero_only
    def finish(self, exit_code: int) -> None:
        """End this segment of the run; waits until it is written. W&B shows an interrupted run as preempted."""
        if self._experiment is not None and not self.lost:
            with self.guarded():
                if exit_code == REQUEUE:
                    self._experiment.mark_preempting()
                self._experiment.finish(exit_code=exit_code)


def _row_key(step: int, row: dict[str, Any]) -> tuple[int, frozenset[str]]:
    """Return what tells a logged row from others: its step and its metrics' names."""
    return step, frozenset(key for key in row if not key.startswith("_") and key != "trainer/global_step")


class JsonlLogger(Logger):
    """Appends each row of metrics to ``metrics.jsonl``, the truth where W&B lost some; pictures go to ``media/``."""

    def __init__(self, path: Path, attempt: int):
        super().__init__()
        self.path, self.attempt = path, attempt

    @property
    def name(self) -> str:
        """Return the logger's name."""
        return "jsonl"

    @property
    def version(self) -> int:
        """Return the attempt."""
        return self.attempt

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The resolved recipe beside the file says it all."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row."""
        row = {"step": step, "attempt": self.attempt, **metrics}
        with contextlib.suppress(OSError), self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    @rank_zero_only
    def log_image(
        self, key: str, images: Any, step: int | None = None, caption: str | Sequence[str] | None = None
    ) -> None:
        """Write pictures into ``media/`` beside the file, as one; a full disk must not end the training.

        Args:
            key: such as ``test/mistakes``: written as ``test-mistakes-<step>.png``, beside it a ``.json`` with key,
                step and captions. A picture of the same key and step is replaced.
            images: one or several: tensors [C, H, W], or [B, C, H, W] for B of them, NumPy arrays, or PIL's; of uint8,
                or of floats from 0 to 1.
            step: optimizer steps taken.
            caption: of the image, or a list of one each.

        Raises:
            ValueError: what is given is no image, or not each image has a caption.
        """
        with contextlib.suppress(OSError):
            write_picture(self.path.parent / MEDIA, key, images, step, as_captions(caption))
