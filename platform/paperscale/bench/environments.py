"""A virtual environment for each group of peers that can live together, and the interpreter that runs a peer."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from paperscale.bench.registry import ENVIRONMENTS, NEEDS, PEERS

_LIMIT_S = 1800
_BUILT_AFTER = {"ffcv": "ffcv"}  # packages that import torch or numpy while they are built


def cache_folder() -> Path:
    """Return where data and environments are kept: ``$PAPERSCALE_BENCH``, or a folder of the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "paperscale/bench"
    return Path(os.environ.get("PAPERSCALE_BENCH", default))


def set_up(cache: Path, say: Callable[[str], None]) -> None:
    """Make every environment that is missing; one that cannot be made is told of, and kept as the reason.

    Args:
        cache: the benchmark's folder.
        say: prints a line.
    """
    for name in ENVIRONMENTS:
        if python_of(cache, name):
            continue
        say(f"making the environment '{name}': {', '.join(ENVIRONMENTS[name])}")
        if failure := _make(cache, name):
            say(f"  not made: {failure}")


def _make(cache: Path, name: str) -> str:
    """Make one environment; return why not, or an empty string."""
    folder = cache / "venvs" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    constraints = folder.parent / "constraints.txt"
    constraints.write_text(f"torch=={_torch_version()}\n")
    last = _BUILT_AFTER.get(name, "")
    first = [package for package in ENVIRONMENTS[name] if package.split("=")[0] != last]
    pip: list[str | Path] = [folder / "bin/python", "-m", "pip", "install", "--quiet", "--constraint", constraints]
    commands: list[list[str | Path]] = [[sys.executable, "-m", "venv", folder], [*pip, "torch", "numpy", *first]]
    if last:
        commands.append([*pip, *(set(ENVIRONMENTS[name]) - set(first))])
    for command in commands:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S)
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["pip failed"])[-1]
            return f"{reason}{f'; it needs {NEEDS[name]}' if name in NEEDS else ''}"
    (folder / "complete").touch()
    return ""


def _torch_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("torch").split("+")[0]


def python_of(cache: Path, environment: str) -> str | None:
    """Return the interpreter of an environment that is complete, or ``None``."""
    folder = cache / "venvs" / environment
    return str(folder / "bin/python") if (folder / "complete").exists() else None


def interpreter(cache: Path, peer: str) -> str | None:
    """Return the interpreter that can run a peer: its environment's, or this one where it has what the peer needs."""
    entry = PEERS[peer]
    if entry.environment and (python := python_of(cache, entry.environment)):
        return python
    modules = (_MODULES.get(name, name) for name in entry.distributions)
    return sys.executable if all(_has(module) for module in modules) else None


_MODULES = {"mosaicml-streaming": "streaming", "megatron-energon": "megatron.energon"}


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def variables(cache: Path, python: str) -> dict[str, str]:
    """Return the environment variables of a peer's process.

    Another interpreter sees this package, and nothing else of ours, through a link.
    """
    here = Path(__file__).resolve().parents[1]
    link = cache / "path" / here.name
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink() or link.resolve() != here:
        link.unlink(missing_ok=True)
        link.symlink_to(here)
    own = {"PYTHONPATH": str(link.parent), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if python == sys.executable:
        own["PYTHONPATH"] = str(here.parent)
    return {**os.environ, **own, **quiet}
