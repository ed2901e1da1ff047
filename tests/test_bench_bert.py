"""``paperscale bench bert``: every way trains on the same, is timed, compared and reported."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from paperscale.bench import bert_works as works
from paperscale.bench.bert import WAYS, WORKS, Case, Results, markdown
from paperscale.bench.bert_works import Work
from paperscale.bench.trainings_rank import take_turns
from paperscale.cli import main
from paperscale.data import SegmentPairs

MINE = [way for way in WAYS if torch.cuda.is_available() or not way.endswith("-compile")]
TINY = Work("tiny", 64, 6, 1, 1, "32-true")


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A packed batch of sequences of several lengths."""
    folder = tmp_path_factory.mktemp("documents")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(works, "DOCUMENTS", folder / "missing")
        assert works.write_documents(folder, [TINY]).startswith("64 documents drawn at random")
    data = SegmentPairs(str(folder), global_batch_size=6, length=64, val=None, short_sequences=0.5, seed=3)
    found: dict[str, Any] = next(iter(data.train_dataloader()))
    assert len(set(found["lengths"])) > 2
    return found


@pytest.mark.slow
def test_a_quick_run_has_a_row_for_every_way(tmp_path, capsys):
    assert main(["bench", "bert", "--quick", "--json", "--out", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "bert.json").read_text())
    (case,) = printed["cases"]
    theirs = (
        {way for way in MINE if way.startswith("huggingface")} if "transformers" not in printed["versions"] else set()
    )
    assert set(case["left_out"]) == theirs
    assert set(case["per_s"]) == set(MINE) - theirs
    assert all(len(rounds) == 1 and rounds[0] > 0 for rounds in case["per_s"].values())
    assert all(goal["met"] is None for goal in printed["goals"].values()), "one short round is no measurement"
    text = (tmp_path / "bert.md").read_text()
    assert all(f"| {WAYS[way]} | " in text for way in set(MINE) - theirs)


def test_both_loops_begin_with_the_same_loss_and_the_same_gradient(batch):
    pytest.importorskip("transformers", reason="transformers is not there; `make setup` installs it")
    ours = works.pretraining(TINY, dropout=0.0)
    theirs: Any = works.huggingface(ours)
    assert theirs.config._attn_implementation == "sdpa"
    loss = works.loss_of(ours.network, works.weighed_as_theirs(batch))
    padded = works.padded(batch)
    assert padded["attention_mask"].sum(1).tolist() == batch["lengths"]
    assert (padded["labels"] != -100).sum() == len(batch["targets"])
    other = theirs(**padded).loss
    assert loss.item() == pytest.approx(other.item(), abs=1e-5)
    for one in (loss, other):
        one.backward()
    mine = ours.network.bert
    for a, b in (
        (mine.embeddings.token.weight, theirs.bert.embeddings.word_embeddings.weight),
        (mine.layers[0].attention.query.weight, theirs.bert.encoder.layer[0].attention.self.query.weight),
    ):
        assert a.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_operations_are_those_that_torch_counts(batch):
    module = works.pretraining(TINY)  # with dropout, so that attention is made of products on a CPU
    with FlopCounterMode(display=False) as counter:
        works.loss_of(module.network, batch).backward()
    assert module.training_flops(batch) == counter.get_total_flops()


def test_without_transformers_its_way_is_left_out_with_a_word(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setenv("RANK", "0")

    def theirs(warm_up: int, steps: int) -> dict[str, float]:
        works.huggingface(works.pretraining(TINY))
        raise AssertionError

    ways = {"huggingface": theirs, "bare": lambda warm_up, steps: {"wall_us": 1.0}}
    take_turns(tmp_path, ways, 1, 1, 1, torch.device("cpu"))
    rows = [json.loads(line) for line in (tmp_path / "0.jsonl").read_text().splitlines()]
    reason = "transformers is not installed; `pip install transformers`"
    assert rows[0] == {"left_out": "huggingface", "reason": reason}
    assert [row["way"] for row in rows[1:]] == ["bare", "bare"]


def results(ours: float = 1.6, bare: float = 1.62, rounds: int = 3, device: str = "NVIDIA H200") -> Results:
    cases = []
    peak = 0.0 if device == "CPU" else 989e12
    for name, worse in (("large-128", 0.0), ("large-512", 0.05)):
        case = Case(work=WORKS[name], device=device, amount=30_000.0, padding=0.1, flops=60e12, peak=peak)
        for number in range(-1, rounds):
            for way, share in {"huggingface": 1.0, "bare": bare, "ours": ours - worse}.items():
                wall = 1e6 * 0.16 / (share * (number + 2))  # a machine that gets faster: ratios are of a round
                case.add({"round": number, "way": way, "wall_us": wall, "memory": None if not peak else 3 << 30})
        case.add({"left_out": "ours-compile", "reason": "no [compiler]"})
        cases.append(case)
    return Results(rounds=rounds, quick=False, documents="4 documents", cases=cases)


def test_the_goals_are_those_of_the_device_and_judged_by_the_worst_case():
    found = results()
    assert found.cases[0].per_s["huggingface"] == pytest.approx([30_000 / 0.08, 30_000 / 0.16 * 3, 30_000 / 0.04])
    goals = list(found.to_json()["goals"].values())
    assert [goal["at_least"] for goal in goals] == [1.5, 0.97, 0.5]
    assert [goal["measured"] for goal in goals] == pytest.approx(
        [1.55, 1.55 / 1.62, 60 / 989 * 3 * 1.55 / 0.16], abs=1e-3
    )
    assert [goal["met"] for goal in goals] == [True, False, True]
    assert [goal["met"] for goal in results(rounds=2).to_json()["goals"].values()] == [None] * 3
    goals = list(results(ours=1.34, bare=1.3, device="CPU").to_json()["goals"].values())
    assert [(goal["at_least"], goal["met"]) for goal in goals] == [(1.3, False), (0.97, True)]


def test_the_page_has_the_columns_that_there_are_figures_for():
    text = markdown(results())
    assert "| training | tokens/s | times transformers | times hand-written | MFU | GPU memory, GiB |" in text
    assert f"Left out: {WAYS['ours-compile']}, no [compiler]." in text
    assert "needs 60 x 10^12 operations; 10.0 % of a padded batch is padding" in text
    text = markdown(results(device="CPU"))
    assert "| training | tokens/s | times transformers | times hand-written |\n" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--works", "tiny-12"], "no work 'tiny-12'"),
        (["--precision", "fp16"], "no precision 'fp16'"),
    ],
)
def test_an_unknown_work_or_precision_is_refused(words, says, capsys):
    assert main(["bench", "bert", *words]) == 2
    assert says in capsys.readouterr().err


def test_documents_of_a_set_are_taken_with_its_tokenizer(batch, tmp_path, monkeypatch):
    set_folder = Path(tmp_path / "set")
    monkeypatch.setattr(works, "DOCUMENTS", tmp_path / "missing")
    works.write_documents(set_folder, [TINY])
    monkeypatch.setattr(works, "DOCUMENTS", set_folder)
    says = works.write_documents(tmp_path / "taken", [TINY])
    assert says == f"64 documents of {set_folder}"
    tokenizers = [folder / "tokenizer.json" for folder in (set_folder, tmp_path / "taken")]
    assert tokenizers[0].read_bytes() == tokenizers[1].read_bytes()
