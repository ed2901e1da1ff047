"""ZeRO-3 whose optimizer and weights lie on a local disk between steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_strategies import assert_close, at, job, losses_and_norms, tensors, train  # noqa: F401  job is a fixture
from torch.testing import assert_close as assert_tensors_close

from paperscale.errors import UserError
from paperscale.training import operators

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
