"""``paperscale validate``, ``test`` and ``predict``: a run's newest verified checkpoint, or one that is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from paperscale.errors import UserError
from paperscale.jobs.environment import JobEnvironment
from paperscale.jobs.run import Run
from paperscale.training.checkpoint import newest_verified, verify
from paperscale.training.recipe import RecipeCLI
from paperscale.training.tensorfile import TensorReader
from paperscale.training.weights import read_weights


def evaluate(stage: str, run: Run | None, recipe: list[str], checkpoint: Path | None) -> dict[str, Any]:
    """Return the metrics of ``validate`` or ``test``; ``predict`` writes a file and returns where.

    Args:
        stage: ``validate``, ``test`` or ``predict``.
        run: the run whose checkpoint and folder are used.
        recipe: arguments of the recipe's command line.
        checkpoint: folder of a checkpoint, by default the run's newest that verifies.

    Raises:
        UserError: there is no checkpoint, or it does not verify.
    """
    if checkpoint is None and run is not None:
        checkpoint, passed_over = newest_verified(run.checkpoints)
        for reason in passed_over:
            print(f"WARNING passed over {reason}")
    if checkpoint is None:
        where = f"run '{run.name}' has no checkpoint that verifies" if run else "name a run (`paperscale runs`)"
        raise UserError(f"no checkpoint to {stage}: {where}; or give --checkpoint FOLDER")
    manifest = verify(checkpoint)
    cli = RecipeCLI(recipe)
    trainer: Trainer = cli.trainer_for(
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        devices=1,
        plugins=[JobEnvironment()],
        default_root_dir=str(checkpoint),  # in a job, Lightning loads any hpc_ckpt_* that it finds there
    )
    read_weights(cli.model, TensorReader(checkpoint))
    if stage == "predict":
        parts: list[Any] = trainer.predict(cli.model, datamodule=cli.datamodule) or []
        values = torch.cat([part.cpu() for part in parts]).tolist()
        out = (run.path if run else Path.cwd()) / "predictions.json"
        out.write_text(json.dumps(values) + "\n")
        return {"predictions": len(values), "file": str(out), "step": manifest.step}
    function = trainer.validate if stage == "validate" else trainer.test
    return {**function(cli.model, datamodule=cli.datamodule, verbose=False)[0], "step": manifest.step}
