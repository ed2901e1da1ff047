"""Python, the packages, torch and what it finds, DeepSpeed's operators."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paperscale.doctor.findings import Asked
from paperscale.findings import Finding
from paperscale.training import operators

COMPROMISED_LIGHTNING = ("2.6.2", "2.6.3")
_NAMED = ("torch", "lightning", "torchmetrics", "webdataset", "wandb")  # a line each; the others share one
_STALE_S = 600.0  # no operator takes longer to compile
_TORCH = Path(__file__).with_name("torch_facts.py")
_INSTALL_DEEPSPEED = "pip install 'paperscale[deepspeed]'"


def python(asked: Asked) -> Iterator[Finding]:
    """Is this Python supported?"""
    version = platform.python_version()
    supported = (3, 10) <= sys.version_info[:2] <= (3, 13)
    yield Finding("OK" if supported else "FAIL", "Python", version, "" if supported else "use Python 3.10 to 3.13")


def packages(asked: Asked) -> Iterator[Finding]:
    """Are the packages there, in versions that Paperscale works with?"""
    from packaging.requirements import Requirement

    requirements = [Requirement(line) for line in importlib.metadata.requires("paperscale") or []]
    needed = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    others = []
    for requirement in sorted(needed, key=lambda r: _NAMED.index(r.name) if r.name in _NAMED else len(_NAMED)):
        check = package(requirement.name, str(requirement.specifier))
        if (requirement.name in _NAMED and requirement.name != "torch") or check.level != "OK":
            yield check
        else:
            others.append(f"{requirement.name} {check.found}")
    yield Finding("OK", "packages", f"{len(others)} more, as they are needed")
    if (other := _version("pytorch-lightning")) in COMPROMISED_LIGHTNING:
        fix = "pip uninstall pytorch-lightning, and change the keys that this machine holds"
        yield Finding("FAIL", "pytorch-lightning", f"{other} is a compromised release", fix)


def package(name: str, specifier: str) -> Finding:
    """Return what is to be said of a package.

    Args:
        name: its name.
        specifier: the versions that Paperscale works with, such as ``>=2.6,<3``.
    """
    from packaging.specifiers import SpecifierSet

    version = _version(name)
    install = f"pip install '{name}{specifier}'"
    if version is None:
        return Finding("FAIL", name, "not installed", install)
    if name == "lightning" and version in COMPROMISED_LIGHTNING:
        fix = f"{install}, and change the keys that this machine holds"
        return Finding("FAIL", name, f"{version} is a compromised release", fix)
    if not SpecifierSet(specifier).contains(version, prereleases=True):
        return Finding("FAIL", name, f"{version}, Paperscale works with {specifier}", install)
    return Finding("OK", name, version)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch(asked: Asked) -> Iterator[Finding]:
    """Can torch use what this machine has?  Asked in a process of its own, which a broken driver cannot take along."""
    version = _version("torch")
    if asked.quick or version is None:
        yield from [Finding("OK", "torch", version)] if version else []
        return
    result = subprocess.run([sys.executable, _TORCH], capture_output=True, text=True, timeout=55)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        yield Finding("FAIL", "torch", f"{version} cannot be imported: {reason}", "install torch anew")
        return
    yield from judge_torch(json.loads(result.stdout.splitlines()[-1]))


def judge_torch(facts: dict[str, Any]) -> Iterator[Finding]:
    """Yield the findings on what ``torch_facts.py`` has printed."""
    libraries = [f"{name} {facts[key]}" for name, key in _LIBRARIES.items() if facts[key]]
    yield Finding("OK", "torch", ", ".join([facts["torch"], *libraries]))
    seen, driver, cuda = facts["devices"], facts["driver_gpus"], facts["cuda"]
    if not driver and not seen:
        yield Finding("OK", "GPUs", "none: trains on the CPU")
    elif not cuda and not facts["hip"]:
        found = f"{len(driver)} of {driver[0]}, but this torch is built for the CPU"
        yield Finding("FAIL", "GPUs", found, "install torch for CUDA: https://pytorch.org/get-started/locally")
    elif len(seen) < len(driver) and not facts["visible"]:
        found = f"torch sees {len(seen)} of {len(driver)}: {facts['error'] or 'no reason given'}"
        yield Finding("FAIL", "GPUs", found, _driver_fix(cuda, facts["driver_cuda"]))
    else:
        yield from _kernels(seen, facts["architectures"])
    if driver and cuda and facts["driver_cuda"]:
        yield _driver(cuda, facts["driver_cuda"])
    if (cuda or facts["hip"]) and not facts["nccl"]:
        yield Finding("FAIL", "NCCL", "this torch has none: GPUs cannot train together", "install the official torch")


_LIBRARIES = {"CUDA": "cuda", "ROCm": "hip", "cuDNN": "cudnn", "NCCL": "nccl"}


def _kernels(seen: list[dict[str, Any]], architectures: list[str]) -> Iterator[Finding]:
    """Has torch kernels for these GPUs?  Code for ``sm_80`` runs on 8.0 to 8.9; ``compute_90`` on 9.0 and later."""
    if not seen:
        yield Finding("OK", "GPUs", "none is visible (CUDA_VISIBLE_DEVICES): trains on the CPU")
        return
    names = {f"{gpu['name']}, {gpu['memory'] / 2**30:.0f} GiB" for gpu in seen}
    found = f"{len(seen)} of {' and '.join(sorted(names))}"
    for major, minor in sorted({tuple(gpu["capability"]) for gpu in seen}):
        if architectures and not any(_runs_on(name, major, minor) for name in architectures):
            has = f"sm_{major}{minor}; torch has code for {', '.join(architectures)}"
            yield Finding("FAIL", "GPUs", f"{found}, {has}", "install a torch built for this GPU")
            return
    yield Finding("OK", "GPUs", found)


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    kind, _, number = architecture.rstrip("af").partition("_")
    if not number.isdigit():  # ROCm's names
        return True
    own = divmod(int(number), 10)
    return own <= (major, minor) and (kind == "compute" or own[0] == major)


def _driver(cuda: str, driver: str) -> Finding:
    """A driver runs programs of its CUDA's major version and of earlier ones."""
    if int(driver.split(".")[0]) < int(cuda.split(".")[0]):
        return Finding("FAIL", "driver", f"of CUDA {driver}, torch is built for {cuda}", _driver_fix(cuda, driver))
    return Finding("OK", "driver", f"of CUDA {driver}, runs torch's CUDA {cuda}")


def _driver_fix(cuda: str | None, driver: str | None) -> str:
    if cuda and driver and int(driver.split(".")[0]) < int(cuda.split(".")[0]):
        return f"install a driver of CUDA {cuda}, or a torch built for CUDA {driver} or earlier"
    return "look at `nvidia-smi`, and at `dmesg` for the driver's errors"


def deepspeed(asked: Asked) -> Iterator[Finding]:
    """Can DeepSpeed be imported, and which of its operators are compiled or could be?  Compiles none."""
    version = _version("deepspeed")
    if version is None:
        yield Finding("OK", "deepspeed", f"not installed: only its strategies need it ({_INSTALL_DEEPSPEED})")
        return
    if asked.quick:
        yield Finding("OK", "deepspeed", version)
        return
    accelerator, fits = operators.compatible()
    yield Finding("OK", "deepspeed", version)
    yield judge_operators(operators.built(accelerator), fits, operators.compiler())


def judge_operators(built: list[str], fits: dict[str, bool], compiler: str | None) -> Finding:
    """Return the finding on DeepSpeed's operators.

    Args:
        built: those that are compiled.
        fits: for each useful one, whether it can be used on this machine.
        compiler: the C++ compiler, if there is one.
    """
    todo = [name for name, fit in fits.items() if fit and name not in built]
    never = [name for name, fit in fits.items() if not fit]
    found = f"ZeRO needs none; compiled: {', '.join(built) or 'none'}"
    found += f"; not on this machine: {', '.join(never)}" if never else ""
    if not todo:
        return Finding("OK", "DeepSpeed operators", found)
    found += f"; at first use: {', '.join(todo)}"
    if compiler is None:
        fix = "install g++, should a recipe use DeepSpeed's own optimizers or offload to NVMe"
        return Finding("WARN", "DeepSpeed operators", f"{found}, but there is no C++ compiler", fix)
    return Finding("OK", "DeepSpeed operators", f"{found} (`paperscale doctor --build` compiles them now)")


def stale_locks(asked: Asked) -> Iterator[Finding]:
    """Has a killed job left the lock of a compilation?  Every later job would wait for it, without a word."""
    locks = operators.torch_locks()
    holders = _open_files() if locks else {}
    for path in locks:
        age, name = max(0.0, time.time() - path.stat().st_mtime), f"lock of {path.parent.name}"
        holder = holders.get(path.resolve())
        if holder:
            yield Finding("OK", name, f"process {holder} compiles it, since {age:.0f} s")
        elif age < _STALE_S:
            found = f"{path}, {age:.0f} s old, held by no process of yours on this machine"
            yield Finding("WARN", name, found, f"if no job is compiling on another machine: rm {path}")
        else:
            found = f"{path} is {_duration(age)} old and nobody holds it: every job that needs it hangs"
            yield Finding("FAIL", name, found, f"rm {path}")
    if not locks:
        yield Finding("OK", "compiled operators", "no lock is left behind")


def _open_files() -> dict[Path, int]:
    """Return the files that this user's processes hold open, with one process each; torch's lock is an open file."""
    found = {}
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            found[link.readlink()] = int(link.parts[2])
    return found


def _duration(seconds: float) -> str:
    return f"{seconds / 86400:.0f} days" if seconds > 172_800 else f"{seconds / 3600:.1f} h"
