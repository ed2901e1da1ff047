"""Prints what torch and the driver find here, as a line of JSON; run as a program of its own."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import warnings
from typing import Any

import torch


def main() -> None:
    """Print the facts."""
    cuda = torch.cuda.is_available()
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": _cudnn(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
        "devices": [_device(number) for number in range(torch.cuda.device_count())] if cuda else [],
        "architectures": torch.cuda.get_arch_list() if cuda else [],
        "error": None if cuda else _error(),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "driver_gpus": _driver_gpus(),
        "driver_cuda": _driver_cuda(),
    }
    print(json.dumps(facts))


def _cudnn() -> str | None:
    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return version and f"{version // 10_000}.{version % 10_000 // 100}.{version % 100}"  # of cuDNN 9 and later


def _device(number: int) -> dict[str, Any]:
    facts = torch.cuda.get_device_properties(number)
    return {"name": facts.name, "memory": facts.total_memory, "capability": [facts.major, facts.minor]}


def _error() -> str | None:
    """Return why CUDA does not start, in torch's words."""
    if not torch.backends.cuda.is_built():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.cuda.init()
        except Exception as error:  # torch raises several types
            return " ".join(str(error).split())
    return None


def _driver_gpus() -> list[str]:
    """Return the names of the GPUs that the driver knows, whatever torch can use."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return result.stdout.strip().splitlines() if result.returncode == 0 else []


def _driver_cuda() -> str | None:
    """Return the newest CUDA that the driver runs."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


if __name__ == "__main__":
    main()
