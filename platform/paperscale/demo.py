"""``paperscale demo``: the main job on real data, interrupted in the middle and continued, in two minutes."""

from __future__ import annotations

import dataclasses
import subprocess
import time
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from paperscale.data.order import SampleOrder
from paperscale.data.prepare import prepare
from paperscale.data.shards import ShardSet
from paperscale.errors import FAILED, FINISHED, UserError
from paperscale.jobs.drill import preempt
from paperscale.jobs.engines import ENGINES
from paperscale.jobs.run import Run
from paperscale.jobs.status import LIVE, status
from paperscale.jobs.submit import Shape, new_info, submit
from paperscale.recipes import RecipeArguments, find, header
from paperscale.tracking.wandb_files import read_runs

RECIPE = "resnet20-mnist"
PROCESSES = 2
INTERRUPT_AT = 0.4
"""Part of the training after which the job is interrupted."""


def demo(cluster: str) -> int:
    """Prepare, submit, interrupt, continue, finish; return the exit code.

    Args:
        cluster: name of a profile.

    Raises:
        UserError: the cluster or the data cannot be had, or the run went wrong; says where to look.
    """
    console = Console()
    shape = _shape(cluster)
    profile = shape.profile()
    ENGINES[profile.engine].check(profile, new_info(RECIPE, None, profile, "paperscale demo"))
    data = Path("data/mnist")
    console.rule("1  data", align="left")
    manifest = prepare("mnist", data, console)
    total = sum(len(shards) for shards in manifest.splits.values())
    console.print(f"{data}: {total} WebDataset shards, each with an index, verified")

    console.rule(f"2  submit {RECIPE} to {cluster}, {PROCESSES} processes", align="left")
    overrides = [f"data.path={data}", "checkpoint.every_n_steps=50"]
    words = [RECIPE, *overrides]
    run = submit(RecipeArguments.parse(words), shape, None, False, f"paperscale demo --cluster {cluster}")
    if isinstance(run, str):
        raise TypeError("a submission returned a script")
    console.print(f"run [bold]{run.name}[/], job {run.job}, directory {run.path}")

    console.rule("3  train, interrupt, continue, finish", align="left")
    _watch(run, console)
    _show_continuation(run, data, console)
    return _summary(run, console)


def _shape(cluster: str) -> Shape:
    shape = Shape(cluster, nodes=1, procs_per_node=PROCESSES)
    if shape.profile().engine == "local":
        return shape
    try:
        nodes = subprocess.run(["sinfo", "-h", "-o", "%D"], capture_output=True, text=True, timeout=20).stdout.split()
    except FileNotFoundError:
        nodes = []  # submit says what is missing
    return dataclasses.replace(shape, nodes=2, procs_per_node=1) if nodes and max(map(int, nodes)) > 1 else shape


def _watch(run: Run, console: Console) -> None:
    """Show the progress until the run ends, and interrupt it once on the way."""
    interrupted = False
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[fact]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting", total=None, fact="")
        while status(run).state != "finished" or ENGINES[run.info.engine].state(run.job or "").state == "running":
            time.sleep(0.3)
            attempts, facts = run.attempts(), run.read_json("progress.json")
            if facts and facts["attempt"] == len(attempts):
                loss = f"loss {facts['loss']:.3f}  " if facts["loss"] is not None else ""
                progress.update(
                    task,
                    description=f"attempt {len(attempts)}",
                    total=facts["total_steps"],
                    completed=facts["step"],
                    fact=f"step {facts['step']}/{facts['total_steps']}  {loss}{facts['samples_per_s']:,.0f} images/s",
                )
                if not interrupted and facts["step"] >= INTERRUPT_AT * facts["total_steps"]:
                    interrupted = True
                    preempt(run)
                    progress.console.print("[yellow]SIGTERM[/] sent, as by a scheduler that takes the nodes back")
            now = status(run)
            if now.state not in (*LIVE, "finished"):
                raise UserError(f"run '{run.name}' {now.state}: {now.detail}; see `paperscale logs {run.name}`")


def _show_continuation(run: Run, data: Path, console: Console) -> None:
    """Compare the samples that the second attempt began with against those that the order says come next."""
    first, second = (attempt.facts for attempt in run.attempts()[:2])
    position, got = second["position"], second["first_samples"]
    shards = ShardSet(data, "train")
    order = SampleOrder(shards.sizes, seed=run_seed(run))
    epoch, start = divmod(position, len(order))
    expected = order.samples(epoch, start, start + len(got)).tolist()
    console.print(
        f"attempt 1 ended with exit code {first['outcome']} (requeue me) after {first['reason']};\n"
        f"attempt 2 continued from [bold]{second['resumed_from']}[/]"
    )
    console.print(
        f"next sample by the order: {position:,} -> images {expected[:4]}...;\nattempt 2 began with {got[:4]}..."
    )
    if expected != got:
        raise UserError(f"attempt 2 of '{run.name}' did not continue at the next sample: this is a defect of ours")
    console.print("[green]it continued from the exact next sample[/]")


def run_seed(run: Run) -> int:
    """Return the seed of the run's order of samples."""
    return yaml.safe_load(run.recipe.read_text())["seed_everything"]


def _summary(run: Run, console: Console) -> int:
    console.rule("4  result", align="left")
    results, fields = run.read_json("results.json"), header(find(RECIPE)).fields
    rates = [attempt.facts["samples_per_s"] for attempt in run.attempts()]
    runs = read_runs(run.path / "wandb")
    error = 100 * (1 - results["test/accuracy"])
    console.print(f"test accuracy   {100 - error:.2f} % ({error:.2f} % error)   expected {fields['measured']}")
    console.print(f"throughput      {max(rates):,.0f} images/s on {PROCESSES} processes")
    console.print(f"run directory   {run.path}")
    rows = sum(r.rows for r in runs)
    ids = {r.run_id for r in runs}
    console.print(f"W&B             {len(ids)} run ({', '.join(ids)}) in {len(runs)} segments, {rows} rows, offline")
    console.print(f"  look at it    wandb leet {run.path / 'wandb'}", soft_wrap=True)
    console.print(f"  send it       wandb sync {run.path / 'wandb'}/offline-run-*", soft_wrap=True)
    return FINISHED if results else FAILED
