"""``paperscale validate``, ``test`` and ``predict``: a run's newest verified checkpoint, or one that is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from paperscale.errors import UserError
from paperscale.jobs.checkpoints import find
from paperscale.jobs.environment import JobEnvironment
from paperscale.jobs.run import Run
from paperscale.training import strategies
from paperscale.training.checkpoint import MANIFEST, read_manifest
from paperscale.training.recipe import RecipeCLI
from paperscale.training.tensorfile import TensorReader
from paperscale.training.weights import has_averages, of_checkpoint, read_weights


def evaluate(stage: str, run: Run | None, recipe: list[str], checkpoint: str | None) -> dict[str, Any]:
    """Return the metrics of ``validate`` or ``test``; ``predict`` writes a file and returns where.

    Where the checkpoint holds averages of the weights, these are scored, unless ``ema.evaluate`` is false.

    Args:
        stage: ``validate``, ``test`` or ``predict``.
        run: the run whose checkpoint and folder are used.
        recipe: arguments of the recipe's command line.
        checkpoint: ``best``, ``last`` (the default) or a step of the run, or the folder of a checkpoint.

    Raises:
        UserError: there is no checkpoint, or it does not verify.
    """
    folder = _checkpoint(stage, run, checkpoint)
    cli = RecipeCLI(recipe)
    trainer: Trainer = cli.trainer_for(
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        devices=1,
        strategy=strategies.make("auto", world_size=1, device=cli.device),  # the run's may need its processes
        plugins=[JobEnvironment()],
        default_root_dir=str(folder),  # in a job, Lightning loads any hpc_ckpt_* that it finds there
    )
    averages = cli.config_init.ema.evaluate and has_averages(TensorReader(folder))
    read_weights(cli.model, of_checkpoint(folder, averages))
    facts = {"step": read_manifest(folder).step, **({"weights": "averages"} if averages else {})}
    if stage == "predict":
        parts: list[Any] = trainer.predict(cli.model, datamodule=cli.datamodule) or []
        values = torch.cat([part.cpu() for part in parts]).tolist()
        out = (run.path if run else Path.cwd()) / "predictions.json"
        out.write_text(json.dumps(values) + "\n")
        return {"predictions": len(values), "file": str(out), **facts}
    function = trainer.validate if stage == "validate" else trainer.test
    return {**function(cli.model, datamodule=cli.datamodule, verbose=False)[0], **facts}


def _checkpoint(stage: str, run: Run | None, checkpoint: str | None) -> Path:
    """Return the folder of the checkpoint that is meant."""
    if checkpoint and (Path(checkpoint) / MANIFEST).exists():
        return find(str(Path(checkpoint).absolute()))
    if run is None:
        raise UserError(f"no checkpoint to {stage}: name a run (`paperscale runs`), or give --checkpoint FOLDER")
    return find(str(run.path), checkpoint)
