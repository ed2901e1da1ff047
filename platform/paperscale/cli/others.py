"""Commands about this installation: recipes, bench, doctor, demo, completion."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from paperscale.cli.options import (
    Add,
    Command,
    Parser,
    complete_clusters,
    console,
    positive,
    print_table,
)
from paperscale.errors import FAILED, FINISHED

_WIDE = 180  # columns of a terminal that hold the table of recipes


def add_commands(add: Add) -> None:
    """Add the commands."""
    recipes = add("recipes", run_recipes, "list the recipes, the papers' numbers and ours")
    recipes.add_argument("--json", action="store_true", help="print JSON")
    recipes.add_argument("--markdown", action="store_true", help="print the table of the README")
    _add_bench(add("bench", lambda _: FAILED, "measure Paperscale beside its peers"))
    doctor = add("doctor", run_doctor, "check this machine and its cluster, each finding with its fix")
    doctor.add_argument("--cluster", help="profile that must work").completer = complete_clusters  # type: ignore[attr-defined]
    doctor.add_argument("--data", metavar="DIR", help="set of shards to verify, a folder or a URL")
    doctor.add_argument("--quick", action="store_true", help="leave out imports, speeds and W&B's server")
    doctor.add_argument("--build", action="store_true", help="compile DeepSpeed's operators for this machine first")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.epilog = "Exit code: 0 if all is well, 1 with warnings, 2 with failures."
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
    data.add_argument("--rounds", type=positive, default=5, help="rounds of every measurement (default 5)")
    data.add_argument("--quick", action="store_true", help="little data, one short round: does it work?")
    data.add_argument("--json", action="store_true", help="print the results as JSON instead of tables")
    data.add_argument("--out", type=Path, metavar="DIR", help="write data.md and data.json there")
    data.set_defaults(run=run_bench_data)
    help = "what it costs at each step that a training can be interrupted"
    interruption = _in_turns(actions, "interruption", help, 15, "one round of 20 steps", run_bench_interruption)
    interruption.add_argument("--steps", type=positive, default=200, help="steps of a training (default 200)")
    help = "what a framework and its metrics add to a training step"
    step = _in_turns(actions, "step", help, 9, "one round of 3 steps", run_bench_step)
    step.add_argument("--works", metavar="WORK,...", help="some of tiny,resnet20,transformer")
    step.add_argument("--ranks", metavar="N,...", help="some of 1,2: how many ranks")
    help = "images per second of ResNet's training, beside a hand-written loop"
    train = _in_turns(actions, "train", help, 3, "one round of 3 steps on small images", run_bench_train)
    train.add_argument("--networks", metavar="NETWORK,...", help="default on a GPU resnet50,resnet152, else resnet18")
    train.add_argument("--batch-sizes", metavar="N,...", help="default on a GPU 128,256, else 16")
    help = "tokens per second of BERT's pre-training, beside transformers and a hand-written loop"
    bert = _in_turns(actions, "bert", help, 3, "one round of 3 steps of few sequences", run_bench_bert)
    bert.add_argument(
        "--works",
        metavar="WORK,...",
        help="some of tiny-128,small-128,base-128,large-128,large-512 (default on a GPU the last two, else the first)",
    )
    bert.add_argument("--precision", metavar="NAME", help="32-true or bf16-mixed (default on a GPU the latter)")
    help = "what writing a divided checkpoint's weights as one file takes"
    consolidate = actions.add_parser("consolidate", help=help, allow_abbrev=False)
    consolidate.add_argument(
        "--parameters", type=positive, default=1_000_000_000, metavar="N", help="of the model (default 1,000,000,000)"
    )
    consolidate.add_argument("--shards", type=positive, default=4, metavar="N", help="files of it (default 4)")
    consolidate.add_argument("--folder", type=Path, metavar="DIR", help="where there is room for 9 N bytes")
    consolidate.add_argument("--json", action="store_true", help="print JSON")
    consolidate.set_defaults(run=run_bench_consolidate)
    help = "how long a training waits for a checkpoint"
    _in_turns(actions, "checkpoint", help, 5, "one round of a small model", run_bench_checkpoint)


def _in_turns(actions: Any, name: str, help: str, rounds: int, quick: str, run: Command) -> Parser:
    """Add a benchmark whose ways take turns."""
    parser: Parser = actions.add_parser(name, help=help, allow_abbrev=False)
    parser.add_argument("--rounds", type=positive, default=rounds, help=f"rounds of every way (default {rounds})")
    parser.add_argument("--quick", action="store_true", help=f"{quick}: does it work?")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of tables")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"write {name}.md and {name}.json there")
    parser.set_defaults(run=run)
    return parser


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
    terminal = console()
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
    elif terminal.width >= _WIDE:
        print_table(columns, rows)
    else:
        for name, *values in rows:
            terminal.print(f"[bold]{name}")
            for column, value in zip(columns[1:], values, strict=True):
                terminal.print(f"  {column:15} {value}", highlight=False, markup=False)
    return FINISHED


def run_bench_data(args: argparse.Namespace) -> int:
    """Measure the data loaders."""
    from paperscale.bench.run import run

    return run(args)


def run_bench_interruption(args: argparse.Namespace) -> int:
    """Measure what agreement on a stop costs."""
    from paperscale.bench.interruption import run

    return run(args)


def run_bench_step(args: argparse.Namespace) -> int:
    """Measure what is added to a step."""
    from paperscale.bench.step import run

    return run(args)


def run_bench_train(args: argparse.Namespace) -> int:
    """Measure how fast ResNets train."""
    from paperscale.bench.train import run

    return run(args)


def run_bench_bert(args: argparse.Namespace) -> int:
    """Measure how fast BERT is pre-trained."""
    from paperscale.bench.bert import run

    return run(args)


def run_bench_consolidate(args: argparse.Namespace) -> int:
    """Measure the writing of one file."""
    from paperscale.bench.consolidate import run

    return run(args)


def run_bench_checkpoint(args: argparse.Namespace) -> int:
    """Measure what a training waits for a checkpoint."""
    from paperscale.bench.checkpoint import run

    return run(args)


def run_doctor(args: argparse.Namespace) -> int:
    """Check the machine: exit 0 all well, 1 with warnings, 2 with failures."""
    from paperscale.doctor import Asked, checks
    from paperscale.findings import print_findings

    if args.build:
        from paperscale.training.operators import build_useful

        build_useful(lambda line: print(line, file=sys.stderr, flush=True))
    return print_findings(checks(Asked(args.cluster, args.data, args.quick)), args.json)


def run_demo(args: argparse.Namespace) -> int:
    """Run the demonstration."""
    from paperscale.demo import demo

    return demo(args.cluster)


def run_completion(args: argparse.Namespace) -> int:
    """Print the completion script."""
    import argcomplete

    print(argcomplete.shellcode(["paperscale"], shell=args.shell))
    return FINISHED
