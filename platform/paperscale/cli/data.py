"""``paperscale data``: prepare, index, verify, info and show shards."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from paperscale.cli.options import (
    Add,
    Command,
    Parser,
    complete_datasets,
    console,
    position,
    positive,
)
from paperscale.errors import FAILED, FINISHED, UserError


def add_commands(add: Add) -> None:
    """Add the commands."""
    data = add("data", lambda _: FAILED, "prepare and check shards")
    actions = data.add_subparsers(title="actions", metavar="ACTION", required=True, parser_class=Parser)
    prepare = actions.add_parser("prepare", help="fetch a data set and write its shards", allow_abbrev=False)
    dataset = prepare.add_argument("dataset", metavar="NAME", nargs="?", help="for example mnist; see --list")
    dataset.completer = complete_datasets  # type: ignore[attr-defined]
    prepare.add_argument("--list", action="store_true", help="show what there is")
    prepare.add_argument("--out", type=Path, help="folder of the set (default: data/NAME)")
    prepare.add_argument(
        "--source",
        action="append",
        type=Path,
        metavar="PATH",
        default=[],
        help="the set's official files, where they cannot be fetched; may be given several times",
    )
    prepare.add_argument(
        "--tokenizer",
        metavar="KIND",
        help="bpe, shared-bpe, wordpiece, wordpiece-cased, words, bytes or a tokenizer.json",
    )
    prepare.add_argument("--vocab-size", type=positive, metavar="N", help="tokens of a tokenizer that is trained")
    prepare.add_argument("--shard-mb", type=positive, metavar="MB", default=128, help="size of a shard (default 128)")
    prepare.set_defaults(run=run_prepare)
    _add_actions(actions)


def _add_actions(actions: Any) -> None:
    def add(name: str, run: Command, what: str) -> Parser:
        action = actions.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".", allow_abbrev=False)
        action.add_argument("folder", metavar="DIR", help="the set: a folder, or a URL")
        action.set_defaults(run=run)
        return action

    index = add("index", run_index, "make anybody's WebDataset shards a set, without changing them")
    index.add_argument(
        "--split",
        action="append",
        metavar="NAME=PATTERN",
        help="tars of a split, for example 'train=train-{000000..001023}.tar' (default: by the names of the tars)",
    )
    index.add_argument("--fields", help="members to index, for example jpg,cls (default: all)")
    index.add_argument(
        "--missing",
        choices=["refuse", "drop", "keep"],
        default="refuse",
        help="samples that lack a field: refuse the shard, drop them from the index, or keep them without the field",
    )
    index.add_argument(
        "--length", action="append", metavar="NAME=FIELD.npy", help="a length to make batches by: rows of an array"
    )
    index.add_argument("--classes", type=Path, metavar="FILE", help="names of the labels, a line each")
    index.add_argument("--out", type=Path, help="folder for indexes and manifest, where DIR cannot be written to")
    verify = add("verify", run_verify, "check every shard against its hash and its index")
    verify.add_argument("--deep", action="store_true", help="decode every sample too")
    verify.add_argument("--json", action="store_true", help="print the report as JSON")
    info = add("info", run_info, "say what a set holds")
    info.add_argument("--json", action="store_true", help="print the manifest")
    show = add("show", run_show, "look at samples: a contact sheet of pictures, or decoded text")
    show.add_argument("--split", default="train")
    show.add_argument("--count", type=positive, default=24, help="samples to show (default 24)")
    show.add_argument("--start", type=position, default=0, help="number of the first sample (default 0)")
    show.add_argument("--seed", type=int, help="in the order of the first epoch of this seed, instead of as written")
    show.add_argument("--out", type=Path, help="file of the contact sheet (default: NAME-SPLIT.png)")


def run_prepare(args: argparse.Namespace) -> int:
    """Prepare a data set."""
    from paperscale.data.prepare import describe, prepare

    if args.list:
        _print_datasets(describe())
        return FINISHED
    if args.dataset is None:
        raise UserError("name a data set; `paperscale data prepare --list` shows what there is")
    out = args.out or Path("data") / args.dataset
    manifest = prepare(
        args.dataset,
        out,
        console(),
        source=args.source,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        shard_mb=args.shard_mb,
    )
    if args.out is None and not (out.parent / ".gitignore").exists():
        (out.parent / ".gitignore").write_text("*\n")  # shards are not code: jobs do not copy them
    print(f"{out} holds {_splits(manifest)}")
    return FINISHED


def _print_datasets(rows: list[Any]) -> None:
    """Print what can be prepared: what is fetched first, then what needs the user's files."""
    from rich.table import Table

    fetched = [row for row in rows if not row.source or row.source.startswith("or ")]
    terminal = console()
    for title, some in (("Fetched", fetched), ("From official files, --source", [r for r in rows if r not in fetched])):
        table = Table("name", "what", "size", title=title, title_justify="left", box=None, pad_edge=False)
        for row in some:
            table.add_row(
                row.name, row.what + (f" [dim]--source {row.source}[/]" if row not in fetched else ""), row.size
            )
        terminal.print(table, "")


def run_index(args: argparse.Namespace) -> int:
    """Adopt WebDataset shards."""
    from paperscale.data.adopt import adopt, find_tars
    from paperscale.data.index import Rules
    from paperscale.progress import byte_progress

    folder = Path(args.folder)
    splits: dict[str, list[str]] = {}
    for split, pattern in _pairs(args.split or [], "--split", "train=PATTERN"):
        splits.setdefault(split, []).append(pattern)
    lengths = dict(_pairs(args.length or [], "--length", "tokens=tokens.npy"))
    rules = Rules(args.fields.split(",") if args.fields else None, args.missing, lengths)
    classes = _lines_of(args.classes) if args.classes else None
    total = sum(tar.stat().st_size for tars in find_tars(folder, splits or None).values() for tar in tars)
    with byte_progress(console(), f"indexing {folder}", total) as done:
        adopted = adopt(folder, splits or None, rules, out=args.out, classes=classes, progress=done)
    shards = sum(map(len, adopted.manifest.splits.values()))
    print(f"{args.out or folder}: {shards} shards, {_splits(adopted.manifest)}; fields {', '.join(adopted.fields)}")
    for split, count in adopted.incomplete.items():
        if count:
            print(f"{split}: {count:,} samples lack a field: {'left out' if args.missing == 'drop' else 'kept'}")
    for split, count in adopted.duplicates.items():
        if count:
            print(f"WARNING {split}: {count:,} keys occur in more than one shard; all their samples are kept")
    return FINISHED


def _lines_of(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--classes {path}: {getattr(error, 'strerror', error)}; name a text file, a class a line"
        ) from error


def _pairs(words: list[str], option: str, example: str) -> list[list[str]]:
    for word in words:
        if "=" not in word:
            raise UserError(f"{option} {word}: write NAME=VALUE, for example {option} {example}")
    return [word.split("=", 1) for word in words]


def run_verify(args: argparse.Namespace) -> int:
    """Verify a set."""
    from dataclasses import asdict

    from paperscale.data.shards import read_manifest
    from paperscale.data.verify import verify
    from paperscale.progress import byte_progress

    total = sum(shard.bytes for _, shard in read_manifest(args.folder).shards())
    with byte_progress(console(), f"verifying {args.folder}", total) as done:
        report = verify(args.folder, done, deep=args.deep)
    if args.json:
        print(json.dumps(asdict(report), indent=1))
        return FAILED if report.problems else FINISHED
    for problem in report.problems:
        print(problem)
    what = f"{report.shards} shards, {report.samples:,} samples, {report.bytes / 1e6:,.1f} MB"
    what += f", {report.decoded:,} samples decoded" if args.deep else ""
    if report.problems:
        print(f"{args.folder} is damaged: {len(report.problems)} problems in {what}; copy or prepare the set again")
    else:
        print(f"{args.folder} is complete and as it was written: {what}")
    return FAILED if report.problems else FINISHED


def run_info(args: argparse.Namespace) -> int:
    """Say what a set holds."""
    from paperscale.data.shards import read_manifest

    manifest = read_manifest(args.folder)
    if args.json:
        print(manifest.to_json(), end="")
        return FINISHED
    print(f"{manifest.provenance.get('title', manifest.name)}: {_splits(manifest)}")
    for split, shards in manifest.splits.items():
        sums = "".join(f", {sum(shard.lengths.get(name, 0) for shard in shards):,} {name}" for name in manifest.lengths)
        size = sum(shard.bytes for shard in shards) / 1e6
        print(f"  {split:8} {len(shards)} shards, {sum(s.samples for s in shards):,} samples, {size:,.1f} MB{sums}")
    facts = {
        "fields": ", ".join(f"{name} ({what})" if what else name for name, what in manifest.schema.items()),
        "image": ", ".join(f"{name} {value}" for name, value in manifest.image.items()),
        "classes": f"{len(manifest.classes)}: {', '.join(manifest.classes[:20])}" if manifest.classes else "",
        "files": ", ".join(manifest.files),
        **{name: str(value) for name, value in manifest.provenance.items() if name != "title"},
    }
    for name, value in facts.items():
        if value:
            print(f"{name:9} {value}")
    return FINISHED


def run_show(args: argparse.Namespace) -> int:
    """Show samples."""
    from paperscale.data.show import show

    sheet = args.out or Path(f"{Path(args.folder).name}-{args.split}.png")
    for line in show(args.folder, args.split, args.count, args.start, args.seed, sheet):
        print(line)
    return FINISHED


def _splits(manifest: Any) -> str:
    """Return the sizes of a set's splits, of text in documents: its WebDataset samples are chunks of them."""
    unit = "documents" if "documents" in manifest.lengths else "samples"
    sizes = {
        name: sum(shard.lengths["documents"] if unit == "documents" else shard.samples for shard in shards)
        for name, shards in manifest.splits.items()
    }
    return ", ".join(f"{name} {size:,}" for name, size in sizes.items()) + f" {unit}"
