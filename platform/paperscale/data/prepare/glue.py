"""The nine tasks of GLUE (Wang et al. 2019, table 1), each from its official files.

A document has one sentence or two, and its label; the hidden labels of the test splits are left out. STS-B, whose
labels are scores, is written as one ``json`` a sample.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from paperscale.data.prepare.base import Dataset, Job, shuffled, write_documents
from paperscale.data.prepare.originals import Originals, open_lines
from paperscale.data.prepare.text import encode_texts
from paperscale.data.tokenizer import TokenizerFile
from paperscale.data.writer import Sample
from paperscale.errors import UserError


class Example(NamedTuple):
    """A row of a task: its sentences, and its label as published, ``None`` in test."""

    sentences: tuple[str, ...]
    label: str | None


@dataclass(frozen=True)
class Task:
    """Where a task's files have what.

    Attributes:
        title: the task's name.
        what: what it holds.
        size: how much there is to download.
        files: split to file name.
        sentences: columns of the sentences, by name, or by number where there is no header.
        label: column of the label.
        labels: the labels in the order of their numbers; empty for scores.
        test: columns of the sentences in test, where they differ.
        skip_short: leave out rows with too few columns, which the official file has.
    """

    title: str
    what: str
    size: str
    files: dict[str, str]
    sentences: tuple[str | int, ...]
    label: str | int
    labels: tuple[str, ...]
    test: tuple[str | int, ...] = ()
    skip_short: bool = False


_FILES = {"train": "train.tsv", "val": "dev.tsv", "test": "test.tsv"}
_MNLI = {
    "train": "train.tsv",
    "val": "dev_matched.tsv",
    "val-mismatched": "dev_mismatched.tsv",
    "test": "test_matched.tsv",
    "test-mismatched": "test_mismatched.tsv",
}
_YES, _NO = "entailment", "not_entailment"
_BINARY = ("0", "1")
_PAIR = ("sentence1", "sentence2")
_NLI = ("entailment", "neutral", "contradiction")

TASKS = {
    "glue-cola": Task("CoLA", "sentences, acceptable or not: 8,551", "0.4 MB", _FILES, (3,), 1, _BINARY, ("sentence",)),
    "glue-sst2": Task(
        "SST-2", "film review sentences, positive or not: 67,349", "7 MB", _FILES, ("sentence",), "label", _BINARY
    ),
    "glue-mrpc": Task(
        "MRPC", "pairs, paraphrase or not: 3,668", "1.5 MB", _FILES, ("#1 String", "#2 String"), "Quality", _BINARY
    ),
    "glue-stsb": Task("STS-B", "pairs and how alike they are, 0 to 5: 5,749", "0.8 MB", _FILES, _PAIR, "score", ()),
    "glue-qqp": Task(
        "QQP",
        "pairs of questions, the same or not: 363,846",
        "42 MB",
        _FILES,
        ("question1", "question2"),
        "is_duplicate",
        _BINARY,
        skip_short=True,
    ),
    "glue-mnli": Task("MNLI", "premise and hypothesis: 392,702", "313 MB", _MNLI, _PAIR, "gold_label", _NLI),
    "glue-qnli": Task(
        "QNLI",
        "question and sentence, answered or not: 104,743",
        "11 MB",
        _FILES,
        ("question", "sentence"),
        "label",
        (_YES, _NO),
    ),
    "glue-rte": Task("RTE", "premise and hypothesis: 2,490", "0.7 MB", _FILES, _PAIR, "label", (_YES, _NO)),
    "glue-wnli": Task("WNLI", "pairs, the pronoun right or not: 635", "30 kB", _FILES, _PAIR, "label", _BINARY),
}


def write_task(job: Job) -> None:
    """Write a task of GLUE."""
    task = TASKS[job.name]
    originals = job.originals()
    read = _read_mrpc if job.name == "glue-mrpc" else _read_splits
    splits = {split: examples for split, examples in read(task, originals, job.say).items() if examples}
    job.hash(originals.used)
    splits["train"] = shuffled(splits["train"])
    texts = [text for example in splits["train"] for text in example.sentences]
    file = job.tokenizer(texts)
    for split, examples in splits.items():
        if not task.labels:
            _write_scores(job, split, examples, file)
            continue
        items = [(e.sentences, None if e.label is None else task.labels.index(e.label)) for e in examples]
        write_documents(job, split, items, partial(encode_texts, file=file), file)


def _read_splits(task: Task, originals: Originals, say: Callable[[str], None]) -> dict[str, list[Example]]:
    found = {}
    for split, name in task.files.items():
        path = originals.get(name) if split.startswith("test") else originals.find(name)
        if path is None:
            say(f"{task.title}: no {name} among the files named: the split {split} is left out")
            continue
        found[split] = read_table(path, task, hidden=split.startswith("test"), say=say)
    return found


def _read_mrpc(task: Task, originals: Originals, say: Callable[[str], None]) -> dict[str, list[Example]]:
    """Read MRPC: GLUE's own files, or Microsoft's, of which GLUE's ``dev_ids.tsv`` says what is dev."""
    if originals.get("dev.tsv"):
        return _read_splits(task, originals, say)
    path = originals.find("msr_paraphrase_train.txt")
    dev_ids = {tuple(line.split("\t")) for line in open_lines(originals.find("dev_ids.tsv", "mrpc_dev_ids.tsv"))}
    header, *rows = (line.split("\t") for line in open_lines(path))
    ids = header.index("#1 ID"), header.index("#2 ID")
    dev = [(row[ids[0]], row[ids[1]]) in dev_ids if len(row) == len(header) else False for row in rows]
    examples = read_table(path, task)
    test = read_table(originals.find("msr_paraphrase_test.txt"), task)
    return {
        "train": [example for example, out in zip(examples, dev, strict=True) if not out],
        "val": [example for example, out in zip(examples, dev, strict=True) if out],
        "test": test,
    }


def read_table(
    path: Path, task: Task, hidden: bool = False, say: Callable[[str], None] = lambda line: None
) -> list[Example]:
    r"""Read a table of tab-separated columns, without quoting; only ``\n`` ends a row.

    Raises:
        UserError: a column, or a row's field or label, is not as published; names file and line.
    """
    lines = open_lines(path)
    wanted = task.test if hidden and task.test else task.sentences
    header = None if isinstance(wanted[0], int) else next(lines, "").split("\t")
    columns = [_column(path, header, column) for column in wanted]
    label = None if hidden else _column(path, header, task.label)
    most = max([*columns, label or 0])
    found = []
    for number, line in enumerate(lines, start=1 if header is None else 2):
        fields = line.split("\t")
        if len(fields) <= most:
            if task.skip_short:
                say(f"{path}, line {number}: a row of {len(fields)} columns is left out")
                continue
            raise UserError(
                f"{path}, line {number}: {len(fields)} columns, {most + 1} or more expected; download it again"
            )
        value = None if label is None else fields[label]
        _check_label(path, number, task, value)
        found.append(Example(tuple(fields[column] for column in columns), value))
    if not found:
        raise UserError(f"{path}: holds no row; download it again")
    return found


def _column(path: Path, header: list[str] | None, column: str | int) -> int:
    if isinstance(column, int) or header is None:
        return int(column)
    if column not in header:
        raise UserError(f"{path}, line 1: no column '{column}' in {header[:12]}; name the official file of the task")
    return header.index(column)


def _check_label(path: Path, number: int, task: Task, label: str | None) -> None:
    if label is None or label in task.labels:
        return
    try:
        if not task.labels and 0 <= float(label) <= 5:
            return
    except ValueError:
        pass
    known = ", ".join(task.labels) or "0 to 5"
    raise UserError(f"{path}, line {number}: label '{label}' is none of {known}; name the official file of the task")


# -- scores --------------------------------------------------------------------------------------------------


def _write_scores(job: Job, split: str, examples: Sequence[Example], file: TokenizerFile) -> None:
    job.writer.schema = {"json": "sentences (text), tokens of each, score from 0 to 5 (null in test)"}
    rows = [(f"{split}-{number:06d}", example) for number, example in enumerate(examples)]
    job.write(split, rows, partial(encode_score, file=file))


def encode_score(row: tuple[str, Example], file: TokenizerFile) -> Sample:
    """Return a pair with its score."""
    key, (sentences, label) = row
    tokens = file.open().encode(sentences)
    content = {"sentences": sentences, "tokens": tokens, "score": None if label is None else float(label)}
    return {"__key__": key, "json": json.dumps(content, ensure_ascii=False).encode()}


DATASETS = {
    name: Dataset(
        f"GLUE {task.title}",
        task.what,
        task.size,
        "see https://gluebenchmark.com/tasks",
        write_task,
        originals=f"the files of {task.title} from https://gluebenchmark.com/tasks",
        fetched=False,
        tokenizer="wordpiece",
        vocab_size=30522,
        classes=task.labels,
    )
    for name, task in TASKS.items()
}
