"""CoNLL-2003 (Tjong Kim Sang and De Meulder 2003): English news whose persons, organisations and places are marked.

One ``json`` a sample, a document: ``id`` and ``sentences``, each with its ``words`` and as many ``tags``. Tags are BIO:
``B-`` begins a name, ``I-`` goes on with it, ``O`` is outside; their numbers are their places among the set's classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from paperscale.data.prepare.base import Dataset, Job, shuffled
from paperscale.data.prepare.originals import open_lines
from paperscale.data.prepare.squad import encode
from paperscale.errors import UserError

SCHEMA = {"json": "id, sentences (words, tags: one of the classes for each word)"}
TAGS = ("O", *(f"{place}-{kind}" for kind in ("PER", "ORG", "LOC", "MISC") for place in "BI"))
FILES = {"train": ("eng.train", "train.txt"), "val": ("eng.testa", "valid.txt"), "test": ("eng.testb", "test.txt")}
"""The official names, and those of copies."""

PUBLISHED = {"train": (946, 14_041), "val": (216, 3_250), "test": (231, 3_453)}
"""Documents and sentences of each split (table 1)."""

_START = "-DOCSTART-"
_NAME = "the official file of CoNLL-2003"


class Word(NamedTuple):
    """A line of a file: its number, its word and its tag."""

    line: int
    word: str
    tag: str


Sentence = list[Word]


def write_conll2003(job: Job) -> None:
    """Write the three official files: 946 + 216 + 231 documents."""
    originals = job.originals()
    paths = {split: originals.find(*names) for split, names in FILES.items()}
    job.hash(originals.used)
    job.writer.schema = dict(SCHEMA)
    changed = {}
    for split, path in paths.items():
        documents = list(read_documents(path))
        changed[split] = sum(_begin_names(sentence) for document in documents for sentence in document)
        _compare(job, split, path, documents)
        rows = [_row(f"{split}-{number:06d}", document) for number, document in enumerate(documents)]
        job.write(split, shuffled(rows) if split == "train" else rows, encode)
    if total := sum(changed.values()):
        job.say(f"{total} tags that begin a name without saying so (IOB1) are B- now")
    job.note(tags="BIO", tags_changed=changed)


def read_documents(path: Path) -> Iterator[list[Sentence]]:
    """Yield the documents of a file: a line is a word, its part of speech, chunk and tag; an empty one ends a sentence.

    Raises:
        UserError: a line is not as published; names it.
    """
    document: list[Sentence] | None = None
    sentence: Sentence = []
    for number, line in enumerate(open_lines(path), start=1):
        columns = re.split(r"[ \t]+", line.strip())
        if columns[0] not in ("", _START):
            if document is None:
                raise UserError(f"{path}, line {number}: a word before the first {_START}; name {_NAME}")
            sentence.append(_word(path, number, columns))
            continue
        if sentence and document is not None:
            document.append(sentence)
            sentence = []
        if columns[0] == _START:
            if document:
                yield document
            document = []
    if sentence and document is not None:
        document.append(sentence)
    if not document:
        raise UserError(f"{path}: ends without a document; download it again")
    yield document


def _word(path: Path, number: int, columns: list[str]) -> Word:
    if len(columns) != 4:
        raise UserError(f"{path}, line {number}: {len(columns)} columns, 4 expected; name {_NAME}")
    if columns[3] not in TAGS:
        raise UserError(f"{path}, line {number}: tag '{columns[3]}' is none of {', '.join(TAGS)}; name {_NAME}")
    return Word(number, columns[0], columns[3])


def _begin_names(sentence: Sentence) -> int:
    """Turn IOB1 into BIO; return how many tags were changed.

    In IOB1 only a name that follows one of its own kind at once begins with ``B-``; all others begin with ``I-``.
    """
    changed, before = 0, "O"
    for i, word in enumerate(sentence):
        if word.tag.startswith("I-") and before[2:] != word.tag[2:]:
            sentence[i] = word._replace(tag="B" + word.tag[1:])
            changed += 1
        before = word.tag
    return changed


def _compare(job: Job, split: str, path: Path, documents: list[list[Sentence]]) -> None:
    found = len(documents), sum(map(len, documents))
    if found != PUBLISHED[split]:
        published = "{:,} and {:,}".format(*PUBLISHED[split])
        job.say(f"{path}: {found[0]:,} documents and {found[1]:,} sentences; {published} are published")


def _row(key: str, document: list[Sentence]) -> tuple[str, dict[str, Any]]:
    sentences = [{"words": [w.word for w in sentence], "tags": [w.tag for w in sentence]} for sentence in document]
    return key, {"id": key, "sentences": sentences}


DATASETS = {
    "conll2003": Dataset(
        "CoNLL-2003",
        "English news, the names in it marked: 946 + 216 + 231 documents, 301,418 words",
        "5 MB",
        "research use; the text is Reuters' (https://trec.nist.gov/data/reuters/reuters.html)",
        write_conll2003,
        originals="eng.train, eng.testa and eng.testb of https://www.clips.uantwerpen.be/conll2003/ner",
        fetched=False,
        classes=TAGS,
    ),
}
