"""``paperscale bench checkpoint``: every way writes, is timed, compared and reported."""

from __future__ import annotations

import json

import pytest

from paperscale.bench import checkpoint
from paperscale.bench.checkpoint import WAYS, Case, Results
from paperscale.cli import main


@pytest.mark.slow
def test_a_quick_run_has_a_row_for_every_way(tmp_path, capsys):
    assert main(["bench", "checkpoint", "--quick", "--json", "--out", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "checkpoint.json").read_text())
    (case,) = printed["cases"]
    assert list(case["ways"]) == list(WAYS)
    for figures in case["ways"].values():
        assert all(figures[name][0] > 0 for name in ("step_ms", "first_ms", "stall_ms", "slowed", "write_s"))
    assert printed["goal"]["met"] is None, "one short round is no measurement"
    text = (tmp_path / "checkpoint.md").read_text()
    assert all(f"| {title} | " in text for title in WAYS.values())


def test_stalls_are_compared_within_a_round_and_judged_by_their_median():
    def case(stall: float) -> Case:
        figures = {
            "stall_ms": [100.0, 200.0, 300.0],
            "step_ms": [100.0, 100.0, 100.0],
            "first_ms": [1.0, 1.0, 1.0],
            "slowed": [1.0, 1.0, 1.0],
            "write_s": [1.0, 1.0, 1.0],
            "memory": [2e6, 2e6, 2e6],
        }
        ours = {**figures, "stall_ms": [stall, 2 * stall, 10 * stall]}
        return Case("small", "a small model", 2.0, "CPU", {way: ours if way == "ours" else figures for way in WAYS})

    results = Results(3, [case(10.0)])
    assert results.cases[0].times_ours("lightning") == [10.0, 10.0, 3.0]
    assert results.cases[0].memory("ours") == [1.0, 1.0, 1.0]
    assert results.met is True
    slower = Results(3, [case(10.0), case(60.0)])
    assert slower.met is False
    assert "not met" in checkpoint.markdown(slower)
