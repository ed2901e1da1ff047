"""``paperscale bench train``: every way trains, is timed, compared and reported."""

from __future__ import annotations

import json

import pytest
import torch

from paperscale.bench.train import WAYS, Case, Results, markdown
from paperscale.bench.train_works import SyntheticImages, Work
from paperscale.cli import main

MINE = [way for way in WAYS if way != "ours-compile" or torch.cuda.is_available()]


@pytest.mark.slow
def test_a_quick_run_has_a_row_for_every_way(tmp_path, capsys):
    assert main(["bench", "train", "--quick", "--json", "--out", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "train.json").read_text())
    (case,) = printed["cases"]
    assert case["left_out"] == {}
    assert sorted(case["per_s"]) == sorted(MINE)
    assert all(len(rounds) == 1 and rounds[0] > 0 for rounds in case["per_s"].values())
    assert all(goal["met"] is None for goal in printed["goals"].values()), "one short round is no measurement"
    text = (tmp_path / "train.md").read_text()
    assert all(f"| {WAYS[way]} | " in text for way in MINE)


def test_synthetic_images_are_the_same_on_the_device_in_a_stream_that_moves_on(tiny_shards):
    data = SyntheticImages(str(tiny_shards), global_batch_size=32, size=16)
    device = torch.device("cpu")
    batches = [data.transfer_batch_to_device(batch, device, 0) for batch in data.train_dataloader()]
    first, second = (data.on_after_batch_transfer(batch, 0) for batch in batches[:2])
    assert first["image"] is second["image"]
    assert first["image"].shape == (32, 3, 16, 16)
    assert first["image"].dtype == torch.float32
    assert first["image"].is_contiguous(memory_format=torch.channels_last)
    assert not set(first["sample"].tolist()) & set(second["sample"].tolist())
    assert (first["cursor"].consumed, second["cursor"].consumed) == (32, 64)


def results(synthetic: float = 1.01, data: float = 0.98, rounds: int = 3, device: str = "NVIDIA H200") -> Results:
    cases = []
    for batch_size, worse in ((128, 0.0), (256, 0.005)):
        work = Work("resnet50", batch_size, 224, 8, 32, "bf16-mixed")
        case = Case(work=work, device=device, amount=batch_size, reference="torchvision's network")
        shares = {"bare": 1.0, "ours-synthetic": synthetic - worse, "ours-data": data * (synthetic - worse)}
        for number in range(-1, rounds):
            speed = 1000.0 * (number + 2)  # a machine that gets faster: ratios are taken within a round
            for way, share in shares.items():
                wall = 1e6 * batch_size / (speed * share)
                case.add({"round": number, "way": way, "wall_us": wall, "memory": 3 << 30})
        case.add({"left_out": "ours-compile", "reason": "no [compiler]"})
        cases.append(case)
    return Results(rounds=rounds, quick=False, pictures="JPEGs", cases=cases)


def test_the_goals_are_judged_by_the_worst_case_on_a_gpu():
    def met(found: Results) -> list[object]:
        return [goal["met"] for goal in found.to_json()["goals"].values()]

    found = results()
    assert found.cases[0].per_s["bare"] == pytest.approx([2000, 3000, 4000]), "the first round is not counted"
    assert [measured for _, measured in found.goals().values()] == [1.005, 0.98]
    assert met(found) == [True, True]
    assert met(results(synthetic=1.004)) == [False, True]
    assert met(results(data=0.96)) == [True, False]
    assert met(results(rounds=2)) == met(results(device="CPU")) == [None, None]


def test_the_page_says_what_was_left_out_and_what_the_figures_are_worth():
    text = markdown(results())
    row = next(line for line in text.splitlines() if line.startswith(f"| {WAYS['ours-data']} | 2,96"))
    assert row.endswith("| 0.990 [0.990..0.990] | 0.980 [0.980..0.980] | 3.00 [3.00..3.00] |")
    assert f"Left out: {WAYS['ours-compile']}, no [compiler]." in text
    assert "not met" in markdown(results(synthetic=0.99))
    assert "too few rounds" in markdown(results(rounds=2))
    assert "for a GPU" in markdown(results(device="CPU"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--networks", "resnet51"], "no network 'resnet51'"),
        (["--batch-sizes", "128,many"], "'many' is no number of images"),
    ],
)
def test_an_unknown_network_or_batch_size_is_refused(words, says, capsys):
    assert main(["bench", "train", *words]) == 2
    assert says in capsys.readouterr().err
