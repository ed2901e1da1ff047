"""One recipe line picks the strategy; neither the losses nor the checkpoint depend on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from paperscale.training.strategies.batchnorm import normalise_in_32_bits
from paperscale.training.tensorfile import TensorReader
from processes import all_say, start_ranks

ALL = ("ddp", "fsdp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3")
CLOSE = {"rtol": 0.0, "atol": 2e-5}
"""Sums in another order differ in the last bits, and Adam's division enlarges that."""


def train(folder: Path, world_size: int, jobs: list[dict[str, Any]]) -> list[list[float]]:
    """Train one job after another in one group of processes; return each one's losses."""
    return [found["losses"] for found in losses_and_norms(folder, world_size, jobs)]


def losses_and_norms(folder: Path, world_size: int, jobs: list[dict[str, Any]]) -> list[dict[str, list[float]]]:
    (out := folder / "out.jsonl").unlink(missing_ok=True)
    ranks_say(folder, world_size, jobs)
    return [json.loads(line) for line in out.read_text().splitlines()]


def ranks_say(folder: Path, world_size: int, jobs: list[dict[str, Any]]) -> list[str]:
    """Start the ranks; return what each has printed."""
    return all_say(start_ranks(Path(__file__).with_name("strategy_rank.py"), world_size, folder, json.dumps(jobs)))


@pytest.fixture
def job(tmp_path: Path, tiny_shards: Path):
    def make(strategy: Any, steps: int, name: str = "", **settings: Any) -> dict[str, Any]:
        save = tmp_path / (name or str(strategy))
        return {"strategy": strategy, "steps": steps, "data": str(tiny_shards), "save": str(save), **settings}

    return make


def at(folder: Path, step: int) -> str:
    return str(folder / f"step-{step:08d}")


def tensors(checkpoint: str) -> dict[str, torch.Tensor]:
    reader = TensorReader(Path(checkpoint))
    return {name: reader.whole(name).float() for name in sorted(reader.tensors)}


def assert_close(first: list[float], second: list[float], what: Any = "") -> None:
    torch.testing.assert_close(torch.tensor(first), torch.tensor(second), **CLOSE, msg=lambda text: f"{what}: {text}")


def test_a_checkpoint_is_continued_by_any_strategy(tmp_path, job):
    jobs = [job("ddp", 12, "whole"), job("ddp", 5, "0-ddp")]
    chain = ["deepspeed_zero2", "fsdp", "deepspeed_zero3", "deepspeed_zero1", "ddp"]
    before, step = "0-ddp", 5
    for number, strategy in enumerate(chain, 1):
        name = f"{number}-{strategy}"
        last = step + 1 if number < len(chain) else 12
        jobs.append(job(strategy, last, name, resume=at(tmp_path / before, step)))
        before, step = name, last
    whole, *parts = train(tmp_path, 2, jobs)
    assert_close([loss for part in parts for loss in part], whole)
    first, last = tensors(at(tmp_path / "whole", 12)), tensors(at(tmp_path / before, 12))
    assert first.keys() == last.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(last[name], tensor, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
def test_losses_agree_over_50_steps(tmp_path, job):
    losses = train(tmp_path, 2, [job(strategy, 50) for strategy in ALL])
    for strategy, found in zip(ALL, losses, strict=True):
        assert len(found) == 50
        assert_close(found, losses[0], strategy)


@pytest.mark.slow
def test_accumulation_changes_neither_losses_nor_gradients(tmp_path, job):
    strategies = (*ALL, "deepspeed_zero2_offload", "deepspeed_zero3_offload")
    kinds = [(strategy, size) for strategy in strategies for size in (16, 8, 4)]
    jobs = [job(strategy, 20, f"{strategy}-{size}", micro_batch_size=size) for strategy, size in kinds]
    two = losses_and_norms(tmp_path, 2, jobs)
    alone = losses_and_norms(tmp_path, 1, [{**one, "save": f"{one['save']}-alone"} for one in jobs])
    for kind, found in [*zip(kinds, two, strict=True), *zip(kinds, alone, strict=True)]:
        assert_close(found["losses"], two[0]["losses"], kind)
        assert_close(found["norms"], two[0]["norms"], kind)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_strategy_continues_every_other_at_any_world_size(tmp_path, job, world_size):
    whole, *_ = train(tmp_path, 2, [job("ddp", 12, "whole"), *(job(strategy, 5, f"of-{strategy}") for strategy in ALL)])
    pairs = [(first, second) for first in ALL for second in ALL]
    jobs = [job(b, 12, f"{a}-{b}", resume=at(tmp_path / f"of-{a}", 5)) for a, b in pairs]
    for (first, second), losses in zip(pairs, train(tmp_path, world_size, jobs), strict=True):
        assert_close(losses, whole[5:], (first, second))
        if first == second == "ddp" and world_size == 2:
            assert losses == whole[5:], "the same strategy and world size: to the bit"


@pytest.mark.slow
def test_norms_and_dropped_steps_are_the_same_under_every_strategy(tmp_path, job):
    strategies = (*ALL, "deepspeed_zero2_offload", "deepspeed_zero3_offload")
    found = losses_and_norms(tmp_path, 2, [job(strategy, 10, clip=0.5, drop=4) for strategy in strategies])
    plain = losses_and_norms(tmp_path, 2, [job("ddp", 10, "plain", clip=None)])[0]
    assert max(found[0]["norms"]) > 0.5, "it is clipped"
    assert found[0]["losses"] != plain["losses"]
    for strategy, one in zip(strategies, found, strict=True):
        assert_close(one["losses"], found[0]["losses"], strategy)
        assert_close(one["norms"], found[0]["norms"], strategy)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_16_bit_precision_trains_and_is_continued(tmp_path, job, precision):
    jobs = [job(s, 5, f"{s}-{precision}", precision=precision) for s in ALL]
    jobs += [job(s, 10, f"more-{s}", precision=precision, resume=at(tmp_path / f"{s}-{precision}", 5)) for s in ALL]
    jobs += [job(s, 10, f"whole-{s}", precision=precision) for s in ALL]
    exact = train(tmp_path, 2, [job("ddp", 10, "exact")])[0]
    found = train(tmp_path, 2, jobs)
    for number, strategy in enumerate(ALL):
        first, more, whole = (found[number + len(ALL) * part] for part in range(3))
        assert first + more == whole, f"{strategy}: to the bit"
        torch.testing.assert_close(torch.tensor(whole), torch.tensor(exact), rtol=0.0, atol=0.1)


@pytest.mark.slow
def test_state_on_the_cpu_is_continued_without(tmp_path, job):
    offloading = ("deepspeed_zero2_offload", "deepspeed_zero3_offload")
    jobs = [job("ddp", 10, "whole")]
    for number, strategy in enumerate(offloading):
        jobs.append(job(strategy, 5, f"on-cpu-{number}"))
        jobs.append(job("ddp", 10, f"off-{number}", resume=at(tmp_path / f"on-cpu-{number}", 5)))
        jobs.append(job(strategy, 10, f"on-{number}", resume=at(tmp_path / f"on-cpu-{number}", 5)))
    whole, *found = train(tmp_path, 2, jobs)
    for number in range(len(offloading)):
        first, off, on = found[3 * number : 3 * number + 3]
        assert_close(first + off, whole, offloading[number])
        assert_close(first + on, whole, offloading[number])


@pytest.mark.slow
def test_no_process_holds_a_divided_model_wholly(tmp_path, job):
    """FSDP2 needs its half of the weights, and one tensor more while it makes them."""
    for said in ranks_say(tmp_path, 2, [job("fsdp", 2, width=4000, memory=True)]):
        found = json.loads(next(line for line in said.splitlines() if line.startswith('{"weights"')))
        assert found["weights"] > 480
        assert found["grown"] < 0.5 * found["weights"] + 2 * 122 + 40, found  # MiB: the largest tensor has 122


@pytest.mark.parametrize("batches", [True, False])
def test_batch_normalisation_in_32_bits_is_torchs_own(batches):
    torch.manual_seed(0)
    own, other = (torch.nn.BatchNorm2d(3, momentum=None if batches else 0.1).train(batches) for _ in range(2))
    normalise_in_32_bits(other)
    for _ in range(2):
        image = torch.randn(4, 3, 5, 5)
        torch.testing.assert_close(other(image), own(image), rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(own.buffers(), other.buffers(), strict=True))
    assert other.bfloat16()(image.bfloat16()).dtype is torch.bfloat16


@pytest.mark.slow
def test_optimizers_stepped_by_hand_train_alike_divided_or_not_and_are_continued(tmp_path, job):
    """Two optimizers of a step count two steps."""
    own = {"by_hand": True, "clip": None}
    jobs = [job(s, 16, f"whole-{s}", **own) for s in ("ddp", "fsdp")]
    jobs += [job("fsdp", 8, "half", **own), job("ddp", 16, "rest", resume=at(tmp_path / "half", 8), **own)]
    ddp, fsdp, half, rest = train(tmp_path, 2, jobs)
    assert len(ddp) == 8
    assert_close(fsdp, ddp)
    assert_close(half + rest, ddp)
