"""``paperscale bench train``: images a second of ResNet's training, beside a hand-written loop."""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from paperscale.bench import trainings
from paperscale.bench.report import spread
from paperscale.bench.step import write_run
from paperscale.bench.step_works import QUICK
from paperscale.bench.train_works import CLASSES, NETWORKS, SGD, Work, write_pictures
from paperscale.bench.trainings import Goal, Plan, worst
from paperscale.bench.turns import as_markdown, as_table, chosen, made_by, run_in_turns
from paperscale.errors import UserError

WAYS = {
    "bare": "hand-written loop",
    "ours-synthetic": "Paperscale, synthetic images",
    "ours-data": "Paperscale, JPEGs from shards",
    "ours-compile": "Paperscale, synthetic images, `speed.compile=blocks`",
}
GOALS = {"ours-synthetic": ("bare", 1.0), "ours-data": ("ours-synthetic", 0.97)}
"""A way, to the way that it is compared with and the least share of its images a second that is aimed at."""
_COLUMNS = ("training", "images/s", "times bare", "times synthetic", "GPU memory, GiB")


@dataclass(frozen=True)
class Size:
    """How much is trained.

    Attributes:
        networks: of :data:`~paperscale.bench.train_works.NETWORKS`.
        batch_sizes: images of a step.
        side: height and width of the images.
        warm_up: steps of a training before those that count.
        images: of the steps that count.
        precision: as Lightning's Trainer takes it.
    """

    networks: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    side: int
    warm_up: int
    images: int
    precision: str


ON_GPU = Size(("resnet50", "resnet152"), (128, 256), 224, 8, 4096, "bf16-mixed")
ON_CPU = Size(("resnet18",), (16,), 64, 2, 192, "32-true")


@dataclass(kw_only=True)
class Case(trainings.Case):
    """One network at one batch size, in images.

    Attributes:
        reference: whose network the hand-written loop trains.
    """

    reference: str


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    import torch

    found = {name: importlib.metadata.version(name) for name in ("torch", "lightning")}
    with suppress(importlib.metadata.PackageNotFoundError):
        found["torchvision"] = importlib.metadata.version("torchvision")
    if torch.cuda.is_available():
        found |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
    return found


@dataclass(kw_only=True)
class Results(trainings.Results):
    """What was measured.

    Attributes:
        pictures: what the JPEGs are.
    """

    pictures: str
    versions: dict[str, str] = field(default_factory=versions)

    def goals(self) -> dict[str, Goal]:
        """Return what was aimed at."""
        return {
            f"{WAYS[way]}, times {WAYS[other]}": worst(least, [case.ratios(way, other) for case in self.cases])
            for way, (other, least) in GOALS.items()
        }

    @property
    def not_judged(self) -> str:
        """Return why these rounds are no measurement of what the goals are for; empty where they are."""
        return super().not_judged if self.on_gpu else "they are for a GPU; these figures show only that it works"


def run(options: argparse.Namespace) -> int:
    """Run the benchmark with the options of ``paperscale bench train``.

    Raises:
        UserError: a network is unknown, a batch size is no number, or the process does not get to its end.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    works = _works(options, on_gpu)
    plan = Plan(
        "paperscale.bench.train_rank",
        works,
        [way for way in WAYS if on_gpu or way != "ours-compile"],
        1 if options.quick else options.rounds,
        Case,
        lambda folder: write_pictures(folder, max(w.batch_size * (w.warm_up + w.steps + 1) for w in works)),
        lambda folder, work, shards: _prepare(folder, work, plan.ways, shards),
    )

    def measure(progress: Callable[[int], None]) -> Results:
        cases, pictures = plan.measure(progress)
        return Results(rounds=plan.rounds, quick=options.quick, pictures=pictures, cases=cases)

    return run_in_turns(options, "train", plan.lines, measure, _show, markdown)


def _works(options: argparse.Namespace, on_gpu: bool) -> list[Work]:
    """Return what is trained."""
    size = ON_GPU if on_gpu else ON_CPU
    if options.quick:
        size = replace(ON_CPU, batch_sizes=(8,), images=8 * QUICK[1], precision=size.precision)
    networks = size.networks if options.networks is None else chosen("network", options.networks, list(NETWORKS))
    texts = list(map(str, size.batch_sizes)) if options.batch_sizes is None else options.batch_sizes.split(",")
    for text in texts:
        if not text.isdecimal() or int(text) < 1:
            raise UserError(f"--batch-sizes: '{text}' is no number of images; give some such as 128,256")
    return [
        Work(network, batch, size.side, size.warm_up, max(QUICK[1], size.images // batch), size.precision)
        for network in networks
        for batch in map(int, texts)
    ]


def _prepare(folder: Path, work: Work, ways: Sequence[str], shards: Path) -> None:
    """Write a run for each of our ways."""
    network = {"depth": work.depth, "classes": CLASSES, "bottleneck_stride": "3x3"}
    model = {
        "class_path": "paperscale.papers.resnet.ResNetClassifier",
        "init_args": {
            "network": {"class_path": "paperscale.papers.resnet.ResNet", "init_args": network},
            **SGD,
        },
    }
    images = {"path": str(shards), "global_batch_size": work.batch_size, "val": None, "size": work.side}
    for way in ways:
        if way == "bare":
            continue
        kind = "paperscale.data.ImageShards" if way == "ours-data" else "paperscale.bench.train_works.SyntheticImages"
        speed: dict[str, Any] = {"channels_last": True, "optimizer": "fused", "cudnn_benchmark": True}
        if way == "ours-compile":
            speed |= {"compile": "blocks", "compile_dynamic": False}
        recipe = {
            "model": model,
            "data": {"class_path": kind, "init_args": {**images, "crop": "random_resized", "flip": True}},
            "trainer": {"precision": work.precision},
            "speed": speed,
        }
        write_run(folder, way, recipe)


# -- the report ----------------------------------------------------------------------------------------------


def _title(case: Case) -> str:
    return f"{case.work.title}, {case.device}; the hand-written loop trains {case.reference}"


def _lines(case: Case) -> list[list[str]]:
    """Return a row for each way, the heading first."""
    rows = [list(_COLUMNS)]
    for way in (way for way in WAYS if way in case.per_s):
        synthetic = [] if way in ("bare", "ours-synthetic") else case.ratios(way, "ours-synthetic")
        figures = (case.per_s[way], case.ratios(way, "bare"), synthetic, case.gibibytes(way))
        rows.append([WAYS[way], *map(spread, figures)])
    return rows if case.memory else [row[:-1] for row in rows]


def markdown(results: Results) -> str:
    """Return the report."""
    parts = [
        "# Images a second of training",
        made_by("train", results),
        "A loop in plain PyTorch over one batch that stays on the device, and runs of Paperscale's with all that a run "
        "has: order, position, pulse, agreement on a stop, metrics and `metrics.jsonl`. Synthetic images are one batch "
        "on the device, as in the loop; JPEGs are read from shards, decoded, cropped at random (0.08 to 1 of the "
        f"area), resized and flipped while the device computes: {results.pictures}. All train the network with stride "
        "in the 3x3 convolution of bottlenecks, by fused SGD with momentum and weight decay, channels last, cuDNN's "
        f"fastest algorithms. Figures are `median [least..most]` of {results.rounds} rounds; in a round all ways take "
        "turns in the same process, and ratios are taken within a round. Memory is the most that tensors took.",
        results.goals_in_words(),
    ]
    for case in results.cases:
        parts += [f"## {_title(case)}", as_markdown(_lines(case)), *case.left_out_lines(WAYS)]
    return "\n\n".join(parts) + "\n"


def _show(results: Results, console: Console) -> None:
    for case in results.cases:
        console.print(f"[bold]{_title(case)}", as_table(_lines(case)), sep="\n", highlight=False)
        console.print(*case.left_out_lines(WAYS), "", sep="\n", highlight=False, markup=False)
    console.print(results.goals_in_words())
