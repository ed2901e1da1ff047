"""SQuAD 1.1 and 2.0 (Rajpurkar et al. 2016 and 2018): questions, passages, and answers by their characters.

One ``json`` a sample: ``id``, ``title``, ``question``, ``passage``, ``answers`` (each ``text`` and ``start``, its first
character in the passage) and ``impossible``. Which tokens an answer covers depends on the tokenizer and on how passages
are cut, so that is left to whoever reads them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from paperscale.data.prepare.base import Dataset, Job, shuffled
from paperscale.data.writer import Sample
from paperscale.errors import UserError

SCHEMA = {"json": "id, title, question, passage, answers (text, start: first character), impossible"}


def write_squad(job: Job, version: str) -> None:
    """Write the train and dev splits of one version."""
    originals = job.originals()
    paths = {split: originals.find(f"{name}-v{version}.json") for split, name in (("train", "train"), ("val", "dev"))}
    job.hash(originals.used)
    job.writer.schema = dict(SCHEMA)
    shifted = 0
    for split, path in paths.items():
        questions = list(read_questions(path))
        shifted += sum(not _in_place(question) for question in questions)
        rows = [(f"{split}-{number:06d}", question) for number, question in enumerate(questions)]
        job.write(split, shuffled(rows) if split == "train" else rows, encode)
    if shifted:
        job.say(f"{shifted} questions have an answer that is not where its file says it is")
    job.note(answers_out_of_place=shifted)


def read_questions(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the questions of a file.

    Raises:
        UserError: the file is no JSON, or a question lacks a field; names it.
    """
    where = "its beginning"
    try:
        for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    where = f"question {question['id']}"
                    yield {
                        "id": question["id"],
                        "title": article["title"],
                        "question": question["question"],
                        "passage": paragraph["context"],
                        "answers": [{"text": a["text"], "start": int(a["answer_start"])} for a in question["answers"]],
                        "impossible": bool(question.get("is_impossible", False)),
                    }
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: no JSON ({error.msg}); download it again") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {where} or what follows lacks {error}; name the official file") from error


def _in_place(question: dict[str, Any]) -> bool:
    passage = question["passage"]
    return all(passage.startswith(answer["text"], answer["start"]) for answer in question["answers"])


def encode(row: tuple[str, dict[str, Any]]) -> Sample:
    """Return the sample of a question."""
    key, question = row
    return {"__key__": key, "json": json.dumps(question, ensure_ascii=False).encode()}


DATASETS = {
    f"squad-{version}": Dataset(
        f"SQuAD {version}",
        what,
        size,
        "CC BY-SA 4.0",
        partial(write_squad, version=version),
        originals=f"train-v{version}.json and dev-v{version}.json from https://rajpurkar.github.io/SQuAD-explorer",
        fetched=False,
    )
    for version, what, size in (
        ("1.1", "87,599 + 10,570 questions about passages of Wikipedia", "35 MB"),
        ("2.0", "130,319 + 11,873 questions, a third of them without an answer", "47 MB"),
    )
}
