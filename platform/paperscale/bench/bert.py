"""``paperscale bench bert``: tokens a second of BERT's pre-training, beside transformers and a hand-written loop."""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from paperscale.bench import trainings
from paperscale.bench.bert_works import ADAMW, CLIP, VOCABULARY, WEIGHT_DECAY, Work, write_documents
from paperscale.bench.report import spread
from paperscale.bench.step import write_run
from paperscale.bench.step_works import QUICK
from paperscale.bench.train import versions as of_training
from paperscale.bench.trainings import Goal, Plan, worst
from paperscale.bench.turns import as_markdown, as_table, chosen, made_by, run_in_turns

WAYS = {
    "huggingface": "transformers, padded",
    "bare": "hand-written loop, packed",
    "ours": "Paperscale, from shards",
    "huggingface-compile": "transformers, padded, `torch.compile`",
    "ours-compile": "Paperscale, from shards, `speed.compile=blocks`",
}
WORKS = {
    "tiny-128": Work("tiny", 128, 32, 2, 12, ""),
    "small-128": Work("small", 128, 16, 2, 6, ""),
    "base-128": Work("base", 128, 256, 8, 24, ""),
    "large-128": Work("large", 128, 256, 8, 24, ""),
    "large-512": Work("large", 512, 64, 8, 24, ""),
}
"""Their precision is that of the device."""
_ON_GPU, _ON_CPU = ("large-128", "large-512"), ("tiny-128",)
_PRECISIONS = ("32-true", "bf16-mixed")
_TIMES_BARE, _TIMES_THEIRS, _MFU = 0.97, {"CPU": 1.3, "GPU": 1.5}, 0.5
_COLUMNS = ("training", "tokens/s", "times transformers", "times hand-written", "MFU", "GPU memory, GiB")


@dataclass(kw_only=True)
class Case(trainings.Case):
    """One work, in real tokens.

    Attributes:
        padding: share of padding in the batches of the padded ways.
        flops: operations that a step needs, see :meth:`~paperscale.papers.bert.BertPretraining.training_flops`.
        peak: operations a second that the GPU's data sheet promises; 0 where it is not known.
    """

    padding: float
    flops: float
    peak: float

    def mfu(self, way: str) -> list[float]:
        """Return the share of the GPU's peak that is used, round by round; empty where that is not known."""
        if not self.peak:
            return []
        return [tokens / self.amount * self.flops / self.peak for tokens in self.per_s.get(way, [])]

    @property
    def best_mfu(self) -> list[float]:
        """Return that of the faster one of our ways."""
        return max((self.mfu(way) for way in ("ours", "ours-compile")), key=lambda rounds: sum(rounds))


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    found = {name: version for name, version in of_training().items() if name != "torchvision"}
    with suppress(importlib.metadata.PackageNotFoundError):
        found["transformers"] = importlib.metadata.version("transformers")
    return found


@dataclass(kw_only=True)
class Results(trainings.Results):
    """What was measured.

    Attributes:
        documents: what is trained on.
    """

    documents: str
    versions: dict[str, str] = field(default_factory=versions)

    def goals(self) -> dict[str, Goal]:
        """Return what was aimed at, on this kind of device."""
        theirs = _TIMES_THEIRS["GPU" if self.on_gpu else "CPU"]
        found = {
            f"{WAYS['ours']}, times {WAYS[other]}": worst(least, [case.ratios("ours", other) for case in self.cases])
            for other, least in (("huggingface", theirs), ("bare", _TIMES_BARE))
        }
        if self.on_gpu:
            found["MFU of Paperscale"] = worst(_MFU, [case.best_mfu for case in self.cases])
        return found


def run(options: argparse.Namespace) -> int:
    """Run the benchmark with the options of ``paperscale bench bert``.

    Raises:
        UserError: a work or the precision is unknown, or a process does not get to its end.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    works = _works(options, on_gpu)
    plan = Plan(
        "paperscale.bench.bert_rank",
        works,
        [way for way in WAYS if on_gpu or not way.endswith("-compile")],
        1 if options.quick else options.rounds,
        Case,
        lambda folder: write_documents(folder, works),
        lambda folder, work, shards: write_runs(folder, work, plan.ways, shards),
    )

    def measure(progress: Callable[[int], None]) -> Results:
        cases, documents = plan.measure(progress)
        return Results(rounds=plan.rounds, quick=options.quick, documents=documents, cases=cases)

    return run_in_turns(options, "bert", plan.lines, measure, _show, markdown)


def _works(options: argparse.Namespace, on_gpu: bool) -> list[Work]:
    """Return what is trained."""
    default = _ON_CPU if options.quick or not on_gpu else _ON_GPU
    names = default if options.works is None else chosen("work", options.works, list(WORKS))
    precisions = _PRECISIONS if options.precision is None else chosen("precision", options.precision, _PRECISIONS)
    precision = precisions[-1 if on_gpu else 0]
    works = [replace(WORKS[name], precision=precision) for name in names]
    if options.quick:
        works = [replace(work, batch_size=8, warm_up=QUICK[0], steps=QUICK[1]) for work in works]
    return works


def write_runs(folder: Path, work: Work, ways: Sequence[str], shards: Path) -> None:
    """Write a run for each of our ways."""
    network = {
        "class_path": "paperscale.papers.bert.Bert",
        "init_args": {"size": work.size, "vocab_size": VOCABULARY},
    }
    optimizer = {**ADAMW, "betas": list(ADAMW["betas"]), "weight_decay": WEIGHT_DECAY, "warmup": 0.1}
    data = {"path": str(shards), "global_batch_size": work.batch_size, "length": work.length, "val": None}
    for way in ways:
        if not way.startswith("ours"):
            continue
        compiled = {"compile": "blocks"} if way == "ours-compile" else {}
        recipe = {
            "model": {
                "class_path": "paperscale.papers.bert.BertPretraining",
                "init_args": {"network": network, **optimizer},
            },
            "data": {"class_path": "paperscale.data.SegmentPairs", "init_args": data},
            "trainer": {"precision": work.precision, "gradient_clip_val": CLIP},
            "speed": {"optimizer": "fused", **compiled},
        }
        write_run(folder, way, recipe)


# -- the report ----------------------------------------------------------------------------------------------


def _title(case: Case) -> str:
    return f"{case.work.title}, {case.device}"


def _sizes(case: Case) -> str:
    """Return what a step of the work is, in a sentence."""
    return (
        f"A step has {case.amount:,.0f} tokens on average and needs {case.flops / 1e12:.3g} x 10^12 operations; "
        f"{100 * case.padding:.1f} % of a padded batch is padding."
    )


def _lines(case: Case) -> list[list[str]]:
    """Return a row for each way, the heading first; columns that no row has a figure for are left out."""
    rows = [list(_COLUMNS)]
    for way in (way for way in WAYS if way in case.per_s):
        compared = (case.ratios(way, "huggingface"), case.ratios(way, "bare"))
        figures = (case.per_s[way], *compared, case.mfu(way), case.gibibytes(way))
        rows.append([WAYS[way], *map(spread, figures)])
    kept = [column for column in range(len(_COLUMNS)) if any(row[column] for row in rows[1:])]
    return [[row[column] for column in kept] for row in rows]


def markdown(results: Results) -> str:
    """Return the report."""
    parts = [
        "# Tokens a second of BERT's pre-training",
        made_by("bert", results),
        "Masked language modelling and next sentence prediction on the same sequences with the same masks: in a loop "
        "in plain PyTorch over transformers' `BertForPreTraining` (attention by `sdpa`), padded to the longest of a "
        "batch; in such a loop over Paperscale's network, packed without padding; and in a run of Paperscale's with "
        "all that a run has: pairs are drawn, masked and packed from shards of documents meanwhile, and order, "
        "position, pulse, agreement on a stop, metrics and `metrics.jsonl` are kept. The loops' batches lie on the "
        f"device beforehand. All networks have {VOCABULARY:,} tokens and dropout of 0.1, and are trained by fused "
        f"AdamW with gradients clipped to {CLIP:g}; both loops begin with the same weights, and so with the same loss. "
        f"Only real tokens are counted, special ones among them. Documents: {results.documents}.",
        "MFU is the share of the GPU's dense peak rate that goes into what the model needs: 6 operations for each "
        "weight of the encoder's products and 12 L H S for attention over a sequence of S tokens, for each token; the "
        "output layer at masked tokens alone, though transformers computes it at every place. Figures are `median "
        f"[least..most]` of {results.rounds} rounds; in a round all ways take turns in the same process, and ratios "
        "are taken within a round. Memory is the most that tensors took.",
        results.goals_in_words(),
    ]
    for case in results.cases:
        parts += [f"## {_title(case)}", _sizes(case), as_markdown(_lines(case)), *case.left_out_lines(WAYS)]
    return "\n\n".join(parts) + "\n"


def _show(results: Results, console: Console) -> None:
    for case in results.cases:
        console.print(f"[bold]{_title(case)}", _sizes(case), as_table(_lines(case)), sep="\n", highlight=False)
        console.print(*case.left_out_lines(WAYS), "", sep="\n", highlight=False, markup=False)
    console.print(f"Documents: {results.documents}.", results.goals_in_words(), sep="\n")
