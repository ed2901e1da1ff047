"""Commands that train: fit, validate, test, predict, submit."""

from __future__ import annotations

import argparse
from pathlib import Path

from paperscale.cli.options import (
    Add,
    Parser,
    complete_clusters,
    complete_recipes,
    recipe_argument,
    shape_options,
    typed,
)
from paperscale.errors import FINISHED


def add_commands(add: Add) -> None:
    """Add the commands."""
    keys = "RECIPE [OVERLAY ...] [key=value ...]"
    fit = add("fit", run_fit, "train a recipe here, in the foreground")
    recipe_argument(fit, f"{keys}; every key of --print_config can be set, also as --key value", complete_recipes)
    fit.add_argument("--name", help="name of the run (default: the recipe's)")
    fit.add_argument("--print_config", action="store_true", help="print the resolved configuration and exit")
    for name, what in (("validate", "score the validation split"), ("test", "score the test split")):
        recipe_argument(
            _checkpoint_option(add(name, run_evaluate, f"{what} with a run's checkpoint")), f"RUN or {keys}"
        )
    predict = add("predict", run_evaluate, "write the predictions of a run's checkpoint for the test split")
    recipe_argument(_checkpoint_option(predict), f"RUN or {keys}")
    submit = add("submit", run_submit, "submit a recipe to a cluster")
    recipe_argument(submit, keys, complete_recipes)
    shape_options(submit)
    submit.add_argument("--cluster", default="local", help="profile of the cluster (default: local)").completer = (  # type: ignore[attr-defined]
        complete_clusters
    )
    submit.add_argument("--name", help="name of the run (default: the recipe's)")
    submit.add_argument("--dry-run", action="store_true", help="print the job script; submit nothing")


def _checkpoint_option(parser: Parser) -> Parser:
    parser.add_argument(
        "--checkpoint", type=Path, help="folder of a checkpoint (default: the run's newest that verifies)"
    )
    return parser


def run_fit(args: argparse.Namespace) -> int:
    """Train here."""
    from paperscale.recipes import RecipeArguments

    recipe = RecipeArguments.parse(args.recipe)
    if args.print_config:
        from paperscale.training.recipe import RecipeCLI

        print(RecipeCLI(recipe.to_cli(), build=False).resolved())
        return FINISHED
    from paperscale.jobs.foreground import fit

    return fit(recipe, args.name, typed(args))


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
    result = submit(recipe, shape, args.name, args.dry_run, typed(args))
    if isinstance(result, str):
        print(result, end="")
        return FINISHED
    print(f"submitted {result.name} to {args.cluster} as job {result.job}")
    print(f"  paperscale logs {result.name} -f      follow it")
    print(f"  paperscale status {result.name}       see how far it is")
    return FINISHED
