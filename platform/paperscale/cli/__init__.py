"""The command line: thin, and quick to answer because each command imports what it needs when it runs."""

# PYTHON_ARGCOMPLETE_OK
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from paperscale import __version__
from paperscale.cli import checkpoints, cluster, data, estimate, jobs, others, report, training
from paperscale.cli.options import Command, Parser
from paperscale.errors import FINISHED, USER_ERROR, UserError, describe, is_users_mistake, nearest

_OPEN_ENDED = (
    "fit",
    "validate",
    "test",
    "predict",
    "generate",
    "submit",
    "resume",
    "lr-find",
    "estimate",
)  # take a recipe's keys as options


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

    for module in (training, estimate, jobs, report, checkpoints, cluster, data, others):
        module.add_commands(add)
    return parser
