"""BERT on spans and words: counts, spans, losses, features, and both tasks from the official files to their scores."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import wait_for
from paperscale.cli import main
from paperscale.data import Questions, TaggedWords
from paperscale.data.tokenizer import train
from paperscale.errors import UserError
from paperscale.jobs.run import Run
from paperscale.nn.attention import Layout
from paperscale.nn.ensemble import Ensemble
from paperscale.papers.bert import Bert
from paperscale.papers.bert_tasks import (
    FEATURES,
    BertQuestions,
    BertTagger,
    FeatureTags,
    SpanScores,
    WordTags,
    best_spans,
    padded,
)
from paperscale.training.tensorfile import TensorReader
from test_questions import sample, write

SMALL = {
    "size": "tiny",
    "vocab_size": 400,
    "layers": 4,
    "hidden": 32,
    "heads": 4,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
PLACES = ["Oslo", "Lima", "Cairo", "Quito", "Perth", "Turin", "Hanoi", "Lagos"]
PEOPLE = ["Ada Byron", "Alan Turing", "Emmy Noether", "Kurt Goedel", "Grace Hopper", "Paul Erdos"]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


FILLER = "it rained a lot . the day was long , and cold ; nobody came at all , or so they said ."


def questions(count_: int, seed: int, answerable: float = 1.0) -> list[dict[str, Any]]:
    """Who was where, somewhere among other words; a question asks for the one or the other, or for what is not said."""
    rng = random.Random(seed)
    made = []
    for number in range(count_):
        who, where = rng.choice(PEOPLE), rng.choice(PLACES)
        words = rng.choices(FILLER.split(), k=rng.randint(8, 20))
        words.insert(rng.randint(0, len(words)), f"{who} was in {where}")
        kind = rng.choice(["Who", "Where"]) if rng.random() < answerable else "What"
        answers = {"Who": [who], "Where": [where], "What": []}[kind]
        made.append(sample(number, " ".join(words), answers, f"{kind} was it?"))
    return made


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    texts = [text for q in questions(50, 1, 0.5) for text in (q["passage"], q["question"])]
    path.write_text(train("wordpiece", texts, 400).to_json())
    return str(path)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Questions of which some have several windows, in the sizes of a test."""
    made = questions(12, 2, 0.7)
    made[3]["passage"] = " ".join([made[3]["passage"]] * 4)
    made[7]["passage"] = "Oslo"
    made[7]["answers"] = []
    return write(tmp_path_factory.mktemp("asked"), made)


def batches(path: str, tokenizer: str, size: int) -> list[dict[str, Any]]:
    data = Questions(path, 4, 48, tokenizer, stride=10, eval_batch_size=size, num_threads=0)
    return list(data.val_dataloader())


# -- section 4.2: spans --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "parameters"), [("base", 108_893_186), ("large", 334_094_338)])
def test_the_network_of_squad_is_the_encoder_and_two_vectors(size, parameters):
    with torch.device("meta"):
        assert count(SpanScores(Bert(size, 30522))) == parameters


def brute(score_2L: Tensor, first_L: Tensor, last_L: Tensor, longest: int) -> tuple[float, int, int]:
    length = len(first_L)
    spans = [(i, j) for i in range(length) for j in range(i, min(length, i + longest)) if first_L[i] and last_L[j]]
    return max(((float(score_2L[0, i] + score_2L[1, j]), i, j) for i, j in spans), default=(-math.inf, 0, 0))


@pytest.mark.parametrize("longest", [1, 3, 30])
def test_the_best_span_is_the_best_of_all_that_may_be(longest):
    torch.manual_seed(longest)
    score_2NL = torch.randn(2, 20, 15)
    first_NL, last_NL = torch.rand(20, 15) < 0.4, torch.rand(20, 15) < 0.6
    first_NL[0] = False
    found = best_spans(score_2NL, first_NL, last_NL, 20, longest)
    for row in range(20):
        score, i, j = brute(score_2NL[:, row], first_NL[row], last_NL[row], longest)
        assert float(found.score_N[row]) == pytest.approx(score)
        assert score == -math.inf or (int(found.first_N[row]), int(found.last_N[row])) == (i, j)


def test_only_the_n_best_starts_and_ends_are_tried():
    start = torch.tensor([0.0, 1.0, 2.0, 9.0])
    end = torch.tensor([8.0, 3.0, 1.0, 0.0])
    everywhere = torch.ones(1, 4, dtype=torch.bool)
    scores = torch.stack([start, end])[:, None]
    assert best_spans(scores, everywhere, everywhere, 20, 30).score_N.tolist() == [9.0]
    assert best_spans(scores, everywhere, everywhere, 1, 30).score_N.tolist() == [-math.inf]
    assert best_spans(scores, everywhere, everywhere, 3, 30).score_N.tolist() == [4.0]


def test_padded_tokens_are_those_of_their_sequences():
    layout = Layout([3, 1, 2], torch.tensor([0, 3, 4, 6], dtype=torch.int32))
    found = padded(torch.arange(12.0).view(2, 6), layout, -1.0)
    assert found[0].tolist() == [[0, 1, 2], [3, -1, -1], [4, 5, -1]]
    assert found[1, 2].tolist() == [10, 11, -1]


@pytest.mark.parametrize("bilstm", [False, True])
def test_each_question_of_a_ragged_batch_gets_what_it_gets_alone(asked, tokenizer, bilstm):
    torch.manual_seed(0)
    module = BertQuestions(Bert(**SMALL), bilstm=bilstm).eval()
    with torch.no_grad():
        (together,) = batches(asked, tokenizer, 12)
        assert len(set(together["lengths"])) > 3
        score_2NL = module.network(together)
        answers = dict(zip(together["asked"].ids, module.answers(score_2NL, together), strict=True))
        losses = []
        for alone in batches(asked, tokenizer, 1):
            own_2NL = module.network(alone)
            row = together["asked"].first_window[together["asked"].ids.index(alone["asked"].ids[0])]
            windows, longest = own_2NL.shape[1:]
            expected = score_2NL[:, row : row + windows, :longest]
            torch.testing.assert_close(own_2NL, expected, rtol=1e-4, atol=1e-5)
            (found,) = module.answers(own_2NL, alone)
            assert found.text == answers[alone["asked"].ids[0]].text
            assert found.difference == pytest.approx(answers[alone["asked"].ids[0]].difference, abs=1e-4)
            losses.append(float(module.loss(own_2NL, alone)))
    mean = sum(losses) / len(losses)
    assert float(module.loss(score_2NL, together)) == pytest.approx(mean, rel=1e-5), "however a batch is divided"


def test_the_loss_is_the_mean_over_questions_of_that_over_windows(asked, tokenizer):
    module = BertQuestions(Bert(**SMALL)).eval()
    (batch,) = batches(asked, tokenizer, 12)
    score_2NL = module.network(batch)
    found: dict[int, list[Tensor]] = {}
    for row, question in enumerate(batch["question"].tolist()):
        own = [
            score_2NL[side, row, : batch["lengths"][row]].log_softmax(0)[batch["answer"][row, side]] for side in (0, 1)
        ]
        found.setdefault(question, []).append(-(own[0] + own[1]) / 2)
    expected = torch.stack([torch.stack(entropies).mean() for entropies in found.values()]).mean()
    torch.testing.assert_close(module.loss(score_2NL, batch), expected)


def test_an_answer_is_the_best_over_the_windows_and_none_the_least(asked, tokenizer):
    torch.manual_seed(1)
    module = BertQuestions(Bert(**SMALL), no_answer=True).eval()
    (batch,) = batches(asked, tokenizer, 12)
    questions_, layout = batch["asked"], Layout(batch["lengths"], batch["offsets"])
    score_2NL = torch.randn(2, len(batch["lengths"]), max(batch["lengths"]))
    first_NL, last_NL = (padded(batch[name], layout, False) for name in ("widest", "passage"))
    found = module.answers(score_2NL, batch)
    for question in range(len(questions_)):
        rows = range(questions_.first_window[question], questions_.first_window[question + 1])
        best = max((*brute(score_2NL[:, row], first_NL[row], last_NL[row], 30), row) for row in rows)
        null = min(float(score_2NL[:, row, 0].sum()) for row in rows)
        assert found[question].text == questions_.text(question, best[3], best[1], best[2])
        assert found[question].difference == pytest.approx(null - best[0], abs=1e-5)
    module.network.forward = lambda batch: score_2NL  # type: ignore[method-assign]
    differences = sorted(answer.difference for answer in found)
    for threshold, given in ((-math.inf, 0), (differences[4], 5), (math.inf, 12)):
        module.null_threshold = threshold
        texts = module.predict_step(batch, 0)
        assert list(texts) == questions_.ids
        assert sum(map(bool, texts.values())) == given
    module.no_answer = False
    assert list(module.predict_step(batch, 0).values()) == [answer.text for answer in found]


def test_an_ensemble_averages_over_the_tokens_of_a_window(asked, tokenizer):
    modules = [SpanScores(Bert(**SMALL)).eval() for _ in range(2)]
    (batch,) = batches(asked, tokenizer, 12)
    with torch.no_grad():
        mean = Ensemble(modules)(batch).exp()
        own = torch.stack([module(batch).softmax(dim=2) for module in modules]).mean(0)
    torch.testing.assert_close(mean, own)
    torch.testing.assert_close(mean.sum(2), torch.ones(2, len(batch["lengths"])))


# -- section 5.3: words --------------------------------------------------------------------------------------


def packed(*lengths: int) -> dict[str, Any]:
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return {
        "tokens": torch.randint(400, (sum(lengths),)),
        "segment": torch.zeros(sum(lengths), dtype=torch.int64),
        "position": torch.cat([torch.arange(n) for n in lengths]),
        "offsets": offsets,
        "lengths": list(lengths),
        "places": torch.arange(sum(lengths))[1::2],
    }


@pytest.mark.parametrize("features", FEATURES)
def test_features_are_those_of_table_7_and_the_encoder_stays_as_it_is(features):
    torch.manual_seed(0)
    network = FeatureTags(Bert(**{**SMALL, "dropout": 0.5}), 9, features, width=16).train()
    batch, layout = packed(7, 12, 3), Layout([7, 12, 3], torch.tensor([0, 7, 19, 22]))
    e, *layers = network.bert.eval().every_layer(batch, layout)
    network.train()
    expected = {
        "embeddings": e,
        "second-to-last": layers[-2],
        "last": layers[-1],
        "weighted-last-4": torch.stack(layers[-4:]).mean(0),
        "concat-last-4": torch.cat(layers[-4:], dim=1),
        "weighted-all": torch.stack(layers).mean(0),
    }[features]
    torch.testing.assert_close(network.features(batch, layout), expected)  # no dropout, though it is trained
    network(batch).sum().backward()
    assert all(p.grad is None for p in network.bert.parameters())
    assert all(p.grad is not None for n, p in network.named_parameters() if not n.startswith("bert."))
    assert network.output(torch.cat([torch.zeros(1, 32)])).shape == (1, 9)


def test_the_lstm_of_a_ragged_batch_computes_each_sequence_alone():
    torch.manual_seed(0)
    network = FeatureTags(Bert(**SMALL), 9, "last", width=16, dropout=0.0).eval()
    batch = packed(7, 12, 3)
    together = network(batch)
    found = []
    for row, length in enumerate(batch["lengths"]):
        inside = slice(int(batch["offsets"][row]), int(batch["offsets"][row + 1]))
        own = {name: batch[name][inside] for name in ("tokens", "segment", "position")}
        places = [p - inside.start for p in batch["places"].tolist() if inside.start <= p < inside.stop]
        alone = {**own, "offsets": torch.tensor([0, length], dtype=torch.int32), "lengths": [length]}
        found.append(network({**alone, "places": torch.tensor(places)}))
    torch.testing.assert_close(together, torch.cat(found), rtol=1e-4, atol=1e-5)


def test_features_that_are_not_there_are_refused():
    with pytest.raises(UserError, match=r"model\.features=lst: there are embeddings, .*did you mean 'last'"):
        BertTagger(Bert(**SMALL), features="lst")
    with pytest.raises(UserError, match=r"concat-last-4: the encoder has 2 layers; choose another"):
        BertTagger(Bert(**{**SMALL, "layers": 2}), features="concat-last-4")


# -- transformers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "name"), [
    (lambda bert: BertQuestions(bert), "BertForQuestionAnswering"),
    (lambda bert: BertTagger(bert), "BertForTokenClassification"),
])  # fmt: skip
def test_transformers_computes_the_same_with_the_exported_weights(module, name):
    transformers = pytest.importorskip("transformers", reason="transformers is not there; `make setup` installs it")
    torch.manual_seed(0)
    ours = module(Bert(**SMALL)).eval()
    config = ours.export_config("huggingface")
    assert config.pop("architectures") == [name]
    theirs = getattr(transformers, name)(transformers.BertConfig(**config, num_labels=9 if "Token" in name else 2))
    state = ours.state_dict()
    theirs.load_state_dict({other: state[own] for own, other in ours.export_names("huggingface").items()})
    batch = packed(9)
    batch["places"] = torch.arange(9)
    with torch.no_grad():
        found = theirs.eval()(batch["tokens"][None], token_type_ids=batch["segment"][None])
        if "Token" in name:
            torch.testing.assert_close(ours.network(batch), found.logits[0], rtol=1e-5, atol=1e-5)
        else:
            both = torch.stack([found.start_logits, found.end_logits])
            torch.testing.assert_close(ours.network(batch), both, rtol=1e-5, atol=1e-5)


# -- from the official files to the scores -------------------------------------------------------------------


def recipe(folder: Path, kind: str, data: str, epochs: int = 8, **options: Any) -> Path:
    """A recipe that learns in seconds; ``options`` are of the model."""
    network = {"class_path": "paperscale.papers.bert.Bert", "init_args": {**SMALL, "hidden": 64, "layers": 2}}
    words = {
        "seed_everything": 1,
        "model": {
            "class_path": f"paperscale.papers.bert_tasks.{kind}",
            "init_args": {"network": network, "lr": 2e-3, "warmup": 0.1, **options.pop("model", {})},
        },
        "data": {"class_path": f"paperscale.data.{data}", "init_args": options},
        "trainer": {
            "max_epochs": epochs,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 5,
            "check_val_every_n_epoch": 4,
        },
        "checkpoint": {"monitor": "val/f1"},
        "tracking": {"enabled": False},
    }
    (path := folder / "tiny.yaml").write_text(json.dumps(words))
    return path


def official(folder: Path) -> Path:
    """News in the layout of CoNLL-2003, with its IOB1 tags: who did what where."""
    folder.mkdir()
    things = {"ORG": ["Acme Corp", "United Nations", "Reuters", "Bayern Munich"], "MISC": ["German", "World Cup"]}
    lists = {"PER": PEOPLE, "LOC": PLACES, **things}
    forms = ["PER of ORG went to LOC .", "ORG said on Monday that MISC wine is good .", "PER , PER and PER met ."]
    forms += ["LOC and LOC are far from here .", "the MISC PER works at ORG in LOC .", "nothing else was said ."]
    for name, documents in (("eng.train", 120), ("eng.testa", 20), ("eng.testb", 20)):
        rng, lines = random.Random(name), []
        for _ in range(documents):
            lines += ["-DOCSTART- -X- O O", ""]
            for _ in range(rng.randint(1, 6)):
                for slot in rng.choice(forms).split():
                    words = rng.choice(lists[slot]).split() if slot in lists else [slot]
                    lines += [f"{word} NN I-NP {f'I-{slot}' if slot in lists else 'O'}" for word in words]
                lines.append("")
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def test_names_are_learnt_from_the_official_files_and_then_from_features(tmp_path, runs):
    source = official(tmp_path / "official")
    assert main(["data", "prepare", "conll2003", "--source", str(source), "--out", str(tmp_path / "conll2003")]) == 0
    texts = [line.split()[0] for line in (source / "eng.train").read_text().splitlines() if line]
    (tmp_path / "cased.json").write_text(train("wordpiece-cased", texts, 400).to_json())
    data = {"path": str(tmp_path / "conll2003"), "tokenizer": str(tmp_path / "cased.json"), "length": 48}
    path = recipe(tmp_path, "BertTagger", "TaggedWords", **data, global_batch_size=8, model={"words": 25.0})
    assert main(["fit", str(path), "--name", "names"]) == 0
    assert json.loads((runs / "names/results.json").read_text())["test/f1"] > 0.9
    assert main(["predict", "names"]) == 0
    found = json.loads((runs / "names/predictions.json").read_text())
    stream = TaggedWords(data["path"], tokenizer=data["tokenizer"], num_threads=0)
    documents = [batch["documents"] for batch in stream.test_dataloader()]
    sizes = {identity: size for of in documents for identity, size in zip(of.ids, of.sizes, strict=True)}
    assert {identity: [len(tags) for tags in sentences] for identity, sentences in found.items()} == sizes
    words = ["model.features=weighted-all", "model.width=32", "model.lr=1e-2", "trainer.max_epochs=3"]
    assert main(["fit", str(path), "--name", "features", "init_from=names", *words]) == 0
    assert json.loads((runs / "features/results.json").read_text())["test/f1"] > 0.9
    before, after = (weights(Run(runs / name)) for name in ("names", "features"))
    encoder = [name for name in before if name.startswith("model/network.bert.")]
    assert len(encoder) == 37
    assert all(torch.equal(before[name], after[name]) for name in encoder)


def weights(run: Run) -> dict[str, Tensor]:
    """What a run's last checkpoint holds."""
    reader = TensorReader(max(run.checkpoints.glob("step-*")))
    return {name: reader.whole(name) for name in reader.tensors}


def test_a_set_of_other_tags_is_refused_with_the_fix(tmp_path, runs, capsys):
    source = official(tmp_path / "official")
    assert main(["data", "prepare", "conll2003", "--source", str(source), "--out", str(tmp_path / "conll2003")]) == 0
    (tmp_path / "cased.json").write_text(train("wordpiece-cased", ["a b"] * 9, 400).to_json())
    data = {"path": str(tmp_path / "conll2003"), "tokenizer": str(tmp_path / "cased.json")}
    path = recipe(tmp_path, "BertTagger", "TaggedWords", **data, model={"tags": ["O", "B-X", "I-X"]})
    assert main(["fit", str(path), "--name", "names"]) == 2
    assert "set 'model.tags=[O,B-PER,I-PER" in capsys.readouterr().err


@pytest.mark.slow
def test_answers_are_learnt_and_are_the_same_over_two_processes(tmp_path, runs, tokenizer):
    made = [*questions(300, 3, 0.8)]
    path = recipe(
        tmp_path, "BertQuestions", "Questions", 12, path=write(tmp_path / "set", made), tokenizer=tokenizer,
        global_batch_size=10, length=64, stride=16, model={"no_answer": True},
    )  # fmt: skip
    assert main(["submit", str(path), "--name", "two", "--procs-per-node", "2"]) == 0
    wait_for((runs / "two/results.json").exists, 200)
    results = json.loads((runs / "two/results.json").read_text())
    assert results["test/best_f1"] >= results["test/f1"]
    assert results["test/best_f1"] > 0.8
    assert main(["test", "two"]) == 0
    (kept,) = (runs / "two/evaluations").iterdir()
    for name, value in json.loads(kept.read_text())["metrics"].items():
        assert value == pytest.approx(results[name], abs=1e-5), name
    assert main(["predict", "two"]) == 0
    found = json.loads((runs / "two/predictions.json").read_text())
    assert set(found) == {question["id"] for question in made}
    right = [found[q["id"]] == (q["answers"][0]["text"] if q["answers"] else "") for q in made]
    assert sum(right) / len(right) == pytest.approx(results["test/exact_match"], abs=1e-6)


def test_words_count_alike_however_documents_are_divided():
    torch.manual_seed(0)
    module = BertTagger(Bert(**SMALL), dropout=0.0, words=10.0)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    first, second = packed(7), packed(12)
    both = {name: torch.cat([first[name], second[name]]) for name in ("tokens", "segment", "position")}
    both |= {"offsets": torch.tensor([0, 7, 19], dtype=torch.int32), "lengths": [7, 12]}
    both |= {"places": torch.cat([first["places"], second["places"] + 7])}
    for batch, documents in ((first, 1), (second, 1), (both, 2)):
        batch |= {"tag": torch.arange(len(batch["places"])) % 9, "documents": range(documents)}
    both["tag"] = torch.cat([first["tag"], second["tag"]])
    losses = [module.training_step(batch, 0) for batch in (first, second, both)]
    torch.testing.assert_close(losses[2], (losses[0] + losses[1]) / 2)
    entropy = F.cross_entropy(module.network(first), first["tag"], reduction="sum")
    torch.testing.assert_close(losses[0], entropy / 10)
    assert isinstance(module.network, WordTags)
