"""``paperscale bench consolidate``: what it takes to write a divided checkpoint's weights as one file.

The checkpoint is made of random numbers, a slice at a time, as FSDP2 divides a model: each rank has some rows of each
tensor. A process of its own then writes the one file; its peak memory is what Linux says it was.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paperscale.errors import FINISHED, UserError
from paperscale.training.checkpoint import TENSOR_FILES, publish
from paperscale.training.consolidate import write_file
from paperscale.training.saving import write_durably
from paperscale.training.tensorfile import METADATA_KEY, header, tensor_file
from paperscale.training.weights import of_checkpoint

_TENSORS = 60
_SLICE = 4 << 20  # elements
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Measured:
    """What writing one file took.

    Attributes:
        dtype: of its parameters.
        parameters: of the model.
        shards: files that it was read from.
        shard_bytes: of the largest of them.
        base_bytes: resident memory of the process before it began.
        peak_bytes: resident memory at its peak.
        seconds: it took, until the file was durable.
        file_bytes: of the file.
    """

    dtype: str
    parameters: int
    shards: int
    shard_bytes: int
    base_bytes: int
    peak_bytes: int
    seconds: float
    file_bytes: int

    @property
    def copies(self) -> float:
        """Return the memory that was needed beside the program's own, in copies of the largest shard."""
        return (self.peak_bytes - self.base_bytes) / self.shard_bytes

    def __str__(self) -> str:
        return (
            f"{self.dtype}: {self.parameters:,} parameters in {self.shards} files of {self.shard_bytes / 1e6:,.0f} MB, "
            f"written as one of {self.file_bytes / 1e6:,.0f} MB in {self.seconds:.1f} s with "
            f"{(self.peak_bytes - self.base_bytes) / 1e6:,.0f} MB of memory, {self.copies:.2f} times such a file "
            f"(and {self.base_bytes / 1e6:,.0f} MB for Python and torch)"
        )


def run(options: argparse.Namespace) -> int:
    """Run the benchmark with the options of ``paperscale bench consolidate``.

    Raises:
        UserError: there is too little space on the disk.
    """
    found = measure(options.parameters, options.shards, options.folder)
    if options.json:
        print(json.dumps([{**asdict(one), "copies": one.copies} for one in found], indent=1))
        return FINISHED
    print("\n".join(map(str, found)))
    return FINISHED


def measure(parameters: int, shards: int, folder: Path | None = None) -> list[Measured]:
    """Return what one file in fp32, and one in bf16, take.

    Args:
        parameters: of the model, roughly.
        shards: files that it is read from.
        folder: where there is room for three copies of it; by default the one for temporary files.

    Raises:
        UserError: there is too little space on the disk.
    """
    with tempfile.TemporaryDirectory(prefix="paperscale-bench-", dir=folder) as name:
        free, needed = shutil.disk_usage(name).free, 9 * parameters
        if free < needed:
            raise UserError(
                f"{name}: {free / 1e9:.1f} GB are free, {needed / 1e9:.1f} GB are needed; name another place with "
                "--folder"
            )
        checkpoint = write_toy(Path(name) / "step-00000001", parameters, shards)
        return [_in_process(checkpoint, dtype) for dtype in _DTYPES]


def write_toy(checkpoint: Path, parameters: int, shards: int) -> Path:
    """Write a checkpoint of random weights, divided by rows over ``shards`` ranks; return it."""
    side = int((parameters / _TENSORS) ** 0.5) // shards * shards
    partial = checkpoint.with_name(f".{checkpoint.name}.partial")
    partial.mkdir()
    files = {}
    for rank in range(shards):
        count = side // shards * side
        table: dict[str, Any] = {}
        for number in range(_TENSORS):
            begin = number * count * 4
            offsets = [begin, begin + count * 4]
            table[f"model/layers.{number}.weight"] = {"dtype": "F32", "shape": [count], "data_offsets": offsets}
        places = {name: [[side, side], rank * count] for name in table}
        table["__metadata__"] = {"format": "pt", METADATA_KEY: json.dumps(places)}
        content = _random(header(table), _TENSORS * count, rank)
        files[tensor_file(rank)] = write_durably(partial / tensor_file(rank), content)
    facts = {"step": 1, "consumed": 0, "world_size": shards, "strategy": "FSDP2Strategy"}
    publish(partial, checkpoint, files, facts)
    return checkpoint


def _random(head: bytes, count: int, seed: int) -> Iterator[memoryview | bytes]:
    generator = np.random.default_rng(seed)
    yield head
    for start in range(0, count, _SLICE):
        yield generator.random(min(_SLICE, count - start), dtype=np.float32).view(np.uint8).data


def _in_process(checkpoint: Path, dtype: str) -> Measured:
    out = checkpoint.parent / f"{dtype}.safetensors"
    words = [sys.executable, "-m", "paperscale.bench.consolidate", str(checkpoint), str(out), dtype]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the writing process failed: {done.stderr.strip().splitlines()[-1]}; run it again")
    out.unlink()
    return Measured(**json.loads(done.stdout))


def _consolidate(checkpoint: Path, out: Path, dtype: str) -> Measured:
    """Write the one file in this process."""
    shards = [path.stat().st_size for path in checkpoint.glob(TENSOR_FILES)]
    base, start = _peak_bytes(), time.monotonic()
    weights = of_checkpoint(checkpoint)
    written = write_file(weights, out, _DTYPES[dtype])
    seconds = time.monotonic() - start
    count = sum(weight.numel for weight in weights.tensors.values())
    return Measured(dtype, count, len(shards), max(shards), base, _peak_bytes(), seconds, written["bytes"])


def _peak_bytes() -> int:
    """Return the most memory that this process has had; ``getrusage`` would count its parent's before ``exec``, too."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    print(json.dumps(asdict(_consolidate(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))))
