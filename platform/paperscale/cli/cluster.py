"""``paperscale cluster``: profiles of clusters."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from paperscale.cli.options import Add, Command, Parser, complete_clusters, print_table
from paperscale.errors import FAILED, FINISHED, UserError


def add_commands(add: Add) -> None:
    """Add the commands."""
    cluster = add("cluster", lambda _: FAILED, "propose, check and list profiles of clusters")
    actions = cluster.add_subparsers(title="actions", metavar="ACTION", required=True, parser_class=Parser)
    init = _action(actions, "init", run_init, "propose a profile from what SLURM tells, and write it")
    init.add_argument("profile", metavar="NAME", nargs="?", help="name of the profile (default: the cluster's)")
    init.add_argument("--partition", help="partition (default: the cluster's default)")
    init.add_argument(
        "--out", type=Path, metavar="FILE", help="file (default: ~/.config/paperscale/profiles/NAME.yaml)"
    )
    init.add_argument("--force", action="store_true", help="replace the file if there is one")
    check = _action(actions, "check", run_check, "compare a profile with its cluster, each finding with its fix")
    check.add_argument("profile", metavar="NAME", help="name of the profile").completer = complete_clusters  # type: ignore[attr-defined]
    check.add_argument("--json", action="store_true", help="print JSON")
    listing = _action(actions, "list", run_list, "list the profiles and where each comes from")
    listing.add_argument("--json", action="store_true", help="print JSON")


def _action(actions: Any, name: str, run: Command, what: str) -> Parser:
    action = actions.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".", allow_abbrev=False)
    action.set_defaults(run=run)
    return action


def run_init(args: argparse.Namespace) -> int:
    """Propose a profile."""
    from paperscale.jobs.proposal import propose, write

    if args.profile and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", args.profile):
        raise UserError(f"profile name {args.profile!r}: use letters, digits, '.', '_' and '-'")
    name, text = propose(args.profile, args.partition)
    path = write(name, text, args.out, args.force)
    print(text)
    print(f"written to {path}")
    print(f"  paperscale cluster check {name}              compare it with the cluster")
    print(f"  paperscale submit RECIPE --cluster {name}    use it")
    return FINISHED


def run_check(args: argparse.Namespace) -> int:
    """Check a profile: exit 0 all well, 1 with warnings, 2 with failures."""
    from paperscale.findings import print_findings
    from paperscale.jobs import profile as profiles
    from paperscale.jobs.cluster import check

    return print_findings(check(profiles.load(args.profile)), args.json)


def run_list(args: argparse.Namespace) -> int:
    """List the profiles; one that cannot be read says why."""
    from paperscale.jobs import profile as profiles

    rows: list[dict[str, Any]] = []
    for name, path in profiles.all_profiles().items():
        row: dict[str, Any] = {"name": name, "file": str(path), "error": None}
        try:
            profile = profiles.load(name)
        except UserError as error:
            rows.append({**row, "error": str(error)})
            continue
        rows.append(
            row
            | {
                "engine": profile.engine,
                "partition": profile.partition,
                "nodes": profile.nodes,
                "procs_per_node": profile.processes_per_node,
                "gpus_per_node": profile.gpus_per_node or 0,
                "container": profile.container.runtime if profile.container else None,
            }
        )
    if args.json:
        print(json.dumps(rows, indent=1))
        return FINISHED
    columns, cells = ["profile", "engine", "shape", "file"], [_row(row) for row in rows]
    if sys.stdout.isatty():
        print_table(columns, cells)
    else:
        for line in [columns, *cells]:
            print("\t".join(line))
    return FINISHED


def _row(row: dict[str, Any]) -> list[str]:
    if row["error"]:
        return [row["name"], "-", row["error"], row["file"]]
    gpus = f", {row['gpus_per_node']} GPUs" if row["gpus_per_node"] else ""
    engine = f"{row['engine']}, {row['container']}" if row["container"] else row["engine"]
    return [row["name"], engine, f"{row['nodes']} x {row['procs_per_node']} processes{gpus}", row["file"]]
