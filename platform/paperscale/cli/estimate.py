"""``paperscale estimate``: what a recipe takes of a GPU, before it is submitted."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from paperscale.cli.options import (
    Add,
    complete_clusters,
    complete_recipes,
    complete_strategies,
    console,
    positive,
    print_json,
    recipe_argument,
)
from paperscale.errors import FINISHED


def add_commands(add: Add) -> None:
    """Add the command."""
    estimate = add("estimate", run_estimate, "memory and throughput of a recipe, before it is submitted")
    recipe_argument(estimate, "RECIPE [OVERLAY ...] [key=value ...]; neither data nor GPU is needed", complete_recipes)
    estimate.add_argument(
        "--strategy", action="append", default=[], metavar="NAME", help="again for a further one (default: all)"
    ).completer = complete_strategies  # type: ignore[attr-defined]
    estimate.add_argument("--nodes", type=positive, help="nodes (default: the profile's, or 1)")
    estimate.add_argument("--gpus-per-node", type=positive, metavar="M", help="GPUs of each (default: what there is)")
    help = "kind of GPU, such as A100-80 (default: the profile's, or this machine's)"
    estimate.add_argument("--gpu", metavar="NAME", help=help).completer = complete_gpus  # type: ignore[attr-defined]
    estimate.add_argument("--cluster", help="profile whose GPUs and nodes are meant").completer = complete_clusters  # type: ignore[attr-defined]
    estimate.add_argument("--samples", type=positive, metavar="N", help="of the training split, where it is not here")
    estimate.add_argument(
        "--utilisation",
        type=shares,
        metavar="LOW-HIGH",
        help="per cent of the roofline that is reached (default 40-80)",
    )
    estimate.add_argument("--json", action="store_true", help="print JSON")


def complete_gpus(prefix: str, **_: Any) -> list[str]:
    """Return the names of GPUs."""
    from paperscale.training.gpus import GPUS

    return list(GPUS)


def shares(text: str) -> tuple[float, float]:
    """Return two rising shares, written in per cent: ``40-80``, or one for both."""
    low, _, high = text.removesuffix("%").partition("-")
    try:
        found = float(low) / 100, float(high or low) / 100
    except ValueError:
        found = (0.0, 0.0)
    if not 0 < found[0] <= found[1] <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no range of per cent: write 40-80, or one number")
    return found


def run_estimate(args: argparse.Namespace) -> int:
    """Print the estimate."""
    from paperscale.jobs.estimating import Wanted, find
    from paperscale.recipes import RecipeArguments

    options: dict[str, Any] = {"utilisation": args.utilisation} if args.utilisation else {}
    wanted = Wanted(
        tuple(args.strategy), args.cluster, args.gpu, args.nodes, args.gpus_per_node, args.samples, **options
    )
    found = find(RecipeArguments.parse(args.recipe), wanted)
    if args.json:
        print_json(found)
        return FINISHED
    _print_lines(_head(found))
    _print_memory(found)
    _print_lines([*_speed(found), *_measured(found), *(("note", note) for note in found["notes"])])
    return FINISHED


def _print_lines(lines: Iterable[tuple[str, str]]) -> None:
    for name, text in lines:
        print(f"{name:11} {text}")


def _head(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what is estimated, and for what."""
    gpu, batch = found["gpu"], found["batch"]
    yield "recipe", f"{found['recipe']}: {found['model']}, {found['parameters']:,} parameters, {found['precision']}"
    origin = {
        "option": "",
        "cluster": ", of the profile",
        "here": ", of this machine",
        "assumed": ", assumed: no GPU is here (see --gpu, --gpus-per-node and --cluster)",
    }[gpu["source"]]
    yield "on", f"{_gpus(found)}, {gpu['name']}, {gpu['memory'] / 2**30:.1f} GiB{origin}"
    passes = f", in {batch['passes']} passes" if batch["passes"] > 1 else ""
    yield "batch", f"{batch['global_batch_size']} samples a step, {batch['samples']} a pass of each GPU{passes}"
    shapes = (f"{name} {' x '.join(map(str, shape))}".strip() for name, shape in found["data"]["shapes"].items())
    yield "sample", ", ".join(shapes) or "not known"


def _gpus(found: dict[str, Any]) -> str:
    return f"{found['nodes']} x {found['gpus_per_node']} GPUs"


def _print_memory(found: dict[str, Any]) -> None:
    """Print the table of strategies, in one unit."""
    from rich.table import Table

    rows = found["strategies"]
    unit, name = (1 << 30, "GiB") if max(row["total"] for row in rows) >= 1 << 30 else (1 << 20, "MiB")
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(f"{name} of a GPU", no_wrap=True)
    for column in ("weights", "grads", "optim", "other", "activ.", "total", "fits", "largest"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        sizes = [row[part] for part in ("weights", "gradients", "optimizer")]
        sizes += [row["buffers"] + row["averages"] + row["buckets"], row["activations"], row["total"]]
        cells = ["?" if size is None else f"{size / unit:,.2f}" for size in sizes]
        fits = {True: "yes", False: "no", None: "?"}[row["fits"]]
        largest = "?" if row["largest_micro_batch"] is None else f"{row['largest_micro_batch']:,}"
        table.add_row(row["strategy"] + (" *" if row["recipe"] else ""), *cells, fits, largest)
    print()
    console().print(table)
    print("* the recipe's; largest: samples of a pass that fit\n")


def _speed(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what is computed, and how long that takes."""
    from paperscale.jobs.words import duration

    compute = found["compute"]
    if compute is None:
        return
    flops = (compute["forward_flops"] + compute["backward_flops"]) / 1e9
    macs, moved = compute["forward_macs"] / 1e9, compute["bytes"] / 1e6
    yield "a sample", f"{macs:,.4g} GMACs forward; {flops:,.4g} GFLOP and {moved:,.4g} MB moved, forward and backward"
    if compute["step_s"] is None:
        return
    shares = _range([100 * share for share in compute["utilisation"]], "{:.0f}".format)
    rates = _range(compute["samples_per_s"], "{:,.0f}".format)
    yield "speed", f"{rates} samples/s on {_gpus(found)}, at {shares} % of each one's roofline"
    milliseconds = [1000 * seconds for seconds in compute["step_s"]]
    yield "a step", f"{_range(milliseconds, '{:,.3g}'.format)} ms, without communication and waiting for data"
    for name, key in (("an epoch", "epoch_s"), ("training", "training_s")):
        if compute[key]:
            yield name, _range(compute[key], duration)


def _range(values: list[float], text: Callable[[float], str]) -> str:
    """Return the least and the greatest value in words, or one where they read alike."""
    return " to ".join(dict.fromkeys(text(value) for value in sorted(values)))


def _measured(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what finished runs of the recipe have come to."""
    for run in found["measured"]:
        where = f"{run['nodes']} x {run['procs_per_node']} processes"
        how = ", ".join(filter(None, (where, run["device"], run["strategy"])))
        yield "measured", f"{run['samples_per_s']:,.0f} samples/s in {run['run']}: {how}"
