"""Compiling the C files beside this one into a shared library.

The library has no tie to a Python version: it is loaded with :mod:`ctypes`. It is compiled when a wheel is built or
the package is installed from source, and otherwise at the first use, where a C compiler is there.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
LIBRARY = "crops.so"
"""File name of the compiled library, on macOS too."""
_FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden")


def compiler() -> list[str] | None:
    """Return the command of the C compiler (``$CC``, else ``cc``), or ``None`` where there is none."""
    command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    return command if shutil.which(command[0]) else None


def compile_to(target: Path) -> None:
    """Compile the library; it appears under its name at once and complete.

    Args:
        target: the file to write.

    Raises:
        OSError: there is no compiler, the compiler fails, or the folder cannot be written.
    """
    command = compiler()
    if command is None:
        raise OSError("no C compiler: install gcc or clang, or name one in CC")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".compile-") as folder:
        made = Path(folder) / target.name
        sources = sorted(str(path) for path in HERE.glob("*.c"))
        words = [
            *command,
            *_FLAGS,
            "-o",
            str(made),
            *sources,
            "-lm",
            *(["-ldl"] if platform.system() == "Linux" else []),
        ]
        result = subprocess.run(words, capture_output=True, text=True, check=False)
        if result.returncode:
            raise OSError(f"{command[0]} does not compile {HERE}: {result.stderr.strip()[-300:]}")
        made.replace(target)


def identity() -> str:
    """Return what tells one build from another: the sources and the kind of machine, hashed."""
    digest = hashlib.sha256(f"{platform.system()} {platform.machine()} {_FLAGS}".encode())
    for path in sorted([*HERE.glob("*.c"), *HERE.glob("*.h")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cached() -> Path:
    """Return where the library is kept when the installed package lacks it; compile it there if need be.

    Raises:
        OSError: it cannot be compiled or kept.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = cache / "paperscale" / f"{identity()}-{LIBRARY}"
    if not target.exists():
        compile_to(target)
    return target
