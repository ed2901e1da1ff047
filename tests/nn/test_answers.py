"""Scores of answers and of names, against what the official scripts compute."""

from __future__ import annotations

import collections
import random
import re
import string
from pathlib import Path

import pytest
import torch
from torch import Tensor

from paperscale.errors import UserError
from paperscale.nn.answers import AnswerScores, exact_match, f1_of_words, normalized
from paperscale.nn.entities import EntityF1
from paperscale.training.metric_state import metric_state, restore_metric_state
from processes import all_say, start_ranks

# -- SQuAD: the functions of evaluate-v1.1.py and evaluate-v2.0.py --------------------------------------------


def normalize_answer(s: str) -> str:
    def remove_articles(text):
        return re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", text)

    def white_space_fix(text):
        return " ".join(text.split())

    def remove_punc(text):
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    return white_space_fix(remove_articles(remove_punc(s.lower())))


def f1_of_v1(prediction: str, ground_truth: str) -> float:
    prediction_tokens = normalize_answer(prediction).split()
    ground_truth_tokens = normalize_answer(ground_truth).split()
    common = collections.Counter(prediction_tokens) & collections.Counter(ground_truth_tokens)
    num_same = sum(common.values())
    if num_same == 0:
        return 0
    precision = 1.0 * num_same / len(prediction_tokens)
    recall = 1.0 * num_same / len(ground_truth_tokens)
    return (2 * precision * recall) / (precision + recall)


def f1_of_v2(a_gold: str, a_pred: str) -> float:
    gold_toks = normalize_answer(a_gold).split() if a_gold else []
    pred_toks = normalize_answer(a_pred).split() if a_pred else []
    common = collections.Counter(gold_toks) & collections.Counter(pred_toks)
    num_same = sum(common.values())
    if len(gold_toks) == 0 or len(pred_toks) == 0:
        return int(gold_toks == pred_toks)
    if num_same == 0:
        return 0
    precision = 1.0 * num_same / len(pred_toks)
    recall = 1.0 * num_same / len(gold_toks)
    return (2 * precision * recall) / (precision + recall)


def find_best_thresh(preds, scores, na_probs, qid_to_has_ans):
    num_no_ans = sum(1 for k in qid_to_has_ans if not qid_to_has_ans[k])
    cur_score = num_no_ans
    best_score = cur_score
    best_thresh = 0.0
    for qid in sorted(na_probs, key=lambda k: na_probs[k]):
        diff = scores[qid] if qid_to_has_ans[qid] else (-1 if preds[qid] else 0)
        cur_score += diff
        if cur_score > best_score:
            best_score = cur_score
            best_thresh = na_probs[qid]
    return best_score / len(scores), best_thresh


TEXTS = [
    "", "the", "The  A an", ".", "Beyoncé", "beyoncé!", "the Beyoncé's café", "cafe", "U.S.", "US", "a US", "1,000",
    "1000", "in the year 1000", "in 1000 in", "\u2013", "state-of-the-art",
    "state of the art", "Theatre", "an\tother\n", "«x»",
]  # fmt: skip


def test_texts_are_compared_as_the_scripts_compare_them():
    for one in TEXTS:
        assert normalized(one) == normalize_answer(one)
        for other in TEXTS:
            assert exact_match(one, other) == (normalize_answer(one) == normalize_answer(other))
            assert f1_of_words(one, other, empty_agree=False) == f1_of_v1(one, other)
            assert f1_of_words(one, other, empty_agree=True) == f1_of_v2(other, one)


def test_v1_takes_the_best_of_the_right_answers():
    rng = random.Random(0)
    answers = [rng.choice(TEXTS) for _ in range(60)]
    golds = [rng.choices(TEXTS, k=rng.randint(1, 4)) for _ in answers]
    metric = AnswerScores()
    metric.update(answers[:7], golds[:7], [0.0] * 7)
    metric.update(answers[7:], golds[7:], [0.0] * 53)
    found = metric.compute()
    assert set(found) == {"exact_match", "f1"}
    pairs = list(zip(answers, golds, strict=True))
    exact = sum(max(normalize_answer(a) == normalize_answer(g) for g in right) for a, right in pairs) / 60
    f1 = sum(max(f1_of_v1(a, g) for g in right) for a, right in pairs) / 60
    assert float(found["exact_match"]) == pytest.approx(exact, abs=1e-12)
    assert float(found["f1"]) == pytest.approx(f1, abs=1e-12)


@pytest.mark.parametrize("threshold", [0.0, -0.7])
@pytest.mark.parametrize("seed", range(5))
def test_v2_and_its_best_threshold(seed, threshold):
    rng = random.Random(seed)
    count = 40
    spans = [rng.choice(TEXTS) for _ in range(count)]
    golds = [rng.choices(TEXTS, k=3) if rng.random() < 0.6 else [] for _ in range(count)]
    differences = [round(rng.uniform(-2, 2), 1) for _ in range(count)]  # some are the same
    metric = AnswerScores(no_answer=True, threshold=threshold)
    metric.update(spans, golds, differences)
    found = {name: float(value) for name, value in metric.compute().items()}

    def scored(texts):
        right = [[g for g in of if normalize_answer(g)] or [""] for of in golds]
        exact = {n: max(int(normalize_answer(g) == normalize_answer(texts[n])) for g in right[n]) for n in range(count)}
        return exact, {n: max(f1_of_v2(g, texts[n]) for g in right[n]) for n in range(count)}

    given = ["" if difference > threshold else span for span, difference in zip(spans, differences, strict=True)]
    exact, f1 = scored(given)
    has = {n: bool(golds[n]) for n in range(count)}
    assert found["exact_match"] == pytest.approx(sum(exact.values()) / count, abs=1e-12)
    assert found["f1"] == pytest.approx(sum(f1.values()) / count, abs=1e-12)
    answerable = [n for n in has if has[n]]
    assert found["answerable_f1"] == pytest.approx(sum(f1[n] for n in answerable) / len(answerable), abs=1e-12)
    without = [n for n in has if not has[n]]
    assert found["unanswerable_accuracy"] == pytest.approx(sum(exact[n] for n in without) / len(without), abs=1e-12)
    for name, scores in zip(("exact_match", "f1"), scored(spans), strict=True):
        best, best_threshold = find_best_thresh(spans, scores, dict(enumerate(differences)), has)
        assert found[f"best_{name}"] == pytest.approx(best, abs=1e-12)
        assert found[f"best_{name}_threshold"] == best_threshold


def test_where_nothing_is_to_be_answered_the_best_is_to_say_nothing():
    metric = AnswerScores(no_answer=True)
    metric.update(["x", "y"], [[], []], [-1.0, 1.0])
    found = {name: float(value) for name, value in metric.compute().items()}
    assert found["f1"] == 0.5
    assert (found["best_f1"], found["best_f1_threshold"]) == (1.0, 0.0)
    assert found["answerable_f1"] == 0.0


# -- conlleval -------------------------------------------------------------------------------------------------

KINDS = ("PER", "LOC")
TAGS = ["O", *(f"{place}-{kind}" for kind in KINDS for place in "BI")]


def chunks(tags: list[str], firsts: list[bool]) -> set[tuple[int, int, str]]:
    """Names by the rules of conlleval's ``endOfChunk`` and ``startOfChunk``, word by word."""
    found: set[tuple[int, int, str]] = set()
    start, last_tag, last_kind = None, "O", ""
    for at, (tag, first) in enumerate(zip([*tags, "O"], [*firsts, True], strict=True)):
        for place, kind in [("O", "")] * first + [(tag[0], tag[2:])]:  # an empty line is O
            ends = last_tag in "BI" and (place in "BO" or last_kind != kind)
            starts = place == "B" or (place == "I" and (last_tag == "O" or last_kind != kind))
            if ends and start is not None:
                found.add((start, at, last_kind))
                start = None
            if starts:
                start = at
            last_tag, last_kind = place, kind
    return found


def f1(found: list[str], wanted: list[str], first: list[bool]) -> dict[str, float]:
    metric = EntityF1(TAGS)
    numbers: list[Tensor] = [torch.tensor([TAGS.index(tag) for tag in tags]) for tags in (found, wanted)]
    metric.update(*numbers, torch.tensor(first))
    return {name: float(value) for name, value in metric.compute().items()}


@pytest.mark.parametrize(
    ("found", "wanted", "correct", "of_found", "of_wanted"),
    [
        ("O B-PER I-PER O", "O B-PER I-PER O", 1, 1, 1),
        ("O I-PER I-PER O", "O B-PER I-PER O", 1, 1, 1),  # I- after O begins a name
        ("B-PER I-PER", "B-PER B-PER", 0, 1, 2),  # two names side by side
        ("B-PER B-PER", "B-PER B-PER", 2, 2, 2),
        ("B-PER I-LOC", "B-PER B-LOC", 2, 2, 2),  # another kind begins another name
        ("B-PER I-LOC", "B-PER I-PER", 0, 2, 1),
        ("B-PER I-PER", "B-LOC I-LOC", 0, 1, 1),
        ("B-PER O", "B-PER I-PER", 0, 1, 1),  # its beginning alone is no name
        ("O O", "B-PER I-PER", 0, 0, 1),
        ("O O", "O O", 0, 0, 0),
        ("B-PER I-PER O B-LOC", "B-PER I-PER O O", 1, 2, 1),
    ],
)
def test_names_by_hand(found, wanted, correct, of_found, of_wanted):
    scores = f1(found.split(), wanted.split(), [True] + [False] * (len(found.split()) - 1))
    precision, recall = correct / max(of_found, 1), correct / max(of_wanted, 1)
    assert scores["precision"] == pytest.approx(precision)
    assert scores["recall"] == pytest.approx(recall)
    assert scores["f1"] == pytest.approx(2 * precision * recall / (precision + recall) if correct else 0)


def test_a_name_ends_with_its_sentence():
    assert f1(["B-PER", "I-PER"], ["B-PER", "B-PER"], [True, True])["f1"] == 1
    assert f1(["B-PER", "I-PER"], ["B-PER", "I-PER"], [True, True])["f1"] == 1


def test_names_are_those_of_conlleval_whatever_the_tags():
    rng = random.Random(0)
    counts = torch.zeros(3)
    metric = EntityF1(TAGS)
    for _ in range(60):
        size = rng.randint(1, 30)
        found, wanted = (rng.choices(TAGS, weights=[2, 1, 2, 1, 2], k=size) for _ in range(2))
        first = [True, *(rng.random() < 0.2 for _ in range(size - 1))]
        both = chunks(found, first), chunks(wanted, first)
        counts += torch.tensor([len(both[0] & both[1]), len(both[0]), len(both[1])])
        metric.update(*(torch.tensor([TAGS.index(t) for t in tags]) for tags in (found, wanted)), torch.tensor(first))
        assert [int(n) for n in (metric.correct, metric.found, metric.wanted)] == counts.int().tolist()
    metric.update(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0).bool())
    assert int(metric.found) == int(counts[1])


def test_tags_of_no_scheme_are_refused():
    with pytest.raises(UserError, match=r"model\.tags: 'PER' is neither O nor B- or I- and a kind"):
        EntityF1(["O", "PER"])


# -- over ranks ------------------------------------------------------------------------------------------------


class Both(torch.nn.Module):
    """Metrics as attributes of a module, as checkpoints see them."""

    def __init__(self) -> None:
        super().__init__()
        self.answers, self.names = AnswerScores(no_answer=True), EntityF1(TAGS)

    def count(self, numbers: range) -> None:
        for number in numbers:
            rng = random.Random(number)
            golds = rng.choices(TEXTS, k=2) if number % 3 else []
            self.answers.update([rng.choice(TEXTS)], [golds], [rng.uniform(-1, 1)])
            tags = torch.tensor(rng.choices(range(len(TAGS)), k=2 * 9)).view(2, 9)
            self.names.update(*tags, torch.arange(9) == 0)

    def scores(self) -> dict[str, float]:
        found = {**self.answers.compute(), **{f"name_{k}": v for k, v in self.names.compute().items()}}
        return {name: float(value) for name, value in found.items()}


def test_the_state_of_ranks_is_handed_over_with_a_checkpoint():
    whole, parts, after = Both(), [Both(), Both()], Both()
    whole.count(range(30))
    parts[0].count(range(13))
    parts[1].count(range(13, 30))
    restore_metric_state(after, [metric_state(part) for part in parts])
    assert after.scores() == whole.scores()


def test_two_ranks_find_what_one_finds():
    whole = Both()
    whole.count(range(30))
    said = all_say(start_ranks(Path(__file__).with_name("answers_rank.py"), 2))
    for text in said:
        assert text.splitlines()[-1] == str(whole.scores())
