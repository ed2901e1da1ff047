"""``paperscale checkpoint``: list, verify and inspect checkpoints, average and export them, have one written."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paperscale.cli.options import (
    Add,
    Command,
    Parser,
    complete_runs,
    find,
    position,
    positive,
    print_json,
    run_argument,
    tell,
    wait_option,
)
from paperscale.errors import FAILED, FINISHED, UserError

if TYPE_CHECKING:
    from paperscale.training.weights import Weights

_WHICH = "best, last (the default) or a step"
_FORMATS = ("safetensors", "torchvision", "huggingface")


def add_commands(add: Add) -> None:
    """Add the commands."""
    family = add("checkpoint", lambda _: FAILED, "list, verify, inspect, average and export checkpoints")
    family.on_unknown = "; to have a running job write one: `paperscale checkpoint save {}`"
    actions = family.add_subparsers(title="actions", metavar="ACTION", required=True, parser_class=Parser)

    def action(name: str, run: Command, help: str) -> Parser:
        parser = actions.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", allow_abbrev=False)
        parser.set_defaults(run=run)
        return parser

    save = action("save", run_save, "let a running job write a checkpoint now")
    run_argument(save)
    wait_option(save, "the checkpoint")
    listed = action("list", run_list, "list the checkpoints of a run")
    _place(listed)
    listed.add_argument("--verify", action="store_true", help="hash every file, not only look at its size")
    verify = action("verify", run_verify, "check every file of a run's checkpoints, or of one, against its hash")
    _place(verify)
    inspect = action("inspect", run_inspect, "say what a checkpoint holds, without reading it")
    _place(inspect, one=True)
    inspect.add_argument("--tensors", action="store_true", help="list every tensor")
    for parser in (listed, verify, inspect):
        parser.add_argument("--json", action="store_true", help="print JSON")
    _add_average(action("average", run_average, "write the mean of the weights of several checkpoints"))
    _add_export(action("export", run_export, "write the weights of a checkpoint as one file"))


def _add_average(average: Parser) -> None:
    _place(average)
    average.add_argument("steps", nargs="*", type=position, metavar="STEP", help="of these (default: all there are)")
    average.add_argument("--last", type=positive, metavar="K", help="of the newest K")
    help = "a .safetensors file, or the folder of a new checkpoint, which `test --checkpoint` scores"
    average.add_argument("-o", "--out", type=Path, required=True, help=help)


def _add_export(export: Parser) -> None:
    _place(export, one=True)
    export.add_argument(
        "-o", "--out", type=Path, required=True, help="a .safetensors file; of huggingface a new folder"
    )
    export.add_argument("--dtype", choices=["fp32", "bf16"], help="of the parameters (default: as they are kept)")
    export.add_argument("--ema", action="store_true", help="the averages in place of the weights")
    help = "whose names the tensors get, where the paper has them (default: safetensors, the model's own names)"
    export.add_argument("--format", choices=_FORMATS, default=_FORMATS[0], help=help)


def _place(parser: Parser, one: bool = False) -> None:
    where = parser.add_argument("where", metavar="RUN|FOLDER", help="a run, or a folder of checkpoints, or of one")
    where.completer = complete_runs  # type: ignore[attr-defined]
    if one:
        parser.add_argument("which", metavar="WHICH", nargs="?", help=_WHICH)


def run_save(args: argparse.Namespace) -> int:
    """Write a checkpoint now."""
    from paperscale.jobs.switches import save

    run = find(args)
    name = save(run, args.timeout, tell)
    if args.json:
        print_json({"run": run.name, "checkpoint": name})
    else:
        print(f"{run.name} has written {name}")
    return FINISHED


def run_list(args: argparse.Namespace) -> int:
    """List checkpoints."""
    from paperscale.jobs.checkpoints import listing, place

    folder = place(args.where)
    rows = listing(folder, args.verify)
    if args.json:
        print_json(rows)
        return FINISHED
    if not rows:
        print(f"no checkpoint in {folder}")
    table = [("step", "epoch", "samples", "size", "ranks", "strategy", "written", "metrics", ""), *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table if rows else ():
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    return FINISHED


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    from paperscale.jobs.words import clock

    metrics = ", ".join(f"{name} {value:.4g}" for name, value in row["metrics"].items() if name.startswith("val"))
    marks = [name for name in ("last", "best") if row[name]]
    if row["problem"]:
        marks.append(f"DAMAGED: {row['problem']}")
    elif row["verified"] == "hashes":
        marks.append("verified")
    if row["created"] is None:
        return (str(row["step"]), *("-" * 7), ", ".join(marks))
    counts = (str(row["step"]), str(row["epoch"]), f"{row['samples']:,}", _size(row["bytes"]), str(row["world_size"]))
    return (*counts, row["strategy"], clock(row["created"]), metrics or "-", ", ".join(marks))


def _size(count: float) -> str:
    units = ("B", "kB", "MB", "GB", "TB")
    for unit in units[:-1]:
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} {units[-1]}"


def run_verify(args: argparse.Namespace) -> int:
    """Verify checkpoints; exit 1 if one is damaged."""
    from paperscale.jobs.checkpoints import listing, place

    folder = place(args.where)
    rows = listing(folder, hashes=True)
    if not rows:
        raise UserError(f"no checkpoint in {folder}; `paperscale checkpoint list` takes the name of a run")
    if args.json:
        keys = ("checkpoint", "path", "step", "bytes", "verified", "problem")
        print_json([{key: row[key] for key in keys} for row in rows])
    else:
        for row in rows:
            whole = f"OK, {_size(row['bytes'])}" if not row["problem"] else ""
            print(f"{row['checkpoint']}  {whole or 'DAMAGED: ' + row['problem']}")
    return FAILED if any(row["problem"] for row in rows) else FINISHED


def run_inspect(args: argparse.Namespace) -> int:
    """Say what a checkpoint holds."""
    from paperscale.jobs.checkpoints import find as find_checkpoint
    from paperscale.training.inspection import inspect

    found = inspect(find_checkpoint(args.where, args.which, hashes=False), args.tensors)
    if args.json:
        print_json(found)
        return FINISHED
    for name, value in _lines(found):
        print(f"{name:14} {value}")
    for row in found.get("tensors", ()):
        print(f"  {row['name']}  {row['shape']} {row['dtype']}  {', '.join(row['files'])}")
    return FINISHED


def _lines(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    from paperscale.jobs.words import ago

    yield "checkpoint", f"{found['path']}, written {ago(found['created'])}"
    yield "step", f"{found['step']:,}, epoch {found['epoch']}, {found['consumed']:,} samples"
    yield "written by", f"{found['world_size']} ranks, {found['strategy']}, {_pairs(found['versions'])}"
    yield "metrics", _pairs(found["metrics"]) or "none: these weights were not validated"
    yield "size", f"{_size(found['bytes'])} in {len(found['files'])} files"
    for what in ("parameters", "buffers", "averages"):
        if of := found[what]:
            yield what, f"{of['elements']:,} in {of['tensors']} tensors, {', '.join(of['by_type'])}"
            for part, count in of["by_part"].items() if what == "parameters" else ():
                yield "", f"{part}  {count:,}"
    for optimizer in found["optimizers"]:
        kept = ", ".join(f"{key} ({of['dtype']})" for key, of in optimizer["state"].items())
        yield "optimizer", f"{optimizer['class']}: {', '.join(filter(None, [kept, *optimizer['numbers']]))}"
        for number, group in enumerate(optimizer["groups"]):
            yield f"  group {number}", _pairs(group)
    of = found["random"]
    yield "random states", f"of {of['ranks']} ranks: {', '.join(of['generators'])}" if of["ranks"] else "none"
    for alias, kept in found["aliases"].items():
        yield "tied", f"{alias} is {kept}"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
    )


def run_average(args: argparse.Namespace) -> int:
    """Average checkpoints."""
    from paperscale.jobs.checkpoints import find as find_checkpoint
    from paperscale.jobs.checkpoints import place
    from paperscale.training.checkpoint import all_checkpoints, read_manifest, step_of
    from paperscale.training.consolidate import refuse_existing, write_checkpoint, write_file
    from paperscale.training.weights import mean, of_checkpoint

    if args.last and args.steps:
        raise UserError("--last and steps both say what to average; leave one of the two out")
    refuse_existing(args.out)
    folder = place(args.where)
    steps = sorted(set(args.steps)) or sorted(map(step_of, all_checkpoints(folder)))[-(args.last or 0) :]
    if len(steps) < max(2, args.last or 0):
        raise UserError(
            f"{folder} has {len(steps)} checkpoints to average; train on with a larger checkpoint.keep_last, or with "
            "checkpoint.keep_every_n_steps"
        )
    found = [find_checkpoint(str(folder), str(step)) for step in steps]
    weights = mean([of_checkpoint(checkpoint) for checkpoint in found])
    if args.out.suffix == ".safetensors":
        written = write_file(weights, args.out, facts={"paperscale.steps": " ".join(map(str, steps))})
    else:
        written = write_checkpoint(weights, args.out, found[-1], read_manifest(found[-1]))
    print(f"{args.out}: the mean of steps {', '.join(map(str, steps))}; {_of_file(weights, written)}")
    return FINISHED


def run_export(args: argparse.Namespace) -> int:
    """Export a checkpoint."""
    import torch

    from paperscale.jobs.checkpoints import find as find_checkpoint
    from paperscale.training.checkpoint import read_manifest
    from paperscale.training.consolidate import refuse_existing, write_file
    from paperscale.training.weights import of_checkpoint

    refuse_existing(args.out)
    checkpoint = find_checkpoint(args.where, args.which)
    manifest, weights = read_manifest(checkpoint), of_checkpoint(checkpoint, args.ema)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, None: None}[args.dtype]
    facts = {"paperscale.run": manifest.run, "paperscale.step": str(manifest.step)}
    if args.format == _FORMATS[0]:
        written = write_file(weights, args.out, dtype, facts)
    else:
        from paperscale.jobs.exporting import export_as

        weights, written = export_as(args.format, checkpoint, weights, args.out, dtype, facts)
    print(f"{args.out}: step {manifest.step} of {manifest.run or checkpoint}; {_of_file(weights, written)}")
    if note := written.get("note"):
        print(note)
    return FINISHED


def _of_file(weights: Weights, written: dict[str, Any]) -> str:
    count = len(weights.tensors)
    return f"{count} tensors, {_size(written['bytes'])}, SHA-256 {written['sha256']}"
