"""Looking at a node before its ranks start: standard library only, a second at most on a healthy node.

What lies between nodes, the clocks and the collective, is looked at by the ranks themselves
(:func:`paperscale.training.rendezvous.preflight`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paperscale.errors import BadNode
from paperscale.jobs.faults import BAD_NODE_ORDER
from paperscale.jobs.run import Run
from paperscale.training.operators import torch_locks

_SLOW_NAME_S = 1.0
_STALE_LOCK_S = 600.0
_LEAST_BYTES = 200 << 20


@dataclass
class NodeReport:
    """What was found on a node.

    Attributes:
        host: the node's name.
        facts: what was measured, for ``node-K.json``.
        warnings: each ends in the fix.
    """

    host: str
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def check_node(run: Run, attempt: Path, gpus: int) -> NodeReport:
    """Check this node.

    Args:
        run: the run's directory.
        attempt: the attempt's directory.
        gpus: GPUs that the job has asked for on each node.

    Raises:
        BadNode: it cannot carry the run; says why.
    """
    report = NodeReport(socket.gethostname())
    drill = run.path / BAD_NODE_ORDER
    if drill.exists() and drill.read_text().strip() == report.host:
        drill.unlink(missing_ok=True)
        raise BadNode("declared bad by `paperscale drill`")
    _check_disks(report, attempt)
    if gpus:
        _check_gpus(report, gpus)
    _check_names(report)
    _check_locks(report)
    return report


def _check_disks(report: NodeReport, attempt: Path) -> None:
    """Write and read back where the run and temporary files go."""
    for name, folder in (("run", attempt), ("tmp", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        start = time.monotonic()
        try:
            _write_and_read(folder)
        except OSError as error:
            where = f"{folder} cannot be written to: {error.strerror}"
            if name == "tmp":
                raise BadNode(where) from error
            report.warnings.append(f"{where}; free space there, or checkpoints will fail")
        report.facts[f"{name}_free_gb"] = round(free / 1e9, 1)
        report.facts[f"{name}_write_s"] = round(time.monotonic() - start, 3)
        if free < _LEAST_BYTES:
            report.warnings.append(f"{folder} has {free / 1e6:.0f} MB free; free space there before it is full")


def _write_and_read(folder: Path) -> None:
    content = os.urandom(1 << 16)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight-") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        if file.read() != content:
            raise OSError(5, "what was written reads back differently")


def _check_gpus(report: NodeReport, gpus: int) -> None:
    """Count the GPUs, and look for memory errors that could not be corrected."""
    query = "--query-gpu=name,ecc.errors.uncorrected.volatile.total"
    try:
        result = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=60
        )
    except FileNotFoundError:
        report.warnings.append("nvidia-smi is not on PATH: the GPUs are not checked")
        return
    except subprocess.TimeoutExpired as error:
        raise BadNode("nvidia-smi does not answer: a GPU hangs") from error
    rows = [line.split(", ") for line in result.stdout.splitlines() if "," in line]
    if result.returncode or len(rows) < gpus:
        raise BadNode(f"{len(rows)} of {gpus} GPUs answer: {(result.stderr or result.stdout).strip()[:200]}")
    report.facts["gpus"] = [row[0] for row in rows]
    for index, row in enumerate(rows):
        if row[1].isdigit() and int(row[1]):
            raise BadNode(f"GPU {index} has {row[1]} uncorrected memory errors")


def _check_names(report: NodeReport) -> None:
    """Time the name service: torch asks it for every peer."""
    start = time.monotonic()
    for name in {report.host, os.environ.get("MASTER_ADDR", report.host)}:
        with contextlib.suppress(OSError):
            address = socket.getaddrinfo(name, None)[0][4][0]
            with contextlib.suppress(OSError):
                socket.gethostbyaddr(str(address))
    report.facts["names_s"] = round(time.monotonic() - start, 3)
    if report.facts["names_s"] > _SLOW_NAME_S:
        report.warnings.append(
            f"the name service took {report.facts['names_s']} s to name this node and rank 0's: every connection waits "
            "for it; list the nodes in /etc/hosts, or ask the administrator"
        )


def _check_locks(report: NodeReport) -> None:
    """Remove locks of builds that died: whoever finds one waits for ever."""
    for lock in torch_locks():
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in lock.parent.iterdir())
            if (idle := time.time() - newest) > _STALE_LOCK_S:
                lock.unlink()
                report.warnings.append(f"removed {lock}: left by a build that died {idle / 60:.0f} minutes ago")
