"""What a network's layers do, and which samples it gets most wrong: callbacks that a recipe names.

They write rows and pictures straight to the run's loggers: ``metrics.jsonl`` and ``media/`` of the run, and W&B.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from paperscale.data import ImageShards, ShardStream
from paperscale.errors import UserError, nearest
from paperscale.nn.optimizers import norms
from paperscale.training.callbacks import datamodule
from paperscale.training.checkpointing import takes_last_step
from paperscale.training.ema import EMA
from paperscale.training.logbook import all_callbacks
from paperscale.training.recompute import RecomputeBatchNorm, deal, evaluating, forward, on_device

_GROUP = 32  # samples in a row: sets may be sorted by class


def numbered(prefix: str, names: Sequence[str]) -> list[str]:
    """Return ``prefix/NN_name`` for each name, numbered from 1 with two digits, or three where there are as many."""
    digits = max(2, len(str(len(names))))
    return [f"{prefix}/{number:0{digits}d}_{name}" for number, name in enumerate(names, 1)]


def _log(trainer: Trainer, row: dict[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(row, trainer.global_step)


class LayerResponses(Callback):
    """Logs the standard deviation of each layer's output over evaluation images (He et al. 2015, figure 7).

    A layer's response is taken after batch normalisation, before the nonlinearity and the addition, and over all
    elements of it: images, channels and places. Logged at the end of the training as ``responses/NN_<module>``, NN in
    the order in which the layers compute, of the weights and statistics that are evaluated: the averages, where the
    recipe keeps such, and what ``RecomputeBatchNorm`` has found, where that is listed before this.

    Args:
        layers: patterns of modules' names, such as ``*.bn1|*.bn2``; by default each ``BatchNorm2d`` whose input is the
            output of a 3x3 convolution, as in the figure.
        samples: images of the validation split (of the test split, where there is none), spread evenly over it.
        every_n_epochs: epochs between further rows; by default the end alone.

    Raises:
        UserError: a number is below 1.
    """

    def __init__(self, layers: str | None = None, samples: int = 1024, every_n_epochs: int | None = None):
        for name, value in (("samples", samples), ("every_n_epochs", every_n_epochs)):
            if value is not None and value < 1:
                raise UserError(f"LayerResponses: {name}={value}; use 1 or more")
        self.patterns = layers.split("|") if layers else []
        self.samples, self.every_n_epochs = samples, every_n_epochs
        self._logged_step = -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be measured, before anything is trained.

        Raises:
            UserError: no module has such a name, or the data are not images of one size.
        """
        names = [name for name, _ in pl_module.named_modules()]
        for pattern in self.patterns:
            if not any(fnmatch(name, pattern) for name in names):
                hint = nearest(pattern, names) or f"; use names such as {names[-1]}"
                raise UserError(f"LayerResponses: no module of {type(pl_module).__name__} is named '{pattern}'{hint}")
        stream = datamodule(trainer)
        if not isinstance(stream, ImageShards) or stream.eval_crop == "dense":
            raise UserError(
                "LayerResponses needs images of one size; use paperscale.data.ImageShards with data.eval_crop=none, "
                "center or ten, or remove it from trainer.callbacks"
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log where it is time."""
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.conclude(trainer, pl_module)

    def conclude(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the responses; the weights are trained. Called on all ranks."""
        if self._logged_step == trainer.global_step:
            return
        self._logged_step = trainer.global_step
        with as_evaluated(trainer, pl_module), evaluating(trainer, pl_module):
            found = self.deviations(trainer, pl_module)
        if not found:
            raise UserError(
                f"LayerResponses: no BatchNorm2d of {type(pl_module).__name__} follows a 3x3 convolution; name the "
                "layers, for example layers: '*.bn1|*.bn2'"
            )
        _log(trainer, dict(zip(numbered("responses", [*found]), found.values(), strict=True)))

    def deviations(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        """Return the standard deviation of each layer's output, by the module's name, in the order of computation."""
        sums: dict[str, Tensor] = {}
        parts = deal(self._parts(trainer), trainer.global_rank, trainer.world_size)
        stream = datamodule(trainer)
        loader = stream.val_dataloader() if stream.splits["val"] else stream.test_dataloader()
        loader.plans = lambda: [part for part, _ in parts]  # type: ignore[union-attr]
        with _Responses(module, self.patterns) as responses:
            for batch, (_, counts) in zip(on_device(trainer, loader), parts, strict=True):  # type: ignore[arg-type]
                forward(trainer, module, batch["image"].flatten(0, -4))
                for name, values in responses.take():
                    sums[name] = sums.get(name, 0) + values * counts
        if not sums:
            return {}
        totals = torch.stack([*sums.values()])
        if trainer.world_size > 1:
            dist.all_reduce(totals)
        count, values, squares = totals.cpu().double().unbind(1)
        variance = (squares / count - (values / count).square()).clamp_(min=0)
        return dict(zip(sums, variance.sqrt().tolist(), strict=True))

    def _parts(self, trainer: Trainer) -> list[tuple[int, int]]:
        """Return groups of samples, all equally large, spread evenly over the split."""
        stream = datamodule(trainer)
        total = int(stream.source("val" if stream.splits["val"] else "test").sizes.sum())
        size = min(_GROUP, stream.eval_batch_size, self.samples, total)
        count = min(-(-self.samples // size), total // size)
        starts = [(total - size) * group // max(1, count - 1) for group in range(count)]
        return [(start, start + size) for start in starts]


class _Responses:
    """Hooks that keep what layers put out, while the ``with`` statement lasts.

    Args:
        module: whose layers.
        patterns: of their names; empty for each ``BatchNorm2d`` after a 3x3 convolution.
    """

    def __init__(self, module: nn.Module, patterns: Sequence[str]):
        self.module, self.patterns = module, patterns
        self._found: list[tuple[str, Tensor]] = []
        self._convolved: Tensor | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> _Responses:
        for name, part in self.module.named_modules():
            if self.patterns:
                if any(fnmatch(name, pattern) for pattern in self.patterns):
                    self._hooks.append(part.register_forward_hook(self._keeper(name)))
            elif isinstance(part, nn.Conv2d):
                self._hooks.append(part.register_forward_hook(self._note_convolution))
            elif isinstance(part, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                self._hooks.append(part.register_forward_hook(self._keeper(name, after_convolution=True)))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def take(self) -> list[tuple[str, Tensor]]:
        """Return names and (count, sum, sum of squares) of the outputs since the last call, as they were computed."""
        found, self._found, self._convolved = self._found, [], None
        return found

    def _note_convolution(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        self._convolved = output if layer.kernel_size == (3, 3) else None

    def _keeper(self, name: str, after_convolution: bool = False) -> Any:
        def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not after_convolution or inputs[0] is self._convolved:
                wide = torch.float64 if output.device.type != "mps" else torch.float32
                values = output.detach().to(wide)  # now: what follows may compute in place
                count = torch.tensor(float(values.numel()), dtype=wide, device=output.device)
                self._found.append((name, torch.stack([count, values.sum(), values.square().sum()])))

        return keep


@contextlib.contextmanager
def as_evaluated(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Give a module in training the weights and statistics that a validation would see."""
    swapping = [callback for callback in all_callbacks(trainer) if isinstance(callback, (EMA, RecomputeBatchNorm))]
    for callback in swapping:
        callback.on_validation_start(trainer, module)
    try:
        yield
    finally:
        for callback in swapping:
            callback.on_validation_end(trainer, module)


# -- gradients -----------------------------------------------------------------------------------------------


class LayerGradients(Callback):
    """Logs the 2-norm of the gradient of each layer's weights as ``gradients/NN_<module>``.

    A layer is a module that owns weights of two dimensions or more: convolutions, linear layers and embeddings, in the
    order in which the model lists them; biases and normalisations are none. Norms are of the mean over the global
    batch, before clipping, without the loss scale of fp16. Other steps cost a microsecond.

    Args:
        every_n_steps: optimizer steps between rows, from the first on.

    Raises:
        UserError: it is below 1.
    """

    def __init__(self, every_n_steps: int = 50):
        if every_n_steps < 1:
            raise UserError(f"LayerGradients: every_n_steps={every_n_steps}; use 1 or more")
        self.every_n_steps = every_n_steps
        self._layers: list[list[nn.Parameter]] = []
        self._names: list[str] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers.

        Raises:
            UserError: the strategy divides gradients in a way that hides them from the model's parameters.
        """
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise UserError(
                "LayerGradients cannot see the gradients that DeepSpeed keeps to itself; use trainer.strategy=ddp or "
                "fsdp, or remove it from trainer.callbacks"
            )
        layers = {
            name: [p for p in part.parameters(recurse=False) if p.requires_grad and p.dim() > 1]
            for name, part in pl_module.named_modules()
        }
        layers = {name: weights for name, weights in layers.items() if weights}
        self._layers, self._names = [*layers.values()], numbered("gradients", [*layers])

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Log the norms where it is time."""
        if trainer.global_step % self.every_n_steps == 0:
            _log(trainer, self.norms(trainer, optimizer))

    def norms(self, trainer: Trainer, optimizer: Optimizer) -> dict[str, float]:
        """Return the norm of each layer that this optimizer is about to step, by its name in the log."""
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        names, sizes = [], []
        gradients: list[Any] = []
        for name, weights in zip(self._names, self._layers, strict=True):
            if own := [p.grad for p in weights if p.grad is not None and id(p) in stepped]:
                names.append(name)
                sizes.append(len(own))
                gradients += own
        if not gradients:
            return {}
        divided = isinstance(gradients[0], DTensor)
        local = [gradient.to_local() if divided else gradient for gradient in gradients]
        parts = torch.stack(norms(local)).square().to(trainer.strategy.root_device)
        squares = torch.stack([part.sum() for part in parts.split(sizes)])
        if divided:
            dist.all_reduce(squares)
        return dict(zip(names, (squares.sqrt() / _scale(trainer, optimizer)).tolist(), strict=True))


def _scale(trainer: Trainer, optimizer: Optimizer) -> float:
    """Return what gradients are still multiplied by: a fused optimizer undoes fp16's loss scale in its step."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler.get_scale() if scaler and getattr(optimizer, "_step_supports_amp_scaling", False) else 1.0


# -- pictures ------------------------------------------------------------------------------------------------


class Mistake(NamedTuple):
    """How wrong the network is about an image; the greater, the worse.

    Attributes:
        loss: cross-entropy of the true label.
        sample: number in the split.
        label: the true class.
        prediction: the most likely class.
    """

    loss: float
    sample: int
    label: int
    prediction: int


class Mistakes(Callback):
    """Logs the images with the highest loss of their true label as one picture, "true -> predicted" below each.

    ``test/mistakes`` of a test, ``val/mistakes`` of the validation at the end of the training. The module's forward
    pass maps images [B, C, H, W] to logits [B, K]; batches have ``image`` and ``label``. Several views of an image are
    scored together, by their mean softmax, and one is shown: of ten crops the centre. Pixels are shown as the data set
    has them.

    Args:
        count: images in the picture.

    Raises:
        UserError: it is below 1.
    """

    def __init__(self, count: int = 32):
        if count < 1:
            raise UserError(f"Mistakes: count={count}; use 1 or more")
        self.count = count
        self._worst: list[Mistake] | None = None
        self._logits: Tensor | None = None
        self._hook: Any = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin where this is the training's last validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and takes_last_step(trainer):
            self.on_test_start(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, where a logger takes pictures; see what the network makes of each batch."""
        if any(hasattr(logger, "log_image") for logger in trainer.loggers):
            self._worst, self._logits = [], None
            self._hook = pl_module.register_forward_hook(self._note)

    def _note(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 2:
            self._logits = output

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        """Keep the worst."""
        self.on_test_batch_end(trainer, pl_module, *arguments)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the worst."""
        if self._worst is None:
            return
        images, labels = batch["image"], batch["label"]
        logits, self._logits = self._logits, None
        if logits is None or len(logits) % len(labels) or isinstance(images, list):
            images = torch.cat([views[0] for views in images]) if isinstance(images, list) else images.flatten(0, -4)
            logits = forward(trainer, pl_module, images)
        scores = logits.float().unflatten(0, (len(labels), -1)).softmax(2).mean(1).log()
        losses = F.nll_loss(scores, labels, reduction="none")
        worst = losses.topk(min(self.count, len(labels)))
        for loss, row in zip(worst.values.tolist(), worst.indices.tolist(), strict=True):
            if len(self._worst) == self.count and loss <= self._worst[0].loss:
                break
            found = Mistake(loss, int(batch["sample"][row]), int(labels[row]), int(scores[row].argmax()))
            (heapq.heappush if len(self._worst) < self.count else heapq.heappushpop)(self._worst, found)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the picture."""
        self._finish(trainer, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the picture."""
        self._finish(trainer, "test")

    def _finish(self, trainer: Trainer, stage: str) -> None:
        """Log the worst of all ranks."""
        if self._worst is None:
            return
        self._hook.remove()
        parts: list[Any] = [self._worst]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size
            dist.all_gather_object(parts, self._worst)
        self._worst = None
        worst = sorted((mistake for part in parts for mistake in part), reverse=True)[: self.count]
        if not trainer.is_global_zero:
            return
        names = datamodule(trainer).shards(stage).manifest.classes
        captions = [f"{_named(m.label, names)} -> {_named(m.prediction, names)}" for m in worst]
        images = _read(datamodule(trainer), stage, [mistake.sample for mistake in worst])
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image(f"{stage}/mistakes", images, trainer.global_step, caption=captions)


def _named(number: int, names: Sequence[str]) -> str:
    return str(names[number]) if 0 <= number < len(names) else str(number)


def _read(stream: ShardStream, stage: str, samples: Sequence[int]) -> list[Tensor]:
    """Return images of a split, [C, H, W], before they are normalised."""
    loader: Any = stream.val_dataloader() if stage == "val" else stream.test_dataloader()
    loader.plans = lambda: [(sample, sample + 1) for sample in samples]
    return [_shown(batch["image"][0]) for batch in loader]


def _shown(image: Any) -> Tensor:
    """Return one view of an image; of values that are no pixels, from the darkest to the brightest."""
    if isinstance(image, list):
        image = image[0][0]
    elif image.dim() == 4:
        image = image[(len(image) - 1) // 2]
    if image.dtype == torch.uint8:
        return image
    low, high = image.float().aminmax()
    return (image.float() - low) / (high - low).clamp(min=1e-12)
