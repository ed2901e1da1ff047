"""A learning rate is found where the loss falls fastest, on the recipe's own data, and nothing is kept of it."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from paperscale.cli import main
from paperscale.errors import UserError
from paperscale.training.lr_finder import steepest


@pytest.mark.slow
def test_the_rate_that_is_found_is_one_that_trains(tiny_recipe, runs, capsys, monkeypatch):
    """The recipe's own, chosen by hand, is 0.05."""
    monkeypatch.chdir(tiny_recipe.parent)
    words = ["lr-find", str(tiny_recipe), "--max-lr", "10", "--steps", "80", "--svg", "curve.svg"]
    assert main([*words, "data.micro_batch_size=20"]) == 0
    out = capsys.readouterr().out
    found = re.search(r"^model\.lr=(\S+)$", out, re.MULTILINE)
    assert found
    assert 0.005 < float(found[1]) < 0.5
    assert "O" in out
    picture = ElementTree.parse(tiny_recipe.parent / "curve.svg").getroot()
    assert len(picture.findall(".//{*}polyline")) == 1
    assert sorted(path.name for path in tiny_recipe.parent.iterdir()) == ["curve.svg", "tiny.yaml"], "no run, no state"


def test_the_descent_is_over_the_logarithm_and_before_the_minimum():
    rates = np.geomspace(1e-8, 1, 100).tolist()
    rng = np.random.default_rng(0)
    falls = [2 - 1.5 / (1 + math.exp(-4 * (math.log10(rate) + 3))) for rate in rates]  # steepest at 1e-3
    noisy = [loss + 0.01 * noise for loss, noise in zip(falls, rng.normal(size=100), strict=True)]
    exploding = [*noisy[:92], *(loss * 3 ** (i + 1) for i, loss in enumerate(noisy[92:98])), math.nan]
    for losses in (noisy, exploding):
        found = steepest(rates[: len(losses)], losses, 100)
        assert 3e-4 < found.rate < 3e-3
        assert found.diverged == (losses is exploding)


def test_a_sweep_that_finds_nothing_says_what_to_do(tiny_recipe, capsys):
    rates = np.geomspace(1e-8, 1, 100).tolist()
    with pytest.raises(UserError, match=r"falls nowhere between 1e-08 and 1; try a smaller --min-lr, a larger"):
        steepest(rates, list(np.linspace(1, 5, 100)), 100)
    assert main(["lr-find", str(tiny_recipe), "--min-lr", "1", "--max-lr", "0.1"]) == 2
    assert "give 0 < min < max" in capsys.readouterr().err
