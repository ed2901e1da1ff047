"""What commands share: the parser, arguments, completion, output."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from paperscale.errors import UserError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from paperscale.jobs.run import Run

_WAIT_S = 120
_FEW = 8  # choices that an error names
Command = Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors suggest the nearest right name.

    Attributes:
        on_unknown: what to say of a choice, ``{}``, that is like none.
    """

    on_unknown = ""

    def error(self, message: str) -> NoReturn:
        """Raise a one-line error."""
        hint = ""
        words = message.replace(",", " ").replace("'", " ").split()
        if message.startswith("unrecognized arguments"):
            known = [option for action in self._actions for option in action.option_strings]
            hint = nearest(words[2], known)
        elif "invalid choice" in message:
            at = words.index("choice:")
            stripped = (word.strip("()") for word in words[at + 2 :])
            choices = [word for word in stripped if word not in ("choose", "from", "")]
            hint = nearest(words[at + 1], choices) or self.on_unknown.format(words[at + 1])
            hint = hint or (f"; choose {', '.join(choices)}" if len(choices) <= _FEW else "")
        raise UserError(f"{message.split(' (choose')[0]}{hint}; see `{self.prog} --help`")


Add = Callable[[str, Command, str], Parser]


def recipe_argument(parser: Parser, help: str, completer: Callable[..., list[str]] | None = None) -> None:
    """Add a recipe with its overlays and keys."""
    completer = completer or complete_recipes_and_runs
    parser.add_argument("recipe", nargs="+", metavar="RECIPE", help=help).completer = completer  # type: ignore[attr-defined]


def run_argument(parser: Parser, name: str = "run_name", metavar: str = "RUN") -> None:
    """Add the name of a run."""
    parser.add_argument(name, metavar=metavar, help="name of a run, or its path").completer = complete_runs  # type: ignore[attr-defined]


def shape_options(parser: Parser) -> None:
    """Add what a job asks of its cluster."""
    parser.add_argument("--nodes", type=positive, help="nodes (default: the profile's)")
    parser.add_argument("--procs-per-node", type=positive, help="processes on each node (default: one per GPU)")
    parser.add_argument("--gpus-per-node", type=positive, help="GPUs of each node")
    parser.add_argument("--time", help="time limit of an attempt, such as 02:30:00")


def strategy_option(parser: Parser, default: str = "the recipe's") -> None:
    """Add the strategy."""
    from paperscale.training.strategies import NAMES

    help = f"how processes share the work (default: {default}): {', '.join(NAMES)}"
    parser.add_argument("--strategy", metavar="NAME", help=help).completer = complete_strategies  # type: ignore[attr-defined]


def with_strategy(words: list[str], args: argparse.Namespace) -> list[str]:
    """Return the recipe's words with the strategy that was asked for by its option."""
    return [*words, f"trainer.strategy={args.strategy}"] if args.strategy else words


def wait_option(parser: Parser, what: str) -> None:
    """Add how long to wait, and whether to print JSON."""
    parser.add_argument(
        "--timeout", type=positive, default=_WAIT_S, metavar="S", help=f"seconds to wait for {what} (default {_WAIT_S})"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def tell(line: str) -> None:
    """Say what is waited for, without mixing it into the output."""
    print(line, file=sys.stderr, flush=True)


def position(text: str, least: int = 0) -> int:
    """Return a whole number of at least ``least``."""
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def positive(text: str) -> int:
    """Return a whole number of at least 1."""
    return position(text, 1)


def complete_datasets(prefix: str, **_: Any) -> list[str]:
    """Return the names of data sets."""
    from paperscale.data.prepare import DATASETS

    return list(DATASETS)


def complete_recipes(prefix: str, **_: Any) -> list[str]:
    """Return the names of recipes."""
    from paperscale.recipes import all_recipes

    return list(all_recipes())


def complete_recipes_and_runs(prefix: str, **_: Any) -> list[str]:
    """Return the names of recipes and runs."""
    return complete_recipes(prefix) + complete_runs(prefix)


def complete_runs(prefix: str, **_: Any) -> list[str]:
    """Return the names of runs."""
    from paperscale.jobs.run import all_runs

    return [run.name for run in all_runs()]


def complete_groups(prefix: str, **_: Any) -> list[str]:
    """Return the names of sweeps."""
    from paperscale.jobs.run import all_runs, read_json

    infos = (read_json(run.path / "run.json") for run in all_runs())
    return sorted({info["group"] for info in infos if info.get("group")})


def complete_states(prefix: str, **_: Any) -> list[str]:
    """Return the states of runs, each after those that are given already."""
    from paperscale.jobs.status import STATES

    given = prefix.rpartition(",")[0]
    return [f"{given},{state}" if given else state for state in STATES]


def complete_strategies(prefix: str, **_: Any) -> list[str]:
    """Return the names of strategies."""
    from paperscale.training.strategies import NAMES

    return list(NAMES)


def complete_clusters(prefix: str, **_: Any) -> list[str]:
    """Return the names of profiles."""
    from paperscale.jobs.profile import all_profiles

    return list(all_profiles())


def typed(args: argparse.Namespace) -> str:
    """Return what the user typed."""
    return shlex.join(["paperscale", *args.words])


def find(args: argparse.Namespace) -> Run:
    """Return the run that is named."""
    from paperscale.jobs.run import find_run

    return find_run(args.run_name)


def console() -> Console:
    """Return the terminal."""
    from rich.console import Console

    return Console()


def print_table(columns: list[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def print_json(content: Any) -> None:
    """Print JSON as every reader takes it: a number that is not finite, which JSON has not, becomes null."""
    print(json.dumps(_finite(content), indent=1))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
