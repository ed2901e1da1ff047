"""The command line: thin, and quick to answer because each command imports what it needs when it runs."""

# PYTHON_ARGCOMPLETE_OK
from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from paperscale import __version__
from paperscale.errors import FAILED, FINISHED, USER_ERROR, UserError, describe, is_users_mistake, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from paperscale.jobs.run import Run

Command = Callable[[argparse.Namespace], int]
_WIDE = 180  # columns of a terminal that hold the table of recipes
_OPEN_ENDED = ("fit", "validate", "test", "predict", "submit")  # take a recipe's keys as options


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors suggest the nearest right name."""

    def error(self, message: str) -> NoReturn:
        """Raise a one-line error."""
        hint = ""
        words = message.replace(",", " ").replace("'", " ").split()
        if message.startswith("unrecognized arguments"):
            known = [option for action in self._actions for option in action.option_strings]
            hint = nearest(words[2], known)
        elif "invalid choice" in message:
            at = words.index("choice:")
            hint = nearest(words[at + 1], [word.strip("()") for word in words[at + 2 :]])
        raise UserError(f"{message.split(' (choose')[0]}{hint}; see `{self.prog} --help`")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        parser = build_parser()
        if "_ARGCOMPLETE" in os.environ:
            import argcomplete

            argcomplete.autocomplete(parser, always_complete_options="long")
        parsed = _parse(parser, words)
        return parsed.run(parsed)
    except BrokenPipeError:  # the reader of a pipe has left, as `| head` does
        sys.stderr.close()
        return FINISHED
    except KeyboardInterrupt:
        return 128 + 2
    except Exception as error:
        if not is_users_mistake(error):
            raise
        print(f"error: {describe(error)}", file=sys.stderr)
        return USER_ERROR


def _parse(parser: Parser, words: list[str]) -> argparse.Namespace:
    """Parse; a recipe's keys may be written as options anywhere (``--trainer.max_epochs 1``)."""
    if words and words[0] in _OPEN_ENDED:
        sys.path[:] = [str(Path.cwd()), *(path for path in sys.path if path)]  # a recipe may name the user's classes
        own = _subparser(parser, words[0])._option_string_actions
        words = [words[0], *_keys_as_words(words[1:], set(own))]
        command = _subparser(parser, words[0])
        namespace = command.parse_intermixed_args(words[1:])
        namespace.words = words
        return namespace
    namespace, unknown = parser.parse_known_args(words)
    if unknown:
        _subparser(parser, words[0]).error(f"unrecognized arguments: {' '.join(unknown)}")
    namespace.words = words
    return namespace


def _subparser(parser: Parser, name: str) -> Parser:
    action = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices[name]


def _keys_as_words(words: list[str], own: set[str]) -> list[str]:
    """Turn options that are not the command's own, ``--key value`` or ``--key=value``, into ``key=value``."""
    turned, rest = [], iter(words)
    for word in rest:
        if not word.startswith("--") or word.partition("=")[0] in own:
            turned.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        if "." not in key and (hint := nearest(f"--{key}", own)):
            raise UserError(f"unknown option --{key}{hint}")
        if not equals:
            value = next(rest, "true")
            if value.startswith("--"):
                raise UserError(f"--{key} needs a value: write {key}=VALUE{nearest(f'--{key}', own)}")
        turned.append(f"{key}={value}")
    return turned


# -- the parser --------------------------------------------------------------------------------------------


def build_parser() -> Parser:
    """Return the parser of all commands."""
    parser = Parser(
        prog="paperscale", description="Train papers on a cluster, and on this machine.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"paperscale {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)

    def add(name: str, run: Command, help: str) -> Parser:
        command = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", allow_abbrev=False)
        command.set_defaults(run=run)
        return command

    _add_training(add)
    _add_jobs(add)
    _add_others(add)
    return parser


def _add_training(add: Callable[[str, Command, str], Parser]) -> None:
    keys = "RECIPE [OVERLAY ...] [key=value ...]"
    fit = add("fit", run_fit, "train a recipe here, in the foreground")
    _recipe_argument(fit, f"{keys}; every key of --print_config can be set, also as --key value", _complete_recipes)
    fit.add_argument("--name", help="name of the run (default: the recipe's)")
    fit.add_argument("--print_config", action="store_true", help="print the resolved configuration and exit")
    for name, what in (("validate", "score the validation split"), ("test", "score the test split")):
        _recipe_argument(
            _checkpoint_option(add(name, run_evaluate, f"{what} with a run's checkpoint")), f"RUN or {keys}"
        )
    predict = add("predict", run_evaluate, "write the predictions of a run's checkpoint for the test split")
    _recipe_argument(_checkpoint_option(predict), f"RUN or {keys}")
    submit = add("submit", run_submit, "submit a recipe to a cluster")
    _recipe_argument(submit, keys, _complete_recipes)
    _shape_options(submit)
    submit.add_argument("--cluster", default="local", help="profile of the cluster (default: local)").completer = (  # type: ignore[attr-defined]
        _complete_clusters
    )
    submit.add_argument("--name", help="name of the run (default: the recipe's)")
    submit.add_argument("--dry-run", action="store_true", help="print the job script; submit nothing")


def _checkpoint_option(parser: Parser) -> Parser:
    parser.add_argument(
        "--checkpoint", type=Path, help="folder of a checkpoint (default: the run's newest that verifies)"
    )
    return parser


def _recipe_argument(parser: Parser, help: str, completer: Callable[..., list[str]] | None = None) -> None:
    completer = completer or _complete_recipes_and_runs
    parser.add_argument("recipe", nargs="+", metavar="RECIPE", help=help).completer = completer  # type: ignore[attr-defined]


def _shape_options(parser: Parser) -> None:
    parser.add_argument("--nodes", type=_positive, help="nodes (default: the profile's)")
    parser.add_argument("--procs-per-node", type=_positive, help="processes on each node (default: one per GPU)")
    parser.add_argument("--gpus-per-node", type=_positive, help="GPUs of each node")
    parser.add_argument("--time", help="time limit of an attempt, such as 02:30:00")


def _position(text: str, least: int = 0) -> int:
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def _positive(text: str) -> int:
    return _position(text, 1)


def _add_jobs(add: Callable[[str, Command, str], Parser]) -> None:
    resume = add("resume", run_resume, "continue a run that was stopped, on the same or another number of nodes")
    _run_argument(resume)
    _shape_options(resume)
    runs = add("runs", run_runs, "list the runs")
    runs.add_argument("--json", action="store_true", help="print JSON")
    status = add("status", run_status, "show what a run is doing")
    _run_argument(status)
    status.add_argument("--json", action="store_true", help="print JSON")
    logs = add("logs", run_logs, "print a run's log")
    _run_argument(logs)
    logs.add_argument("-f", "--follow", action="store_true", help="go on as it grows, into later attempts")
    logs.add_argument("--rank", type=int, default=0, help="rank (default: 0)")
    logs.add_argument("--attempt", type=_positive, help="attempt (default: the last)")
    _run_argument(add("cancel", run_cancel, "end a run for good"))
    drill = add("drill", run_drill, "make a fault happen to a running job, to see it recover")
    _run_argument(drill)
    drill.add_argument(
        "fault",
        choices=["preempt"],
        help="preempt: the signal that a scheduler sends before it takes the nodes",
    )


def _run_argument(parser: Parser) -> None:
    parser.add_argument("run_name", metavar="RUN", help="name of a run, or its path").completer = _complete_runs  # type: ignore[attr-defined]


def _add_others(add: Callable[[str, Command, str], Parser]) -> None:
    recipes = add("recipes", run_recipes, "list the recipes, the papers' numbers and ours")
    recipes.add_argument("--json", action="store_true", help="print JSON")
    recipes.add_argument("--markdown", action="store_true", help="print the table of the README")
    data = add("data", lambda _: FAILED, "prepare and check shards")
    actions = data.add_subparsers(title="actions", metavar="ACTION", required=True, parser_class=Parser)
    prepare = actions.add_parser("prepare", help="fetch a data set and write its shards", allow_abbrev=False)
    dataset = prepare.add_argument("dataset", metavar="NAME", nargs="?", help="for example mnist; see --list")
    dataset.completer = _complete_datasets  # type: ignore[attr-defined]
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
    prepare.add_argument("--vocab-size", type=_positive, metavar="N", help="tokens of a tokenizer that is trained")
    prepare.add_argument("--shard-mb", type=_positive, metavar="MB", default=128, help="size of a shard (default 128)")
    prepare.set_defaults(run=run_prepare)
    _add_data_actions(actions)
    _add_bench(add("bench", lambda _: FAILED, "measure Paperscale beside its peers"))
    doctor = add("doctor", run_doctor, "check this machine and its cluster, each finding with its fix")
    doctor.add_argument("--cluster", help="profile that must work").completer = _complete_clusters  # type: ignore[attr-defined]
    doctor.add_argument("--data", type=Path, help="set of shards to verify")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    demo = add("demo", run_demo, "see it all: prepare MNIST, submit, interrupt, resume, finish")
    demo.add_argument("--cluster", default="local", help="local, or the profile of a SLURM cluster")
    completion = add(
        "completion",
        run_completion,
        'print the shell\'s completion script: eval "$(paperscale completion bash)"',
    )
    completion.add_argument("shell", choices=["bash", "zsh", "fish"])


def _add_bench(bench: Parser) -> None:
    actions = bench.add_subparsers(title="benchmarks", metavar="WHAT", required=True, parser_class=Parser)
    data = actions.add_parser("data", help="data loaders, all on the same samples", allow_abbrev=False)
    data.add_argument("--setup", action="store_true", help="install the peers first, in environments of their own")
    data.add_argument("--only", metavar="WORK,...", help="some of the works, for example raw,tokens,decode")
    data.add_argument("--peers", metavar="PEER,...", help="some of the peers, for example ours,folder,webdataset")
    data.add_argument("--rounds", type=_positive, default=5, help="rounds of every measurement (default 5)")
    data.add_argument("--quick", action="store_true", help="little data, one short round: does it work?")
    data.add_argument("--json", action="store_true", help="print the results as JSON instead of tables")
    data.add_argument("--out", type=Path, metavar="DIR", help="write data.md and data.json there")
    data.set_defaults(run=run_bench_data)


def _add_data_actions(actions: Any) -> None:
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
    show.add_argument("--count", type=_positive, default=24, help="samples to show (default 24)")
    show.add_argument("--start", type=_position, default=0, help="number of the first sample (default 0)")
    show.add_argument("--seed", type=int, help="in the order of the first epoch of this seed, instead of as written")
    show.add_argument("--out", type=Path, help="file of the contact sheet (default: NAME-SPLIT.png)")


def _complete_datasets(prefix: str, **_: Any) -> list[str]:
    from paperscale.data.prepare import DATASETS

    return list(DATASETS)


def _complete_recipes(prefix: str, **_: Any) -> list[str]:
    from paperscale.recipes import all_recipes

    return list(all_recipes())


def _complete_recipes_and_runs(prefix: str, **_: Any) -> list[str]:
    return _complete_recipes(prefix) + _complete_runs(prefix)


def _complete_runs(prefix: str, **_: Any) -> list[str]:
    from paperscale.jobs.run import all_runs

    return [run.name for run in all_runs()]


def _complete_clusters(prefix: str, **_: Any) -> list[str]:
    from paperscale.jobs.profile import all_profiles

    return list(all_profiles())


# -- training ----------------------------------------------------------------------------------------------


def run_fit(args: argparse.Namespace) -> int:
    """Train here."""
    from paperscale.recipes import RecipeArguments

    recipe = RecipeArguments.parse(args.recipe)
    if args.print_config:
        from paperscale.training.recipe import RecipeCLI

        print(RecipeCLI(recipe.to_cli(), build=False).resolved())
        return FINISHED
    from paperscale.jobs.foreground import fit

    return fit(recipe, args.name, _typed(args))


def run_evaluate(args: argparse.Namespace) -> int:
    """Validate, test or predict."""
    from paperscale.jobs import snapshot
    from paperscale.jobs.run import find_run, runs_dir
    from paperscale.recipes import RecipeArguments, all_recipes

    stage, first, rest = args.words[0], args.recipe[0], args.recipe[1:]
    is_run = (runs_dir() / first / "run.json").exists()
    is_recipe = not is_run and (first in all_recipes() or first.endswith((".yaml", ".yml")))
    run = None if is_recipe else find_run(first)
    source = [str(run.recipe)] if run else [first]
    if run:
        snapshot.use(run.path / "code", Path(run.info.workdir))
    from paperscale.jobs.evaluate import evaluate

    found = evaluate(stage, run, RecipeArguments.parse(source + rest).to_cli(), args.checkpoint)
    for name, value in found.items():
        print(f"{name:16} {value:.4f}" if isinstance(value, float) else f"{name:16} {value}")
    return FINISHED


def run_submit(args: argparse.Namespace) -> int:
    """Submit a job."""
    from paperscale.jobs.submit import Shape, submit
    from paperscale.recipes import RecipeArguments

    shape = Shape(args.cluster, args.nodes, args.procs_per_node, args.gpus_per_node, args.time)
    recipe = RecipeArguments.parse(args.recipe)
    result = submit(recipe, shape, args.name, args.dry_run, _typed(args))
    if isinstance(result, str):
        print(result, end="")
        return FINISHED
    print(f"submitted {result.name} to {args.cluster} as job {result.job}")
    print(f"  paperscale logs {result.name} -f      follow it")
    print(f"  paperscale status {result.name}       see how far it is")
    return FINISHED


def _typed(args: argparse.Namespace) -> str:
    return shlex.join(["paperscale", *args.words])


# -- jobs --------------------------------------------------------------------------------------------------


def _run(args: argparse.Namespace) -> Run:
    from paperscale.jobs.run import find_run

    return find_run(args.run_name)


def run_resume(args: argparse.Namespace) -> int:
    """Continue a stopped run."""
    from paperscale.jobs.resume import resume
    from paperscale.jobs.submit import Shape

    run = _run(args)
    asked = Shape(
        nodes=args.nodes, procs_per_node=args.procs_per_node, gpus_per_node=args.gpus_per_node, time=args.time
    )
    code = resume(run, asked)
    if code is None:
        print(f"resumed {run.name} as job {run.job}; follow it with `paperscale logs {run.name} -f`")
        return FINISHED
    return code


def run_runs(args: argparse.Namespace) -> int:
    """List the runs."""
    from paperscale.jobs.run import all_runs, runs_dir
    from paperscale.jobs.status import status

    found = [(run, status(run)) for run in all_runs()]
    if args.json:
        rows = [{"name": run.name, "state": now.state, **now.progress, "results": now.results} for run, now in found]
        print(json.dumps(rows, indent=1))
        return FINISHED
    if not found:
        print(f"no runs in {runs_dir()}; `paperscale submit resnet20-mnist` makes one")
        return FINISHED
    rows_text = []
    for run, now in found:
        p, info = now.progress, run.info
        shape = f"{info.cluster} {info.nodes} x {info.procs_per_node}"
        step = f"{p['step']}/{p['total_steps']}" if p else "-"
        score = ", ".join(f"{k} {v:.4f}" for k, v in now.results.items() if k.startswith("test/"))
        rows_text.append((run.name, now.state, shape, str(len(run.attempts())), step, score or now.detail))
    _table(["run", "state", "cluster", "attempts", "step", "result or reason"], rows_text)
    return FINISHED


def run_status(args: argparse.Namespace) -> int:
    """Show one run."""
    from paperscale.jobs.status import status
    from paperscale.training.checkpoint import all_checkpoints

    run = _run(args)
    now, info, attempts = status(run), run.info, run.attempts()
    newest = all_checkpoints(run.checkpoints)
    facts: dict[str, Any] = {
        "run": run.name,
        "state": now.state,
        "detail": now.detail,
        "job": run.job,
        "cluster": info.cluster,
        "processes": f"{info.nodes} x {info.procs_per_node}",
        "attempts": len(attempts),
        "checkpoint": newest[0].name if newest else None,
        "wandb id": info.wandb_id,
        "directory": str(run.path),
    }
    if now.progress:
        p = now.progress
        facts |= {
            "step": f"{p['step']}/{p['total_steps']}",
            "epoch": p["epoch"],
            "samples": p["consumed"],
            "loss": p["loss"],
            "samples/s": p["samples_per_s"],
        }
        if now.state == "running":
            facts |= {"left": f"{p['eta_s']} s", "heartbeat": f"{time.time() - p['time']:.0f} s ago"}
    facts |= {name: value for name, value in now.results.items() if "/" in name}
    if args.json:
        print(json.dumps(facts, indent=1))
        return FINISHED
    for name, value in facts.items():
        if value not in (None, ""):
            print(f"{name:14} {value:.4f}" if isinstance(value, float) else f"{name:14} {value}")
    return FINISHED


def run_logs(args: argparse.Namespace) -> int:
    """Print a log."""
    from paperscale.jobs.status import print_log

    print_log(_run(args), args.rank, args.attempt, args.follow)
    return FINISHED


def run_cancel(args: argparse.Namespace) -> int:
    """Cancel a run."""
    from paperscale.jobs.status import cancel

    run = _run(args)
    cancel(run)
    print(f"cancelled {run.name}; its checkpoints stay in {run.checkpoints}")
    return FINISHED


def run_drill(args: argparse.Namespace) -> int:
    """Preempt a running job."""
    from paperscale.jobs.drill import preempt

    print(preempt(_run(args)))
    return FINISHED


# -- others ------------------------------------------------------------------------------------------------


def run_recipes(args: argparse.Namespace) -> int:
    """List the recipes."""
    from paperscale.recipes import all_recipes, header

    headers = [header(path) for path in all_recipes().values()]
    if args.json:
        listed = [
            {"name": h.name, "title": h.title, "source": h.source, "data": h.dataset, **h.fields} for h in headers
        ]
        print(json.dumps(listed, indent=1))
        return FINISHED
    console = _console()
    columns = ["recipe", "paper", "dataset", "hardware", "command", "paper's number", "our number"]
    rows = [
        [
            h.name,
            f"{h.title}. {h.source}",
            h.dataset,
            *(h.fields[f] for f in ("needs", "run", "paper", "measured")),
        ]
        for h in headers
    ]
    if args.markdown:
        for row in [columns, ["---"] * len(columns), *rows]:
            print(f"| {' | '.join(row)} |")
    elif console.width >= _WIDE:
        _table(columns, rows)
    else:
        for name, *values in rows:
            console.print(f"[bold]{name}")
            for column, value in zip(columns[1:], values, strict=True):
                console.print(f"  {column:15} {value}", highlight=False, markup=False)
    return FINISHED


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
        _console(),
        source=args.source,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        shard_mb=args.shard_mb,
    )
    print(f"{out} holds {_splits(manifest)}")
    return FINISHED


def _print_datasets(rows: list[Any]) -> None:
    """Print what can be prepared: what is fetched first, then what needs the user's files."""
    from rich.table import Table

    fetched = [row for row in rows if not row.source or row.source.startswith("or ")]
    console = _console()
    for title, some in (("Fetched", fetched), ("From official files, --source", [r for r in rows if r not in fetched])):
        table = Table("name", "what", "size", title=title, title_justify="left", box=None, pad_edge=False)
        for row in some:
            table.add_row(
                row.name, row.what + (f" [dim]--source {row.source}[/]" if row not in fetched else ""), row.size
            )
        console.print(table, "")


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
    with byte_progress(_console(), f"indexing {folder}", total) as done:
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
    with byte_progress(_console(), f"verifying {args.folder}", total) as done:
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


def run_bench_data(args: argparse.Namespace) -> int:
    """Measure the data loaders."""
    from paperscale.bench.run import run

    return run(args)


def run_doctor(args: argparse.Namespace) -> int:
    """Check the machine: exit 0 all well, 1 with warnings, 2 with failures."""
    from paperscale.doctor import checks

    found = list(checks(args.cluster, args.data))
    if args.json:
        print(json.dumps([vars(check) for check in found], indent=1))
    else:
        for check in found:
            print(f"{check.level:5} {check.name:13} {check.found}" + (f"\n      -> {check.fix}" if check.fix else ""))
    levels = {check.level for check in found}
    return 2 if "FAIL" in levels else 1 if "WARN" in levels else 0


def run_demo(args: argparse.Namespace) -> int:
    """Run the demonstration."""
    from paperscale.demo import demo

    return demo(args.cluster)


def run_completion(args: argparse.Namespace) -> int:
    """Print the completion script."""
    import argcomplete

    print(argcomplete.shellcode(["paperscale"], shell=args.shell))
    return FINISHED


def _console() -> Console:
    from rich.console import Console

    return Console()


def _table(columns: list[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    _console().print(table)
