"""What may be drawn from a language model's logits, and how often it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paperscale.data.random import uniform
from paperscale.errors import UserError
from paperscale.nn.sampling import Sampling

P = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])
LOGITS = P.log()[None] + 3.0


def allowed(sampling: Sampling, logits: torch.Tensor = LOGITS) -> list[float]:
    return sampling.kept(logits).softmax(1)[0].tolist()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.05, 0.4, 0.1, 0.3, 0.15]),
        (Sampling(top_k=2), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(top_k=9), [0.05, 0.4, 0.1, 0.3, 0.15]),
        (Sampling(top_p=0.39), [0, 1, 0, 0, 0]),
        (Sampling(top_p=0.41), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(top_p=0.84), [0, 8 / 17, 0, 6 / 17, 3 / 17]),
        (Sampling(top_p=1e-9), [0, 1, 0, 0, 0]),
        (Sampling(top_k=3, top_p=0.8), [0, 4 / 7, 0, 3 / 7, 0]),  # of the three's probabilities, 0.82 are the two's
        (Sampling(0), [0, 1, 0, 0, 0]),
    ],
    ids=str,
)
def test_what_is_left_out(sampling, expected):
    assert allowed(sampling) == pytest.approx(expected, abs=1e-6)


def test_the_temperature_comes_before_what_is_left_out():
    cold = (P**2 / (P**2).sum()).tolist()
    assert allowed(Sampling(0.5)) == pytest.approx(cold, abs=1e-6)
    assert allowed(Sampling(0.5, top_p=0.56)) == pytest.approx([0, 1, 0, 0, 0]), "of cold 0.56, of warm 0.4"
    assert allowed(Sampling(1e-300)) == pytest.approx([0, 1, 0, 0, 0])


def test_of_equal_logits_no_more_than_k_are_kept():
    assert sum(p > 0 for p in allowed(Sampling(top_k=3), torch.zeros(1, 9))) == 3
    assert sum(p > 0 for p in allowed(Sampling(top_p=0.5), torch.zeros(1, 8))) == 4


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(2.0, top_k=4), Sampling(top_p=0.9)], ids=str)
def test_tokens_are_drawn_as_often_as_their_probability_says(sampling):
    draws = 20_000
    number = torch.from_numpy(uniform(7, np.arange(draws)[:, None], np.arange(5)))
    found = sampling.draw(LOGITS.expand(draws, 5), number)
    share = torch.bincount(found, minlength=5) / draws
    expected = sampling.kept(LOGITS).softmax(1)[0].float()
    error = (expected * (1 - expected) / draws).sqrt()
    assert ((share - expected).abs() <= 4 * error).all(), (share, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature -1.0: give a number of at least 0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": 0}, "top-k 0: give a number of tokens of at least 1"),
        ({"top_p": 0.0}, "top-p 0.0: give a probability above 0"),
        ({"top_p": 1.5}, "top-p 1.5"),
    ],
)
def test_values_out_of_their_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Sampling(**options)
