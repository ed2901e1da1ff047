"""``TokenMeter``: real tokens a second over all ranks, and the share of the GPUs' peak."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from meter_rank import FLOPS, Clock, Reader, batches, metered
from paperscale.errors import UserError
from paperscale.papers.bert import Bert, BertClassifier, BertPretraining
from paperscale.tracking.wandb import JsonlLogger
from paperscale.training import meter
from paperscale.training.logbook import Logbook
from processes import all_say, start_ranks


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    for name in ("time", "peak_rate"):
        monkeypatch.setattr(meter, name, getattr(meter, name))  # what the test replaces comes back
    return Clock()


def test_a_row_has_the_tokens_of_the_steps_since_the_row_before_without_validation(clock, tmp_path):
    trainer = Trainer(
        accelerator="cpu",
        max_steps=6,
        log_every_n_steps=2,
        val_check_interval=3,
        callbacks=[Logbook(), metered(clock)],
        logger=JsonlLogger(tmp_path / "metrics.jsonl", 1),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Reader(clock), batches(0, 6), batches(0, 1))
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [row["speed/tokens_per_s"] for row in written if "speed/tokens_per_s" in row]
    assert rates == [20 / 2, (30 + 40) / 4, (50 + 60) / 4], "the first step, of 10 tokens, is left out"
    assert [row["speed/mfu"] for row in written if "speed/mfu" in row] == pytest.approx(
        [r * FLOPS / 100 for r in rates]
    )


def test_the_tokens_of_all_ranks_are_counted():
    ranks = start_ranks(Path(__file__).with_name("meter_rank.py"), 2, 4)
    for said in all_say(ranks):
        found = json.loads(said.splitlines()[-1])
        assert found["speed/tokens_per_s"] == pytest.approx((30 + 40 + 300 + 400) / 4)
        assert found["speed/mfu"] == pytest.approx(FLOPS * (30 + 40 + 300 + 400) / 4 / (2 * 100))


def test_tokens_are_those_of_the_sequences_or_of_the_block():
    assert meter.tokens_of({"lengths": [3, 4], "tokens": torch.zeros(7)}) == 7
    assert meter.tokens_of({"tokens": torch.zeros(2, 8)}) == 16
    with pytest.raises(UserError, match="TokenMeter counts the `lengths` or `tokens` of a batch"):
        meter.tokens_of({"image": torch.zeros(2, 8)})


def test_a_cpu_has_no_peak_and_bert_says_what_it_computes():
    assert meter.peak_rate(torch.device("cpu"), "bf16-mixed") == 0
    batch = {"lengths": [5, 3], "places": torch.zeros(2)}
    network = Bert(layers=2, hidden=32, heads=4, vocab_size=100)
    encoder = 6 * (2 * 12 * 32 * 32) * 8 + 12 * 2 * 32 * (25 + 9)
    assert BertClassifier(network).training_flops(batch) == encoder
    assert BertPretraining(network).training_flops(batch) == encoder + 6 * 32 * (2 * (32 + 100) + 2 * (32 + 2))
    assert BertPretraining(network, pairs=False).training_flops(batch) == encoder + 6 * 32 * 2 * (32 + 100)
