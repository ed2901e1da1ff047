"""ZeRO-3 whose optimizer and weights lie on a local disk between steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.testing import assert_close as assert_tensors_close

from paperscale.errors import UserError
from paperscale.training import operators
from paperscale.training.strategies.nvme import SwapFolder
from test_strategies import assert_close, at, job, losses_and_norms, tensors, train  # noqa: F401  job is a fixture

WIDTH = 725  # halves of the matrices are worth a file to DeepSpeed, which is 1 MiB, and fill no whole blocks

_HOLD = """
import time
from paperscale.training.strategies.nvme import SwapFolder
folder = SwapFolder({!r})
print(folder.path, flush=True)
time.sleep(60)
"""


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a disk, and DeepSpeed's operator that writes into it."""
    try:
        operators.build(["async_io"], "cpu")
    except UserError as error:
        pytest.skip(str(error))
    (folder := tmp_path / "disk").mkdir()
    monkeypatch.setenv("PAPERSCALE_NVME", str(folder))
    return folder


ON_DISK: dict[str, Any] = {
    "optimizer": {"class": "ZeroStrategy", "arguments": {"stage": 3, "offload_optimizer": "nvme", "bucket_mb": 1}},
    "weights": {"class": "ZeroStrategy", "arguments": {"stage": 3, "offload_parameters": "nvme"}},
    "both": "deepspeed_zero3_nvme",
}


@pytest.fixture
def wide(job: Any) -> Any:  # noqa: F811  the fixture
    """Make jobs that train a network so wide that DeepSpeed offloads its matrices."""
    return lambda *args, **settings: job(*args, width=WIDTH, lr=3e-5, **settings)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world_size", [1, 2])
def test_state_on_a_disk_is_continued_without_and_the_reverse(tmp_path, wide, disk, world_size):
    settings: dict[str, Any] = {"clip": 4.0, "frozen": "blocks.1.outer", "decay": 0.5}
    jobs = [wide("ddp", 10, "whole", **settings), wide("ddp", 5, "off", **settings)]
    for name, strategy in ON_DISK.items():
        jobs += [
            wide(strategy, 5, name, **settings),
            wide("ddp", 10, f"{name}-off", resume=at(tmp_path / name, 5), **settings),
            wide(strategy, 10, f"{name}-on", resume=at(tmp_path / name, 5), **settings),
            wide(strategy, 10, f"off-{name}", resume=at(tmp_path / "off", 5), **settings),
        ]
    whole, off, *found = train(tmp_path, world_size, jobs)
    assert min(whole) > 0.5, "it is still learning"
    last = tensors(at(tmp_path / "whole", 10))
    assert any(name.startswith("ema/") for name in last)
    for number, name in enumerate(ON_DISK):
        first, *continued = found[4 * number : 4 * number + 4]
        for before, way, after in zip((first, first, off), ("off", "on", name), continued, strict=True):
            assert_close(before + after, whole, (name, way))
        for end in (f"{name}-off", f"{name}-on", f"off-{name}"):
            held = tensors(at(tmp_path / end, 10))
            assert held.keys() == last.keys()
            for key, tensor in held.items():
                assert_tensors_close(tensor, last[key], rtol=0.0, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")
    assert not list(disk.iterdir()), "files end with their process"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_dropped_steps_and_16_bits_leave_the_disk_as_they_leave_memory(tmp_path, wide, disk):
    split = {"stage": 3, "offload_optimizer": "nvme", "offload_parameters": "nvme", "bucket_mb": 1}
    in_memory: Any = "deepspeed_zero3_offload"
    on_disk: Any = {"class": "ZeroStrategy", "arguments": split}
    kinds: list[dict[str, Any]] = [{"drop": 3, "clip": 4.0}, {"precision": "bf16-mixed", "clip": None}]
    jobs = [
        wide(strategy, 8, f"{number}-{kind}", **settings)
        for number, strategy in enumerate((in_memory, on_disk))
        for kind, settings in enumerate(kinds)
    ]
    dropped, coarse, dropped_on_disk, coarse_on_disk = losses_and_norms(tmp_path, 2, jobs)
    assert coarse_on_disk["losses"] == coarse["losses"], "to the bit"
    assert_close(dropped_on_disk["losses"], dropped["losses"])
    assert_close(dropped_on_disk["norms"], dropped["norms"])


def test_a_folder_ends_with_its_process_or_with_the_next_one(tmp_path):
    killed = subprocess.Popen(
        [sys.executable, "-c", _HOLD.format(str(tmp_path))], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert killed.stdout is not None
    assert "\n" in killed.stdout.readline()
    beside = SwapFolder(str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2, "the other's process lives"
    killed.kill()
    killed.wait()
    after = SwapFolder(str(tmp_path))
    assert {str(path) for path in tmp_path.iterdir()} == {beside.path, after.path}


def test_a_disk_that_does_not_serve_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    with pytest.raises(
        UserError, match=r"^nvme_path=\$SCRATCH/none cannot .*: No such file.*; name a folder .* in PAPER"
    ):
        SwapFolder("$SCRATCH/none")
    with pytest.raises(UserError, match=r"GB free, and .* or more are offloaded to it; free some, use more nodes"):
        SwapFolder("$SCRATCH").require(1 << 60)
