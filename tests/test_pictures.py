"""Pictures that a run logs, in its folder and in W&B."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from paperscale.tracking.wandb import GuardedWandbLogger, JsonlLogger
from paperscale.tracking.wandb_files import read_segment


def pixels(path: Any) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_pictures_of_all_kinds_are_written_as_they_are(tmp_path):
    logger = JsonlLogger(tmp_path / "metrics.jsonl", attempt=1)
    levels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    chw = torch.from_numpy(levels).movedim(2, 0)
    for kind, image in {
        "bytes": chw,
        "floats": chw / 255,
        "half": (chw / 255).bfloat16(),
        "numpy": levels,
        "pil": Image.fromarray(levels),
    }.items():
        logger.log_image(f"test/{kind}", image, step=3)
        difference = np.abs(pixels(tmp_path / f"media/test-{kind}-3.png").astype(int) - levels)
        assert difference.max() <= (1 if kind == "half" else 0), kind
    logger.log_image("grey", torch.full((4, 6), 0.2))
    assert (pixels(tmp_path / "media/grey.png") == 51).all()
    with pytest.raises(ValueError, match="give 1, 3 or 4 channels"):
        logger.log_image("bad", torch.zeros(5, 4, 4))


def test_several_are_one_grid_with_captions_and_a_later_attempt_replaces_it(tmp_path):
    images = [torch.full((1, 8, 8), value / 4) for value in range(5)]
    for attempt, captions in ((1, ["a"] * 5), (2, ["cat -> dog"] * 4 + ["x" * 99])):
        JsonlLogger(tmp_path / "metrics.jsonl", attempt).log_image("test/mistakes", images, 9, captions)
    facts = json.loads((tmp_path / "media/test-mistakes-9.json").read_text())
    assert facts == {"key": "test/mistakes", "step": 9, "captions": captions}
    grid = pixels(tmp_path / "media/test-mistakes-9.png")
    assert grid.shape == (2 * (96 + 4 + 14) + 4, 3 * 100 + 4, 3), "enlarged to 96, in three columns"
    assert [int(grid[50, 50 + 100 * column, 0]) for column in range(3)] == [0, 64, 128]
    assert {path.name for path in (tmp_path / "media").iterdir()} == {"test-mistakes-9.png", "test-mistakes-9.json"}


def test_a_full_disk_does_not_end_the_training(small_disk):
    logger = JsonlLogger(small_disk / "metrics.jsonl", attempt=1)
    (small_disk / "filler").write_bytes(bytes((4 << 20) - 8192))
    logger.log_image("noise", torch.rand(3, 400, 400), step=1)
    assert not [*small_disk.glob("media/*")]


class Gone:
    """A W&B run whose service has ended."""

    def log(self, row: Any) -> None:
        raise OSError("the service is gone")


@pytest.mark.slow
def test_wandb_takes_them_without_torchvision_and_its_failure_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    said: list[str] = []
    logger = GuardedWandbLogger(tmp_path, "run", "abcd1234", said.append, project="test")
    logger.log_image("test/mistakes", torch.rand(2, 3, 8, 8), 4, ["one", "two"])
    logger.finish(0)
    (segment,) = (tmp_path / "wandb").glob("offline-run-*")
    assert len([*segment.glob("files/media/images/test/*.png")]) == 2
    (row,) = read_segment(segment).history
    assert row["trainer/global_step"] == 4
    assert row["test/mistakes._type"] == "images/separated"
    logger._experiment = Gone()  # type: ignore[assignment]
    for step in (5, 6):
        logger.log_image("test/mistakes", torch.rand(2, 3, 8, 8), step, ["one", "two"])
    assert logger.lost
    assert len(said) == 1
    assert "the service is gone" in said[0]
