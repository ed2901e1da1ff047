"""``paperscale estimate``: memory under each strategy and throughput of a recipe, before it is submitted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from paperscale.errors import UserError, nearest
from paperscale.jobs import profile as profiles
from paperscale.jobs.run import all_runs, read_json
from paperscale.jobs.units import size_bytes
from paperscale.jobs.validation import few_to_normalise
from paperscale.recipes import RecipeArguments
from paperscale.training.estimate import Estimate, Passes, why_unknown
from paperscale.training.gpus import GPU, GPUS, named, recognised
from paperscale.training.recipe import RecipeCLI, built_on_meta
from paperscale.training.sharding import sharding
from paperscale.training.strategies import NAMES
from paperscale.training.throughput import UTILISATION, Work, work

RESERVE = 1 << 30
"""Bytes of a GPU that are left for the CUDA context, communication and the workspaces of kernels."""
_ASSUMED, _ASSUMED_GPUS = "A100-80", 8
_MOST_MEASURED = 3


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for; ``None`` for what it leaves open.

    Attributes:
        strategies: names; none for the recipe's and all of ``paperscale.training.strategies.NAMES``.
        cluster: profile of the cluster whose GPUs and shape are meant.
        gpu: name, as in ``paperscale.training.gpus.GPUS``.
        nodes: of the job.
        gpus_per_node: of each node.
        samples: of the training split, where the shards are missing.
        utilisation: least and greatest share of the roofline that is reached.
    """

    strategies: tuple[str, ...] = ()
    cluster: str | None = None
    gpu: str | None = None
    nodes: int | None = None
    gpus_per_node: int | None = None
    samples: int | None = None
    utilisation: tuple[float, float] = UTILISATION


@dataclass(frozen=True)
class Target:
    """The GPUs that are estimated for.

    Attributes:
        gpu: each of them.
        source: where that is from: ``option``, ``cluster``, ``here`` or ``assumed``.
        nodes: of the job.
        gpus_per_node: of each node.
    """

    gpu: GPU
    source: str
    nodes: int
    gpus_per_node: int

    @property
    def world_size(self) -> int:
        """Return the number of processes."""
        return self.nodes * self.gpus_per_node


def find(arguments: RecipeArguments, wanted: Wanted) -> dict[str, Any]:
    """Return the estimate of a recipe; docs/estimate.md describes each key.

    Raises:
        UserError: the recipe is wrong, the batch cannot be divided, or a strategy, GPU or profile has no such name.
    """
    for name in wanted.strategies:
        if name not in NAMES:
            fix = nearest(name, NAMES) or f"; use one of {', '.join(NAMES)}"
            raise UserError(f"--strategy {name}: there is no such strategy{fix}")
    cli = built_on_meta(arguments.to_cli())
    to = target(wanted, cli.datamodule.global_batch_size)
    passes = Passes(cli, to.world_size)
    own = cli.config.trainer.strategy
    rows, notes = _strategies(passes, to.gpu, own, wanted.strategies)
    whole = passes.under("ddp")
    data, of_data = _data(cli, passes, wanted.samples)
    compute, of_compute = _compute(cli, passes, to, data["samples"], wanted.utilisation)
    few = few_to_normalise(cli, to.world_size, "GPUs")
    return {
        "recipe": arguments.recipe.stem,
        "model": type(cli.model).__name__,
        "parameters": whole.count,
        "trainable": sum(p.numel() for p in cli.model.parameters() if p.requires_grad),
        "precision": passes.precision(sharding(own, to.world_size)),
        "activation_checkpointing": cli.config_init.speed.activation_checkpointing,
        "gpu": {"name": to.gpu.name, "memory": to.gpu.memory, "reserve": RESERVE, "source": to.source},
        "nodes": to.nodes,
        "gpus_per_node": to.gpus_per_node,
        "batch": {
            "global_batch_size": cli.datamodule.global_batch_size,
            "samples": passes.samples,
            "passes": cli.datamodule.accumulate(to.world_size),
        },
        "data": data,
        "strategies": rows,
        "compute": compute,
        "measured": measured(arguments.recipe.stem),
        "notes": [*of_data, *notes, *of_compute, *([few] if few else [])],
    }


def target(wanted: Wanted, batch: int) -> Target:
    """Return the GPUs that are meant: an option's, a profile's, this machine's, or what is assumed.

    Args:
        wanted: what is asked for.
        batch: samples of a global batch: no more GPUs are assumed.

    Raises:
        UserError: there is no such GPU, no such profile, or its profile does not tell its GPUs' memory.
    """
    import torch

    gpu, source, nodes, gpus = GPUS[_ASSUMED], "assumed", 1, min(_ASSUMED_GPUS, batch)
    profile = profiles.load(wanted.cluster) if wanted.cluster else None
    if profile and profile.engine != "local":
        nodes, gpus, source = profile.nodes, profile.gpus_per_node or profile.processes_per_node, "cluster"
        kind, memory = profile.node.gpu_type or "", profile.node.gpu_memory
        if memory:
            gpu = recognised(kind or "unnamed", size_bytes(memory))
        elif not wanted.gpu:
            raise UserError(
                f"cluster '{profile.name}' does not say what its GPUs are; set node.gpu_memory and node.gpu_type in "
                f"its profile, or name them with --gpu, such as --gpu {_ASSUMED}"
            )
    elif torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        gpu, source, gpus = recognised(facts.name, facts.total_memory), "here", torch.cuda.device_count()
    if wanted.gpu:
        gpu, source = named(wanted.gpu), "option"
    return Target(gpu, source, wanted.nodes or nodes, wanted.gpus_per_node or gpus)


def _strategies(
    passes: Passes, gpu: GPU, own: Any, asked: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, None]]:
    """Return a row for each strategy, the recipe's first, and what there is to say of them."""
    of_recipe = sharding(own, passes.world_size).name
    others = [name for name in asked or NAMES if sharding(name, passes.world_size).name != of_recipe]
    chosen = [*([] if asked and of_recipe not in asked else [own]), *others]
    rows, notes = [], dict[str, None]()
    for strategy in chosen:
        found = passes.under(strategy)
        notes |= dict.fromkeys(found.unknown)
        rows.append({"strategy": found.strategy, "recipe": strategy is own, **_memory(passes, found, gpu)})
    return rows, notes


def _memory(passes: Passes, found: Estimate, gpu: GPU) -> dict[str, Any]:
    """Return the bytes of a strategy's row, and whether they fit."""
    known = found.optimizer is not None and found.activations is not None
    room = gpu.memory - RESERVE
    fits = found.total <= room if known or found.total > room else None
    without = found.total - (found.activations or 0)
    return {
        "precision": found.precision,
        "weights": found.parameters,
        "gradients": found.gradients,
        "optimizer": found.optimizer,
        "buffers": found.buffers,
        "averages": found.averages,
        "buckets": found.buckets,
        "activations": found.activations,
        "total": found.total,
        "fits": fits,
        "largest_micro_batch": passes.largest(found.precision, room - without) if known else None,
    }


def _data(cli: RecipeCLI, passes: Passes, samples: int | None) -> tuple[dict[str, Any], list[str]]:
    """Return what is known of the training split, and what is assumed."""
    stream, notes = cli.datamodule, []
    if passes.missing:
        notes.append(f"no shards at {', '.join(passes.missing)}: samples of the shapes that the recipe tells")
        if samples is None:
            notes.append("the length of an epoch is not known without them; give it with --samples")
    else:
        start, stop = stream.epoch_around(0)
        samples = stop - start
    shapes = {name: list(shape) for name, shape in passes.shapes.items()}
    return {"paths": stream.paths, "missing": passes.missing, "samples": samples, "shapes": shapes}, notes


def _compute(
    cli: RecipeCLI, passes: Passes, to: Target, samples: int | None, utilisation: tuple[float, float]
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return what a sample costs and how fast the training is, and what there is to say of it."""
    precision = passes.precision(sharding(cli.config.trainer.strategy, to.world_size))
    try:
        found = work(passes, precision)
    except Exception as error:  # whatever a user's model raises on tensors without content
        return None, [why_unknown("compute", error)]
    facts = {
        "forward_macs": round(found.forward_flops / 2),
        "forward_flops": round(found.forward_flops),
        "backward_flops": round(found.backward_flops),
        "bytes": round(found.bytes),
        "utilisation": list(utilisation),
    }
    least = found.seconds(to.gpu, cli.config_init.speed.tf32)
    if least is None:
        unknown = dict.fromkeys(("step_s", "samples_per_s", "epoch_s", "training_s"))
        return {**facts, **unknown}, [f"the rates of the GPU '{to.gpu.name}' are not known; name a like one with --gpu"]
    passes_of_step = cli.datamodule.accumulate(to.world_size)
    per_step = cli.datamodule.global_batch_size
    if getattr(cli.datamodule, "max_tokens", None) is not None:
        per_step = passes.samples * passes_of_step * to.world_size
    rates = [share * per_step / (least * passes_of_step) for share in utilisation]
    total = _length(cli, samples, per_step)
    times = {
        "step_s": [per_step / rate for rate in rates],
        "samples_per_s": rates,
        "epoch_s": [samples / rate for rate in rates] if samples else None,
        "training_s": [total / rate for rate in rates] if total else None,
    }
    return {**facts, **times}, list(_without_units(found, to.gpu))


def _length(cli: RecipeCLI, samples: int | None, per_step: int) -> int | None:
    """Return the samples of the whole training, ``None`` where that is not known."""
    trainer = cli.config_init.trainer
    by_steps = trainer.max_steps * per_step if (trainer.max_steps or -1) > 0 else None
    by_epochs = trainer.max_epochs * samples if samples and (trainer.max_epochs or -1) > 0 else None
    return min((total for total in (by_steps, by_epochs) if total), default=None)


def _without_units(found: Work, gpu: GPU) -> Iterator[str]:
    """Say what a GPU computes at the rate of 32 bits because it has no units for less."""
    if any("bfloat16" in str(operation.dtype) for operation in found.forward) and not gpu.rate("bf16"):
        yield f"{gpu.name} has no units for bf16: it is reckoned at the rate of 32 bits; use trainer.precision=16-mixed"


def measured(recipe: str) -> list[dict[str, Any]]:
    """Return the newest finished runs of a recipe with the throughput of their last attempt."""
    return list(islice(_measured(recipe), _MOST_MEASURED))


def _measured(recipe: str) -> Iterator[dict[str, Any]]:
    for run in all_runs():
        info = read_json(f"{run.path}/run.json")
        if info.get("recipe") != recipe or not (rate := run.read_json("results.json").get("samples_per_s")):
            continue
        attempts = run.attempts()
        facts = attempts[-1].facts if attempts else {}
        yield {
            "run": run.name,
            "samples_per_s": rate,
            "nodes": facts.get("nodes", info["nodes"]),
            "procs_per_node": facts.get("procs_per_node", info["procs_per_node"]),
            "strategy": facts.get("strategy"),
            "device": read_json(attempts[-1].path / "preflight.json").get("device") if attempts else None,
        }
