"""``paperscale validate``, ``test`` and ``predict``: a run's weights, a file's, or an ensemble of several runs."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from paperscale.atomic import write_atomically
from paperscale.data.augment import MULTI_SCALE
from paperscale.errors import UserError, describe
from paperscale.jobs import snapshot
from paperscale.jobs.checkpoints import FILES, find
from paperscale.jobs.environment import JobEnvironment
from paperscale.jobs.run import Run, read_json
from paperscale.jobs.vocabulary import check_tokenizer
from paperscale.jobs.words import duration
from paperscale.nn.ensemble import Ensemble
from paperscale.recipes import RecipeArguments
from paperscale.training import strategies
from paperscale.training.checkpoint import MANIFEST, RECIPE, read_manifest
from paperscale.training.initial import read_initial
from paperscale.training.recipe import RecipeCLI
from paperscale.training.tensorfile import TensorReader
from paperscale.training.weights import has_averages, of_checkpoint, read_weights

_LONGEST = 150  # characters of a file's name, without its ending
_EVERY_S = 10.0  # between lines of progress


@dataclass(frozen=True)
class Request:
    """What is to be evaluated.

    Attributes:
        stage: ``validate``, ``test`` or ``predict``; what is to be done, in messages.
        recipe: of the model and the data.
        run: whose checkpoint and folder are used; ``None`` where ``checkpoint`` says where the weights are.
        checkpoint: ``best``, ``last`` (the default) or a step of the run; or the folder of a checkpoint, or a file of
            weights.
        others: of the networks that are averaged with this: runs, also with ``@best`` or ``@STEP``, and folders of
            checkpoints.
    """

    stage: str
    recipe: RecipeArguments
    run: Run | None = None
    checkpoint: str | None = None
    others: Sequence[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Return the name of the file that keeps what is found."""
        words = [self.stage, *(f"{key.rpartition('.')[2]}={value}" for key, value in self.recipe.overrides)]
        words += [path.stem for path in self.recipe.overlays]
        words += [Path(self.checkpoint).stem] if self.checkpoint else []
        words += [f"with={Path(other).name}" for other in self.others]
        return re.sub(r"[^\w.=@+-]+", "_", "-".join(words))[:_LONGEST]


def evaluate(request: Request, progress: bool = False) -> dict[str, Any]:
    """Return what was found: ``metrics``, and what they are of; ``predict`` writes a file and returns where.

    Where a checkpoint holds averages of the weights, these are scored, unless its recipe's ``ema.evaluate`` is false.
    What ``validate`` and ``test`` find of a run is kept in its folder, in ``evaluations``.

    Args:
        request: what is to be evaluated.
        progress: show a bar on the terminal; otherwise a line of progress is written to stderr every ten seconds.

    Raises:
        UserError: there is no checkpoint, it does not verify, or it does not fit; or networks cannot be averaged.
    """
    source = source_of(request)
    others = _others(request, source)
    _use_code([*others.values()], request.run)
    loaded = {text: load(RecipeCLI([f"--config={folder / RECIPE}"]), folder) for text, folder in others.items()}
    cli, facts = load(RecipeCLI(request.recipe.to_cli()), source)
    if others:
        _join(cli, request.run.name if request.run else str(source), {text: one for text, (one, _) in loaded.items()})
    check_tokenizer(cli.datamodule, source / RECIPE)
    found = {"stage": request.stage, **_asked(request), **facts}
    found["ensemble"] = [{"name": text, **of} for text, (_, of) in loaded.items()]
    _warn_of_enlarging(cli.datamodule)
    trainer = _trainer(cli, source, progress)
    if request.stage == "predict":
        return {**found, **_predict(cli, trainer, request.run)}
    found["metrics"] = _scores(cli, trainer, request.stage)
    found["reproduces"] = _reproduces(cli.model, cli.datamodule)
    found["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return found if request.run is None else {**found, "file": _keep(request, request.run, found)}


# -- the weights -------------------------------------------------------------------------------------------


def source_of(request: Request) -> Path:
    """Return the checkpoint's folder or the file that is meant.

    Raises:
        UserError: there is none, or it does not verify.
    """
    path = Path(request.checkpoint or "").absolute()
    if request.checkpoint and (path / MANIFEST).exists():
        return find(str(path))
    if request.checkpoint and (path.is_file() or path.suffix in FILES):
        if not path.is_file():
            raise UserError(f"--checkpoint {request.checkpoint}: there is no such file; check the path")
        return path
    if request.run is None:
        what = "a checkpoint's folder or a file of weights"
        raise UserError(
            f"no checkpoint to {request.stage}: name a run (`paperscale runs`), or {what} with --checkpoint"
        )
    return find(str(request.run.path), request.checkpoint)


def _others(request: Request, source: Path) -> dict[str, Path]:
    """Return the checkpoints of the further networks."""
    found: dict[str, Path] = {}
    for text in request.others:
        path = Path(text)
        if path.is_file() or path.suffix in FILES:
            raise UserError(
                f"--with {text}: a file does not say which network its weights are of; name a run, or a checkpoint's "
                "folder"
            )
        where, which = (text, None) if path.exists() or "@" not in text else text.rsplit("@", 1)
        try:
            folder = find(where, which)
        except UserError as error:
            raise UserError(f"--with {text}: {error}") from error
        if folder in (source, *found.values()):
            raise UserError(f"--with {text}: {folder} is taken already; name another checkpoint, or leave it out")
        found[text] = folder
    return found


def _use_code(others: list[Path], first: Run | None) -> None:
    """Let imports find the code of all runs, the first one's before the others'."""
    for run in [*(Run(checkpoint.parent.parent) for checkpoint in reversed(others)), first]:
        if run is not None:
            snapshot.use(run)


def load(cli: RecipeCLI, source: Path) -> tuple[RecipeCLI, dict[str, Any]]:
    """Give a recipe's model its weights; return what they are.

    Raises:
        UserError: some of the model's are not there.
    """
    if source.is_file():
        fits = read_initial(cli.model, source, cli.config_init.init_prefix, whole=True)
        return cli, {"checkpoint": str(source), "step": None, "weights": str(fits)}
    averages = cli.config_init.ema.evaluate and has_averages(TensorReader(source))
    read_weights(cli.model, of_checkpoint(source, averages))
    weights = "averages" if averages else "trained"
    return cli, {"checkpoint": _called(source), "step": read_manifest(source).step, "weights": weights}


def _called(checkpoint: Path) -> str:
    """Return a checkpoint's name within its run, which may be moved; the path of one that lies elsewhere."""
    run = Run(checkpoint.parent.parent)
    return f"{run.name}/{checkpoint.name}" if run.exists else str(checkpoint)


def _join(first: RecipeCLI, name: str, others: Mapping[str, RecipeCLI]) -> None:
    """Let the first's module score the mean of all networks."""
    for other, cli in others.items():
        for module in (first.model, cli.model):
            if not isinstance(getattr(module, "network", None), torch.nn.Module):
                raise UserError(
                    f"--with {other}: {type(module).__name__} has no `network` whose scores could be averaged; "
                    "evaluate the runs one by one"
                )
        _compare_data(first.datamodule, cli.datamodule, other)
    models: list[Any] = [first.model, *(cli.model for cli in others.values())]
    models[0].network = Ensemble([model.network for model in models], [name, *others])


def _compare_data(first: LightningDataModule, other: LightningDataModule, name: str) -> None:
    """Refuse a network that was trained on other classes, or on images that were normalised otherwise."""
    try:
        facts = [_facts_of(data) for data in (first, other)]
    except (OSError, UserError) as error:
        print(
            f"WARNING --with {name}: whether its images were normalised alike is not known, as its data cannot be read "
            f"({describe(error)}); compare mean and std in both manifests",
            file=sys.stderr,
        )
        return
    for what, value in facts[0].items():
        if value != facts[1][what]:
            raise UserError(
                f"--with {name}: it was trained with other {what} ({_short(facts[1][what])}) than those of this "
                f"evaluation ({_short(value)}); leave it out, or train it on the same data"
            )


def _facts_of(data: Any) -> dict[str, Any]:
    """Return what networks of one ensemble must have in common."""
    manifest = data.shards("train").manifest
    image, normalize = manifest.image, getattr(data, "normalize", None)
    return {"classes": manifest.classes, "normalisation": [normalize, image.get("mean"), image.get("std")]}


def _short(value: Any) -> str:
    return text if len(text := str(value)) <= 60 else f"{text[:57]}..."


# -- the evaluation ----------------------------------------------------------------------------------------


class ProgressLines(Callback):
    """Writes to stderr how far a long evaluation is, where there is no bar."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to count."""
        self.begun = self.said = time.monotonic()
        self.done = 0

    def _count(self, batches: list[int | float]) -> None:
        self.done, now = self.done + 1, time.monotonic()
        if now - self.said < _EVERY_S:
            return
        total, of_all, self.said = sum(batches), "", now
        if math.isfinite(total):
            left = (now - self.begun) / self.done * (total - self.done)
            of_all = f" of {total:,}, {duration(left)} left"
        print(f"batch {self.done:,}{of_all}", file=sys.stderr, flush=True)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Count the batch."""
        self._count(trainer.num_val_batches)

    def on_test_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Count the batch."""
        self._count(trainer.num_test_batches)

    def on_predict_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Count the batch."""
        self._count(trainer.num_predict_batches)


def _warn_of_enlarging(data: Any) -> None:
    """Say what it costs where dense evaluation enlarges every image: its scales are by default ImageNet's."""
    if getattr(data, "eval_crop", None) != "dense":
        return
    facts = data.shards("train").manifest.image
    height, width = (int(facts.get(side) or 0) for side in ("height", "width"))  # 0: they differ
    if not 0 < min(height, width) < min(data.scales):
        return
    pixels = sum(scale**2 for scale in data.scales) // min(height, width) ** 2
    scales = ",".join(str(round(scale * min(height, width) / 256)) for scale in MULTI_SCALE)
    print(
        f"WARNING data.scales={list(data.scales)} enlarge images of {height} x {width}, to {pixels:,} times their "
        f"pixels; set sizes near theirs, for example 'data.scales=[{scales}]'",
        file=sys.stderr,
    )


def _trainer(cli: RecipeCLI, source: Path, progress: bool) -> Trainer:
    return cli.trainer_for(
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress,
        callbacks=[RichProgressBar() if progress else ProgressLines()],
        devices=1,
        strategy=strategies.make("auto", world_size=1, device=cli.device),  # the run's may need its processes
        plugins=[JobEnvironment()],
        default_root_dir=str(source),  # in a job, Lightning loads any hpc_ckpt_* that it finds there
    )


def _scores(cli: RecipeCLI, trainer: Trainer, stage: str) -> dict[str, float]:
    function, limit = (trainer.validate, "val") if stage == "validate" else (trainer.test, "test")
    if not (found := function(cli.model, datamodule=cli.datamodule, verbose=False)):
        raise UserError(
            f"nothing to {stage}: set data.{limit} to a split of the set, and trainer.limit_{limit}_batches to 1.0"
        )
    return dict(found[0])


def _predict(cli: RecipeCLI, trainer: Trainer, run: Run | None) -> dict[str, Any]:
    parts: list[Any] = trainer.predict(cli.model, datamodule=cli.datamodule) or []
    if parts and isinstance(parts[0], dict):  # by the samples' names, as the scripts of some benchmarks read them
        values: Any = {name: value for part in parts for name, value in part.items()}
    else:
        values = torch.cat([part.cpu() for part in parts]).tolist()
    out = (run.path if run else Path.cwd()) / "predictions.json"
    write_atomically(out, (json.dumps(values) + "\n").encode())
    return {"predictions": len(values), "file": str(out)}


def _reproduces(model: LightningModule, data: LightningDataModule) -> str | None:
    """Return what of the paper this is, if the module says so; it can see an ensemble by its ``network``."""
    says: Any = getattr(model, "reproduces", None)
    crop = getattr(data, "eval_crop", None)
    return says(crop) or None if says and crop else None


def _asked(request: Request) -> dict[str, Any]:
    """Return what was set beside the recipe."""
    overrides = [f"{key}={value}" for key, value in request.recipe.overrides]
    return {"overrides": overrides, "overlays": [str(path) for path in request.recipe.overlays]}


def _keep(request: Request, run: Run, found: dict[str, Any]) -> str | None:
    """Write what was found into the run's folder; return the file, ``None`` where it cannot be written.

    The same evaluation of the same weights takes the place of what it found before; every other one keeps its file.
    """
    same = ("stage", "overrides", "overlays", "checkpoint", "weights", "ensemble")
    folder = run.evaluations
    for number in itertools.count(1):
        path = folder / f"{request.name}{f'-{number}' if number > 1 else ''}.json"
        if not path.exists() or [read_json(path).get(key) for key in same] == [found[key] for key in same]:
            break
    try:
        folder.mkdir(exist_ok=True)
        write_atomically(path, (json.dumps(found, indent=1) + "\n").encode())
    except OSError as error:
        print(f"WARNING not kept: {describe(error)}", file=sys.stderr)
        return None
    return str(path)
