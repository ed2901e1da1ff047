"""``paperscale bench interruption``: every way is trained, timed, compared and reported."""

from __future__ import annotations

import json

import pytest

from paperscale.bench import interruption
from paperscale.bench.interruption import WAYS, Results
from paperscale.cli import main
from paperscale.errors import UserError


def test_a_quick_run_has_a_row_for_every_way(tmp_path, capsys):
    assert main(["bench", "interruption", "--quick", "--json", "--out", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "interruption.json").read_text())
    assert list(printed["walls"]) == list(printed["cpus"]) == list(WAYS)
    assert all(
        len(times) == 1 and times[0] > 0 for way in WAYS for times in (printed["walls"][way], printed["cpus"][way])
    )
    assert printed["goal"]["met"] is None, "one short round is no measurement"
    text = (tmp_path / "interruption.md").read_text()
    assert all(f"| {title} | " in text for title in WAYS.values())
    assert f"torch {printed['versions']['torch']}" in text


def test_costs_are_compared_within_a_round_and_judged_by_their_median():
    walls = {way: [100.0, 200.0, 400.0, 100.0, 100.0] for way in WAYS}
    walls["ours"] = [104.0, 208.0, 800.0, 104.0, 104.0]
    results = Results(5, 10, "CPU, Gloo", walls, walls)
    assert results.ratios("ours") == [1.04, 1.04, 2.0, 1.04, 1.04]
    assert results.met is True
    walls["ours"] = [2 * time for time in walls["none"]]
    assert results.met is False
    assert "not met" in interruption.markdown(results)


def test_a_rank_that_fails_ends_the_benchmark_with_its_reason(monkeypatch):
    monkeypatch.setenv("PYTHONHOME", "/no/such/python")
    with pytest.raises(UserError, match=r"rank 0 of the benchmark ended with exit code .*; run it again"):
        interruption.measure(1, 1)
