"""Commands that train, and use what was trained: fit, validate, test, predict, generate, submit."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from paperscale.cli.options import (
    Add,
    Parser,
    complete_clusters,
    complete_recipes,
    complete_runs,
    position,
    positive,
    print_json,
    recipe_argument,
    shape_options,
    strategy_option,
    tell,
    typed,
    with_strategy,
)
from paperscale.errors import FINISHED, UserError

if TYPE_CHECKING:
    from paperscale.jobs.run import Run
    from paperscale.jobs.submit import Shape, Turn
    from paperscale.recipes import RecipeArguments


def add_commands(add: Add) -> None:
    """Add the commands."""
    keys = "RECIPE [OVERLAY ...] [key=value ...]"
    fit = add("fit", run_fit, "train a recipe here, in the foreground")
    recipe_argument(fit, f"{keys}; every key of --print_config can be set, also as --key value", complete_recipes)
    fit.add_argument("--name", help="name of the run (default: the recipe's)")
    strategy_option(fit)
    _init_option(fit)
    fit.add_argument("--print_config", action="store_true", help="print the resolved configuration and exit")
    for name, help in (
        ("validate", "score the validation split with a run's checkpoint"),
        ("test", "score the test split with a run's checkpoint"),
        ("predict", "write the predictions of a run's checkpoint for the test split"),
    ):
        evaluation = add(name, run_evaluate, help)
        recipe_argument(evaluation, f"RUN or {keys}")
        _evaluation_options(evaluation)
    _add_generate(add("generate", run_generate, "let a run's language model write"), keys)
    rate = add("lr-find", run_lr_find, "find a learning rate for a recipe, here, in a hundred steps")
    recipe_argument(rate, keys, complete_recipes)
    rate.add_argument("--min-lr", type=float, default=1e-8, help="learning rate of the first step (default: 1e-8)")
    rate.add_argument("--max-lr", type=float, default=1.0, help="learning rate of the last step (default: 1)")
    rate.add_argument("--steps", type=positive, default=100, help="optimizer steps (default: 100)")
    rate.add_argument("--svg", type=Path, metavar="FILE", help="write the curve as a picture")
    submit = add("submit", run_submit, "submit a recipe to a cluster")
    recipe_argument(submit, keys, complete_recipes)
    shape_options(submit)
    strategy_option(submit)
    _init_option(submit)
    submit.add_argument("--cluster", default="local", help="profile of the cluster (default: local)").completer = (  # type: ignore[attr-defined]
        complete_clusters
    )
    submit.add_argument("--name", help="name of the run, or of the sweep (default: the recipe's)")
    submit.add_argument(
        "--json", action="store_true", help="print run and job as JSON, of a sweep group, runs and jobs"
    )
    submit.add_argument("--dry-run", action="store_true", help="print the job script; submit nothing")
    submit.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=VALUES",
        help="a run for each value, 'model.lr=[0.1,0.01]' or 'seed_everything=range(5)'; again for a further key",
    )
    submit.add_argument("--max-parallel", type=positive, metavar="K", help="runs of a sweep at once")
    submit.add_argument("--after", metavar="RUN", help="start when that run has finished").completer = complete_runs  # type: ignore[attr-defined]
    submit.add_argument(
        "--repeat", type=positive, default=1, metavar="N", help="a train of up to N jobs, for short time limits"
    )


def _add_generate(parser: Parser, keys: str) -> None:
    recipe_argument(parser, f"RUN or {keys}")
    help = "what the text begins with; again for a further text (default: the beginning of a document)"
    parser.add_argument("--prompt", dest="prompts", action="append", default=[], metavar="TEXT", help=help)
    parser.add_argument("--tokens", type=positive, default=200, metavar="N", help="to add at most (default 200)")
    help = "below 1 prefers likely tokens, 0 takes the most likely (default 1)"
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help=help)
    parser.add_argument("--top-k", type=positive, metavar="K", help="draw from the K most likely tokens")
    help = "draw from the fewest tokens whose probabilities sum to P"
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help=help)
    parser.add_argument("--seed", type=position, default=0, metavar="S", help="of what is drawn (default 0)")
    parser.add_argument("--count", type=positive, default=1, metavar="C", help="texts for each prompt (default 1)")
    help = "a tokenizer.json in place of the data set's, as for weights from elsewhere"
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help=help)
    _checkpoint_option(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _checkpoint_option(parser: Parser) -> None:
    which = "best, last, a step, a checkpoint's folder or a file of weights (default: the run's newest that verifies)"
    parser.add_argument("--checkpoint", metavar="NAME", help=which)


def _evaluation_options(parser: Parser) -> None:
    _checkpoint_option(parser)
    others = "average the scores with those of another run (also @best, @STEP); again for a further one"
    parser.add_argument("--with", dest="others", action="append", default=[], metavar="RUN", help=others).completer = (  # type: ignore[attr-defined]
        complete_runs
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _init_option(parser: Parser) -> None:
    help = "begin with the weights of a run or checkpoint (also @best, @STEP), or of a .safetensors file"
    parser.add_argument("--init-from", metavar="SOURCE", help=help).completer = complete_runs  # type: ignore[attr-defined]


def _name(args: argparse.Namespace) -> str | None:
    """Return the name that the user has chosen, ``None`` for none."""
    if args.name == "":
        raise UserError("--name is empty; give a name, or leave --name out for one after the recipe")
    return args.name


def _words(args: argparse.Namespace) -> list[str]:
    """Return the recipe's words, with what options say of it.

    Raises:
        UserError: it is set twice.
    """
    if args.strategy and any(word.lstrip("-").startswith("trainer.strategy") for word in args.recipe):
        raise UserError("--strategy and trainer.strategy set the same key; leave one of the two out")
    initial = [f"init_from={args.init_from}"] if args.init_from else []
    return [*with_strategy(args.recipe, args), *initial]


def run_fit(args: argparse.Namespace) -> int:
    """Train here."""
    from paperscale.recipes import RecipeArguments

    recipe = RecipeArguments.parse(_words(args))
    if args.print_config:
        from paperscale.training.recipe import RecipeCLI

        print(RecipeCLI(recipe.to_cli(), build=False).resolved())
        return FINISHED
    from paperscale.jobs.foreground import fit

    return fit(recipe, _name(args), typed(args))


def run_lr_find(args: argparse.Namespace) -> int:
    """Find a learning rate; leaves no run behind."""
    from paperscale.recipes import RecipeArguments
    from paperscale.training import lr_finder
    from paperscale.training.recipe import RecipeCLI

    recipe = RecipeArguments.parse(args.recipe)
    cli = RecipeCLI(recipe.to_cli())
    if source := cli.config_init.init_from:
        from paperscale.jobs.checkpoints import resolve_initial
        from paperscale.training.initial import read_initial

        print("\n".join(read_initial(cli.model, resolve_initial(source), cli.config_init.init_prefix).lines()))
    found = lr_finder.find_rate(cli, args.min_lr, args.max_lr, args.steps)
    print(lr_finder.as_text(found))
    if args.svg:
        args.svg.write_text(lr_finder.as_svg(found, recipe.recipe.stem))
        print(f"picture: {args.svg}")
    if not found.diverged:
        print(f"the loss did not diverge up to {found.rates[-1]:g}: a larger --max-lr may find more")
    print(f"{lr_finder.key_of_rate(cli)}={found.rate:.2e}")
    return FINISHED


def _run_and_recipe(words: list[str]) -> tuple[Run | None, RecipeArguments]:
    """Return the run that the first word names, and the recipe: the run's, or the one that is named."""
    from paperscale.jobs.run import find_run, runs_dir
    from paperscale.recipes import RecipeArguments, all_recipes

    first, rest = words[0], words[1:]
    is_run = (runs_dir() / first / "run.json").exists()
    is_recipe = not is_run and (first in all_recipes() or first.endswith((".yaml", ".yml")))
    run = None if is_recipe else find_run(first)
    return run, RecipeArguments.parse([str(run.recipe) if run else first, *rest])


def run_evaluate(args: argparse.Namespace) -> int:
    """Validate, test or predict."""
    run, recipe = _run_and_recipe(args.recipe)
    from paperscale.jobs.evaluate import Request, evaluate

    request = Request(args.words[0], recipe, run, args.checkpoint, args.others)
    found = evaluate(request, progress=sys.stdout.isatty() and not args.json)
    if args.json:
        print_json(found)
        return FINISHED
    averages = {"weights": found["weights"]} if found["weights"] != "trained" else {}
    ensemble = {"ensemble of": ", ".join([args.recipe[0], *args.others])} if args.others else {}
    facts = {"step": found["step"], **averages, **ensemble}
    facts |= {key: found.get(key) for key in ("reproduces", "predictions", "file")}
    lines = {name: value for name, value in {**found.get("metrics", {}), **facts}.items() if value is not None}
    width = max(16, *map(len, lines))
    for name, value in lines.items():
        print(f"{name:{width}} {value:.4f}" if isinstance(value, float) else f"{name:{width}} {value}")
    return FINISHED


def run_generate(args: argparse.Namespace) -> int:
    """Let a language model write: the texts to stdout, whose they are to stderr."""
    run, recipe = _run_and_recipe(args.recipe)
    from paperscale.jobs.evaluate import Request
    from paperscale.jobs.generating import generate
    from paperscale.nn.sampling import Sampling

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    request = Request("generate from", recipe, run, args.checkpoint)
    found = generate(request, args.prompts, args.count, args.tokens, sampling, args.tokenizer)
    if args.json:
        print_json(found)
        return FINISHED
    tell(found["checkpoint"] if found["step"] is None else f"step {found['step']} of {args.recipe[0]}")
    for number, text in enumerate(found["texts"], start=1):
        if len(found["texts"]) > 1:
            print(f"{'' if number == 1 else chr(10)}--- {number}")
        print(text["prompt"] + text["text"])
    return FINISHED


def run_submit(args: argparse.Namespace) -> int:
    """Submit a job, or one for each combination of a sweep."""
    from paperscale.jobs.submit import Shape, Turn, submit
    from paperscale.recipes import RecipeArguments

    if args.json and args.dry_run:
        raise UserError("--json and --dry-run: a dry run prints the job script; leave one of the two out")
    shape = Shape(args.cluster, args.nodes, args.procs_per_node, args.gpus_per_node, args.time)
    recipe, turn = RecipeArguments.parse(_words(args)), Turn(args.after, args.repeat)
    if args.sweep:
        return _submit_sweep(args, recipe, shape, turn)
    if args.max_parallel:
        raise UserError("--max-parallel is for sweeps: give --sweep KEY=VALUES too, or leave it out")
    result = submit(recipe, shape, _name(args), args.dry_run, typed(args), turn)
    if isinstance(result, str):
        print(result, end="")
        return FINISHED
    if args.json:
        print_json({"run": result.name, "job": result.job})
        return FINISHED
    print(f"submitted {result.name} to {args.cluster} as job {result.job}")
    print(f"  paperscale logs {result.name} -f      follow it")
    print(f"  paperscale status {result.name}       see how far it is")
    return FINISHED


def _submit_sweep(args: argparse.Namespace, recipe: RecipeArguments, shape: Shape, turn: Turn) -> int:
    from paperscale.jobs.sweep import submit_sweep

    result = submit_sweep(
        recipe, shape, _name(args), args.dry_run, typed(args), args.sweep, at_most=args.max_parallel, turn=turn
    )
    if isinstance(result, str):
        print(result, end="")
        return FINISHED
    if args.json:
        print_json({"group": result.name, "runs": [run.name for run in result.runs], "jobs": list(result.jobs)})
        return FINISHED
    by = f" as array {', '.join(result.jobs)}" if result.jobs else ""
    bound = f", at most {result.at_most} at once" if result.at_most else ""
    names = f"{result.runs[0].name} to {result.runs[-1].name}"
    print(f"submitted {len(result.runs)} runs, {names}, to {args.cluster}{by}{bound}")
    print(f"  paperscale runs --group {result.name}      see how far they are")
    return FINISHED
