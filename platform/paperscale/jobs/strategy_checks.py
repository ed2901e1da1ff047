"""Whether a strategy can run a recipe: its name, its place, the Trainer's options, and the model's optimizers."""

from __future__ import annotations

import importlib.util
import inspect
from typing import TYPE_CHECKING, Any

from paperscale.errors import UserError, nearest
from paperscale.training.sharding import Sharding, class_of, sharding
from paperscale.training.strategies import NAMES

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

_OWN_PROCESSES = ("spawn", "fork", "notebook")
_OF_LIGHTNING = ("auto", "single_device", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true")
_ELSEWHERE = {
    "deepspeed": "deepspeed_zero2",
    "deepspeed_stage_1": "deepspeed_zero1",
    "deepspeed_stage_1_offload": "deepspeed_zero2_offload",
    "deepspeed_stage_2": "deepspeed_zero2",
    "deepspeed_stage_2_offload": "deepspeed_zero2_offload",
    "deepspeed_stage_3": "deepspeed_zero3",
    "deepspeed_stage_3_offload": "deepspeed_zero3_offload",
    "deepspeed_stage_3_offload_nvme": "deepspeed_zero3_nvme",
    "zero1": "deepspeed_zero1",
    "zero2": "deepspeed_zero2",
    "zero3": "deepspeed_zero3",
    "fsdp2": "fsdp",
    "fsdp_cpu_offload": "{class_path: paperscale.training.strategies.FSDP2Strategy, init_args: {offload: true}}",
    "DDPStrategy": "ddp, or for options class_path: paperscale.training.strategies.ExactDDPStrategy",
    "SingleDeviceStrategy": "auto",
    "DeepSpeedStrategy": "deepspeed_zero2, or for options class_path: paperscale.training.strategies.ZeroStrategy",
    "FSDPStrategy": "fsdp, or for options class_path: paperscale.training.strategies.FSDP2Strategy",
    "ModelParallelStrategy": "fsdp, or for options class_path: paperscale.training.strategies.FSDP2Strategy",
}
"""Names that Lightning or others use, and ours."""
_ZERO_PRECISIONS = ("32-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed", "32", "16", "bf16", "None")


def check_strategy(strategy: Any, world_size: int) -> Sharding:
    """Check that a strategy is one that can run on that many processes.

    Args:
        strategy: a name, or ``class_path`` and ``init_args``.
        world_size: processes.

    Raises:
        UserError: it is not.
    """
    name = strategy if isinstance(strategy, str) else strategy.class_path.rpartition(".")[2]
    if any(word in name for word in _OWN_PROCESSES):
        raise UserError(f"trainer.strategy={name}: the job starts the processes; use trainer.strategy=ddp")
    if name in _ELSEWHERE:
        raise UserError(f"trainer.strategy={name} goes by another name here; use trainer.strategy={_ELSEWHERE[name]}")
    if isinstance(strategy, str) and name.startswith("{"):  # to the parser, a class whose options are wrong is any word
        _explain(name)
    if isinstance(strategy, str):
        known = [*NAMES, *_OF_LIGHTNING]
        if strategy not in known:
            hint = nearest(strategy, known) or f"; use one of {', '.join(NAMES)}"
            raise UserError(f"trainer.strategy={strategy}: there is no such strategy{hint}")
    elif not _holds_pieces(class_of(strategy)):
        raise UserError(
            f"trainer.strategy={name}: runs are not checkpointed with it; use one of {', '.join(NAMES)}, or derive it "
            "from a class of paperscale.training.strategies"
        )
    found = sharding(strategy, world_size)
    if found.kind == "zero" and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"trainer.strategy={name} needs the package deepspeed, which is not installed; "
            "`pip install deepspeed`, or use trainer.strategy=fsdp"
        )
    if found.kind == "single" and world_size > 1:
        raise UserError(
            f"trainer.strategy={name} is for one process, this job has {world_size}; use trainer.strategy=ddp"
        )
    return found


def _explain(strategy: str) -> None:
    """Say what is wrong with a class and its options.

    Raises:
        UserError: names the option.
    """
    from jsonargparse import ArgumentError
    from lightning.pytorch.cli import LightningArgumentParser
    from lightning.pytorch.strategies import Strategy

    from paperscale.training.recipe import explain

    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--trainer.strategy", type=Strategy)
    try:
        parser.parse_args([f"--trainer.strategy={strategy}"])
    except ArgumentError as error:
        raise UserError(explain(str(error), parser)) from error


def _holds_pieces(kind: type) -> bool:
    from paperscale.training.strategies.portable import PortableStrategy

    return issubclass(kind, PortableStrategy)


def check_options(trainer: Any, of: Sharding) -> None:
    """Check the Trainer's options against its strategy.

    Raises:
        UserError: DeepSpeed has no such option.
    """
    if of.kind != "zero":
        return
    if str(trainer.precision) not in _ZERO_PRECISIONS:
        raise UserError(
            f"trainer.precision={trainer.precision}: DeepSpeed, which {of.name} is of, has no such precision; use "
            "trainer.precision=bf16-mixed, or trainer.strategy=fsdp"
        )
    if trainer.gradient_clip_val and str(trainer.gradient_clip_algorithm).rpartition(".")[2].lower() == "value":
        raise UserError(
            f"trainer.gradient_clip_algorithm=value: {of.name} clips by the norm alone; use "
            "trainer.gradient_clip_algorithm=norm, or trainer.strategy=fsdp"
        )


def check_optimizers(
    model: Any, optimizers: list[Optimizer] | None, trainer: Any, of: Sharding, accumulate: int
) -> None:
    """Check how a model is optimized against the strategy and the Trainer's options.

    Args:
        model: the LightningModule.
        optimizers: what its ``configure_optimizers`` returns; ``None`` where that cannot be found out.
        trainer: the section ``trainer`` of the configuration.
        of: what the strategy divides.
        accumulate: forward passes of one optimizer step.

    Raises:
        UserError: they do not go together.
    """
    name, count = type(model).__name__, len(optimizers or ())
    if model.automatic_optimization:
        if count > 1:
            raise UserError(
                f"model {name} has {count} optimizers, which Lightning steps only by hand; set "
                "`self.automatic_optimization = False` in its constructor and step them in `training_step`"
            )
    else:
        _check_by_hand(name, count, trainer, of, accumulate)
    for optimizer in optimizers or () if of.kind == "zero" else ():
        if not hasattr(optimizer, "divide") and element_wise(optimizer) is False:
            raise UserError(
                f"optimizer {type(optimizer).__name__} of model {name} looks at whole tensors, and {of.name} gives it "
                "parts of them; use one that treats each element by itself such as AdamW, Lamb or Lars of "
                "paperscale.nn.optimizers, or trainer.strategy=ddp"
            )


def _check_by_hand(name: str, count: int, trainer: Any, of: Sharding, accumulate: int) -> None:
    """Check a model with ``automatic_optimization = False``."""
    if of.kind == "zero":
        steps = f"{count} optimizers" if count > 1 else "its optimizer"
        raise UserError(
            f"model {name} steps {steps} by hand, and DeepSpeed, which {of.name} is of, admits one that it steps "
            "itself; use trainer.strategy=ddp or trainer.strategy=fsdp"
        )
    if trainer.gradient_clip_val:
        raise UserError(
            f"trainer.gradient_clip_val={trainer.gradient_clip_val}: model {name} steps its optimizers by hand; leave "
            "it out, and call `self.clip_gradients` in `training_step`"
        )
    if accumulate > 1:
        raise UserError(
            f"model {name} steps its optimizers by hand, so its global batch cannot be accumulated over {accumulate} "
            "passes; leave data.micro_batch_size out, or use more processes"
        )


def element_wise(optimizer: Optimizer) -> bool | None:
    """Return whether an optimizer updates each element whatever tensor that is part of; ``None`` if it cannot be tried.

    ZeRO gives each process a flat part of all parameters. Tried out: three steps on a matrix, and on two parts of it.
    """
    import torch

    kind = type(optimizer)
    if kind.__module__.startswith("deepspeed"):  # made for ZeRO, and making another one would compile it
        return None
    taken = inspect.signature(kind.__init__).parameters
    settings = {name: value for name, value in optimizer.defaults.items() if name in taken}
    if isinstance(settings.get("lr"), float):
        settings["lr"] = 0.1  # a recipe's may be too small to see anything by
    random = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(4, 6, generator=random) for _ in range(4))

    def updated(start: Tensor, gradients: list[Tensor]) -> Tensor:
        parameter = torch.nn.Parameter(start.clone())
        tried = kind([parameter], **settings)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            tried.step(lambda: 0.0)
        return parameter.detach().flatten()

    try:
        whole = updated(start, gradients)
    except Exception:  # other arguments, or gradients of another kind
        return None
    parts = zip(*(tensor.flatten().split((7, 17)) for tensor in (start, *gradients)), strict=True)
    try:
        return torch.allclose(whole, torch.cat([updated(part, list(of)) for part, *of in parts]), rtol=1e-4, atol=1e-6)
    except Exception:  # refuses tensors of one dimension
        return False
