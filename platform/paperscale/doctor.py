"""``paperscale doctor``: what works here and what does not, each with its fix."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from paperscale.errors import UserError

COMPROMISED_LIGHTNING = ("2.6.2", "2.6.3")


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        level: ``OK``, ``WARN`` or ``FAIL``.
        name: what was looked at.
        found: what was found.
        fix: what to do, unless ``OK``.
    """

    level: str
    name: str
    found: str
    fix: str = ""


def checks(cluster: str | None, data: Path | None = None) -> Iterator[Check]:
    """Yield the findings, cheap ones first."""
    yield _python()
    yield from _packages()
    yield _file_system(Path.cwd())
    yield _disk(Path.cwd())
    yield _images()
    yield _tracking()
    yield from _slurm(cluster)
    if data is not None:
        yield _shards(data)


def _python() -> Check:
    version = platform.python_version()
    supported = (3, 10) <= sys.version_info[:2] <= (3, 13)
    return Check("OK" if supported else "FAIL", "Python", version, "" if supported else "use Python 3.10 to 3.13")


def _packages() -> Iterator[Check]:
    for name in ("torch", "lightning", "torchmetrics", "webdataset", "wandb"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Check("FAIL", name, "not installed", "pip install paperscale")
            continue
        if name == "lightning" and version in COMPROMISED_LIGHTNING:
            yield Check("FAIL", name, f"{version} is a compromised release", "pip install 'lightning>=2.6.4'")
        else:
            yield Check("OK", name, version)


def _file_system(folder: Path) -> Check:
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".paperscale-") as probe:
            first, second = Path(probe) / "a", Path(probe) / "b"
            with first.open("w") as file:
                file.write("x")
                os.fsync(file.fileno())
            first.replace(second)
    except OSError as error:
        return Check("FAIL", "file system", f"{folder}: {error.strerror}", "work in a folder that you can write to")
    return Check("OK", "file system", f"{folder}: durable writes and atomic renames")


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    level = "OK" if free > 5 << 30 else "WARN" if free > 500 << 20 else "FAIL"
    return Check(level, "disk space", f"{free / 2**30:.1f} GB free", "" if level == "OK" else "free some space")


def _images() -> Check:
    from paperscale.data.jpeg import backend

    found = backend()
    if found == "native":
        return Check("OK", "images", "JPEGs are decoded by the C library, only what a crop needs")
    return Check("WARN", "images", f"decoded by {found}, at half the speed", "install a C compiler (gcc or clang)")


def _tracking() -> Check:
    if os.environ.get("WANDB_API_KEY") or (Path.home() / ".netrc").exists():
        return Check("OK", "W&B", "a key is configured: runs are sent as they go")
    return Check("OK", "W&B", "no key: runs are written offline (`wandb login` to send them, `wandb sync` later)")


def _slurm(cluster: str | None) -> Iterator[Check]:
    from paperscale.jobs import profile as profiles

    wanted = cluster is not None and profiles.load(cluster).engine == "slurm"
    if shutil.which("sbatch") is None:
        level, fix = ("FAIL", "run this on a login node") if wanted else ("OK", "")
        yield Check(level, "SLURM", "no sbatch on PATH: --cluster local works", fix)
        return
    version = subprocess.run(["sinfo", "-h", "-o", "%R %D nodes %T"], capture_output=True, text=True, timeout=20)
    if version.returncode:
        last = (version.stderr.strip().splitlines() or ["no answer"])[-1]
        yield Check("FAIL" if wanted else "WARN", "SLURM", last, "check the controller with `scontrol ping`")
    else:
        yield Check("OK", "SLURM", "; ".join(version.stdout.split("\n")[:4]).strip("; "))


def _shards(folder: Path) -> Check:
    from paperscale.data.verify import verify

    try:
        problems = verify(folder).problems
    except UserError as error:
        return Check("FAIL", "shards", str(error), "prepare the set")
    if problems:
        return Check("FAIL", "shards", problems[0], "prepare the set again")
    return Check("OK", "shards", f"{folder}: complete and verified")
