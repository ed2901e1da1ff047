"""ZeRO-3 whose optimizer and weights lie on a local disk between steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.testing import assert_close as assert_tensors_close

from paperscale.errors import UserError
from paperscale.training import operators
from test_strategies import assert_close, at, job, losses_and_norms, tensors, train  # noqa: F401  job is a fixture

WIDTH = 720  # so large that halves of the matrices are worth a file to DeepSpeed, which is 1 MiB


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
