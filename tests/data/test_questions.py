"""Questions about passages: windows, context, characters, and what a batch holds of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paperscale.data import Questions, ShardWriter
from paperscale.data.faults import SampleFault
from paperscale.data.questions import of_widest_context, windows
from paperscale.data.tokenizer import train
from paperscale.errors import UserError
from tiny_text import write_text

CAFE = "In 1998, Beyoncé's café (the «Zürich») opened — naïve? Its owner, J. O'Neill-Müller, paid £3.5m; 東京 did not."
TEXTS = [CAFE, "Who opened what, and where?", "the owner of the café paid", "did Tokyo pay for it"] * 5


def sample(number: int, passage: str, answers: Sequence[str] = (), question: str = "Who paid?") -> dict[str, Any]:
    golds = [{"text": answer, "start": passage.index(answer)} for answer in answers]
    return {
        "id": f"q{number}",
        "title": "t",
        "question": question,
        "passage": passage,
        "answers": golds,
        "impossible": not golds,
    }


def write(folder: Path, samples: Sequence[dict[str, Any]]) -> str:
    with ShardWriter(folder, "questions", num_processes=0) as writer:
        for split in ("train", "val", "test"):
            rows = list(enumerate(samples))
            writer.write(split, rows, lambda of: {"__key__": f"{of[0]:04d}", "json": json.dumps(of[1]).encode()})
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train("wordpiece", TEXTS, 300).to_json())
    return str(path)


def stream(path: str, tokenizer: str | None, **options: Any) -> Questions:
    return Questions(path, 4, tokenizer=tokenizer, **{"length": 48, "stride": 10, "num_threads": 0, **options})


# -- windows ---------------------------------------------------------------------------------------------------


def original_windows(tokens: int, room: int, stride: int) -> list[tuple[int, int]]:
    """The loop of the original's ``convert_examples_to_features``."""
    found, start = [], 0
    while start < tokens:
        length = min(tokens - start, room)
        found.append((start, start + length))
        if start + length == tokens:
            break
        start += min(length, stride)
    return found


def has_widest_context(spans: Sequence[tuple[int, int]], current: int, place: int) -> bool:
    """The original's ``_check_is_max_context``."""
    best_score, best = None, None
    for number, (start, stop) in enumerate(spans):
        if not start <= place <= stop - 1:
            continue
        score = min(place - start, stop - 1 - place) + 0.01 * (stop - start)
        if best_score is None or score > best_score:
            best_score, best = score, number
    return current == best


@pytest.mark.parametrize("room", [1, 7, 30])
@pytest.mark.parametrize("stride", [1, 5, 128])
def test_windows_and_their_context_are_the_originals(room, stride):
    for tokens in (1, 6, 7, 8, 29, 30, 31, 35, 64, 100):
        expected = original_windows(tokens, room, stride)
        found = windows(tokens, room, stride)
        assert [tuple(of) for of in found.tolist()] == expected
        widest = of_widest_context(found, tokens)
        for number, (start, stop) in enumerate(expected):
            for place in range(start, stop):
                assert (widest[place] == number) == has_widest_context(expected, number, place)


def test_a_passage_without_a_token_is_one_empty_window(tmp_path, tokenizer):
    batch = next(iter(stream(write(tmp_path, [sample(0, " ")] * 4), tokenizer, val=None).train_dataloader()))
    assert windows(0, 7, 3).tolist() == [[0, 0]]
    assert len(batch["lengths"]) == 4
    assert not batch["passage"].any()


# -- characters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    ["Beyoncé", "café", "«Zürich»", "Zürich", "1998", "£3.5m", "J. O'Neill-Müller", "東京", "naïve?", CAFE],
)
def test_an_answers_tokens_say_what_it_says(answer, tmp_path, tokenizer):
    path = write(tmp_path, [sample(0, CAFE, [answer])] * 4)
    batch = next(iter(stream(path, tokenizer, length=200).val_dataloader()))
    first, last = batch["answer"][0].tolist()
    assert first > 0
    assert batch["asked"].text(0, 0, first, last) == answer


def test_a_part_of_a_word_is_answered_by_the_tokens_that_hold_it(tmp_path, tokenizer):
    passage = "the cafés paid"
    batch = next(iter(stream(write(tmp_path, [sample(0, passage, ["af"])] * 4), tokenizer).val_dataloader()))
    first, last = batch["answer"][0].tolist()
    assert "af" in batch["asked"].text(0, 0, first, last) in passage


# -- batches ---------------------------------------------------------------------------------------------------


def test_a_batch_holds_every_window_of_its_questions(tmp_path, tokenizer):
    long = " ".join(f"the owner paid {n} to Tokyo." for n in range(20))
    asked = [sample(0, long, ["17", "paid 17"]), sample(1, CAFE, ["1998"]), sample(2, "did not", []), sample(3, long)]
    data = stream(write(tmp_path, asked), tokenizer)
    (batch,) = data.val_dataloader()
    questions = batch["asked"]
    by_id = {questions.ids[number]: number for number in range(4)}
    assert [questions.answers[by_id[f"q{n}"]] for n in range(4)] == [["17", "paid 17"], ["1998"], [], []]
    encode = data.tokenizer().encode_in_place
    begin, end = data.frame
    for number in range(4):
        rows = range(questions.first_window[number], questions.first_window[number + 1])
        (ask, _), (tokens, characters) = encode([asked[int(questions.ids[number][1])]["question"],
                                                 questions.passages[number]])  # fmt: skip
        spans = original_windows(len(tokens), 48 - 3 - len(ask), 10)
        assert len(rows) == len(spans)
        assert batch["question"][rows.start : rows.stop].tolist() == [number] * len(rows)
        assert batch["share"][rows.start : rows.stop].tolist() == pytest.approx([1 / len(rows)] * len(rows))
        seen = np.zeros(len(tokens), int)
        for row, (start, stop) in zip(rows, spans, strict=True):
            inside = slice(int(batch["offsets"][row]), int(batch["offsets"][row + 1]))
            assert batch["tokens"][inside].tolist() == [begin, *ask, end, *tokens[start:stop], end]
            assert batch["segment"][inside].tolist() == [0] * (len(ask) + 2) + [1] * (stop - start + 1)
            assert batch["passage"][inside].tolist() == [False] * (len(ask) + 2) + [True] * (stop - start) + [False]
            flags = batch["widest"][inside][len(ask) + 2 : -1].numpy()
            seen[start:stop] += flags
            text = questions.text(number, row, len(ask) + 2, len(ask) + 1 + stop - start)
            assert text == questions.passages[number][characters[start, 0] : characters[stop - 1, 1]]
        assert (seen == 1).all(), "each token has its widest context in one window"


def test_a_window_without_the_whole_answer_points_to_cls(tmp_path, tokenizer):
    passage = " ".join(f"the owner paid {n} to Tokyo." for n in range(20))
    asked = [sample(0, passage, ["paid 9 to Tokyo. the owner paid 10"]), sample(1, passage)]
    (batch,) = stream(write(tmp_path, asked), tokenizer).val_dataloader()
    kinds = set()
    for row, question in enumerate(batch["question"].tolist()):
        first, last = batch["answer"][row].tolist()
        kinds.add((batch["asked"].ids[question], first > 0))
        if first:
            assert batch["asked"].text(question, row, first, last) == "paid 9 to Tokyo. the owner paid 10"
        else:
            assert last == 0
    assert kinds == {("q0", True), ("q0", False), ("q1", False)}


def test_questions_are_cut_and_leave_room_for_the_passage(tmp_path, tokenizer):
    path = write(tmp_path, [sample(0, CAFE, ["1998"], question="who paid " * 50)] * 4)
    for options, most in (({"question_length": 5}, 5), ({}, 22)):
        (batch,) = stream(path, tokenizer, **options).val_dataloader()
        first = torch.nonzero(batch["segment"])[0, 0]
        assert int(first) == 2 + most
        assert max(batch["lengths"]) <= 48


def test_few_samples_and_a_damaged_one(tmp_path, tokenizer):
    good = [sample(n, CAFE, ["1998"]) for n in range(12)]
    few = stream(write(tmp_path / "good", good), tokenizer, train_samples=8, subset=1)
    ids = [identity for batch in few.train_dataloader() for identity in batch["asked"].ids]
    assert len(set(ids)) == len(ids) == 8
    del good[3]["passage"]
    bad = write(tmp_path / "bad", good)
    with pytest.raises(SampleFault, match=r"sample '0003': does not decode: it is no question about a passage"):
        list(stream(bad, tokenizer).val_dataloader())
    skipping = stream(bad, tokenizer, on_fault="skip")
    assert sum(len(batch["asked"]) for batch in skipping.train_dataloader()) == 11


def test_what_is_no_tokenizer_is_refused_with_the_fix(tmp_path, tokenizer):
    path = write(tmp_path / "set", [sample(0, CAFE, ["1998"])] * 4)
    fix = r"name the tokenizer\.json of the pre-training, or a set that has one"
    with pytest.raises(UserError, match=rf"data\.tokenizer is not set, .*set holds text as it was written; {fix}"):
        stream(path, None).tokenizer()
    with pytest.raises(UserError, match=rf"nowhere: there is no tokenizer\.json in .*nowhere; {fix}"):
        stream(path, str(tmp_path / "nowhere")).tokenizer()
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match=r"other\.json: not a tokenizer"):
        stream(path, str(tmp_path / "other.json")).tokenizer()
    beside = write_text(tmp_path / "pretraining", sizes={"train": 2})
    assert stream(path, str(beside)).tokenizer().vocab_size == 300
    with pytest.raises(UserError, match=r"holds .*tokens\.npy.* and no json: Questions reads sets such as `paperscale"):
        stream(str(beside), tokenizer, val=None).train_dataloader()


def test_another_tokenizer_is_not_gone_on_with(tmp_path, tokenizer):
    path = write(tmp_path / "set", [sample(0, CAFE, ["1998"])] * 4)
    state = stream(path, tokenizer).state_dict()
    other = write_text(tmp_path / "other", sizes={"train": 2})
    with pytest.raises(UserError, match=r"the checkpoint was made with data\.tokenizer="):
        stream(path, str(other)).load_state_dict(state)
