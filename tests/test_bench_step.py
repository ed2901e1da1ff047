"""``paperscale bench step``: every work is trained in every way, timed, compared and reported."""

from __future__ import annotations

import json

import pytest

from paperscale.bench.step import WAYS, WORLD_SIZES, Case, Results, markdown
from paperscale.bench.step_works import WORKS
from paperscale.cli import main


@pytest.mark.slow
def test_a_quick_run_has_a_row_for_every_work_way_and_number_of_ranks(tmp_path, capsys):
    assert main(["bench", "step", "--quick", "--json", "--out", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "step.json").read_text())
    measured = [(case["work"], case["world_size"]) for case in printed["cases"]]
    assert measured == [(work, size) for size in WORLD_SIZES for work in WORKS]
    for case in printed["cases"]:
        for times in (case["walls"], case["cpus"]):
            assert list(times) == list(WAYS)
            assert all(len(rounds) == 1 and rounds[0] > 0 for rounds in times.values())
    assert all(goal["met"] is None for goal in printed["goals"].values()), "one short round is no measurement"
    text = (tmp_path / "step.md").read_text()
    assert text.count(f"| {WAYS['ours-5']} | ") == len(measured)


def results(rounds: int = 5, logged_us: float = 50.0, share: float = 1.02) -> Results:
    cases = []
    for work in WORKS:
        case = Case(work, 1, "CPU")
        for way in WAYS:
            per_step = 1000.0 * (share if way.startswith("ours") else 1) + logged_us * way.endswith("5")
            case.cpus[way] = [per_step] * rounds
            case.walls[way] = [1000.0 * (share if way.startswith("ours") else 1)] * rounds
        cases.append(case)
    return Results(rounds, False, cases)


def test_the_goals_are_judged_by_the_median_of_enough_rounds():
    def met(found: Results) -> list[object]:
        return [goal["met"] for goal in found.to_json()["goals"].values()]

    assert met(results()) == [True, True]
    assert met(results(logged_us=61)) == [False, True]
    assert met(results(share=1.04)) == [True, False]
    assert met(results(rounds=4)) == [None, None]
    assert "not met" in markdown(results(share=1.04))
    assert "not judged" in markdown(results(rounds=4))
    assert results().cases[0].logging("ours") == [50.0] * 5


def test_a_goal_whose_work_was_not_measured_is_not_spoken_of():
    only = results()
    only.cases = [case for case in only.cases if case.work == "resnet20"]
    assert list(only.to_json()["goals"]) == ["ResNet-20 with 5 metrics, times the bare loop"]
    assert "µs a step (the tiny network)" not in markdown(only)
    only.cases = []
    assert "Goals" not in markdown(only)


@pytest.mark.slow
def test_works_and_numbers_of_ranks_can_be_chosen(capsys):
    assert main(["bench", "step", "--quick", "--json", "--works", "resnet20", "--ranks", "1"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [(case["work"], case["world_size"]) for case in printed["cases"]] == [("resnet20", 1)]


def test_an_unknown_work_is_refused(capsys):
    assert main(["bench", "step", "--works", "resnet21"]) == 2
    assert "no work 'resnet21'; there are tiny, resnet20, transformer" in capsys.readouterr().err
