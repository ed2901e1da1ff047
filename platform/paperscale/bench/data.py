"""The sets on disk: the samples, and each peer's copy in its own format."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paperscale.bench import environments, source
from paperscale.bench.client import Client
from paperscale.bench.peers.base import IMAGES, TOKENS
from paperscale.bench.registry import PEERS
from paperscale.errors import UserError

_COMPLETE = "complete.json"


@dataclass(frozen=True)
class Size:
    """How much of each set there is.

    Attributes:
        name: of the folder.
        counts: samples of ``images``, ``tokens`` and ``million``.
    """

    name: str
    counts: dict[str, int]


FULL = Size("full", {"images": 6000, "tokens": 97_656, "million": 1_000_000})
QUICK = Size("quick", {"images": 128, "tokens": 512, "million": 10_000})


def make_source(cache: Path, size: Size, say: Callable[[str], None]) -> Path:
    """Return the folder of the samples, made where it is missing.

    Args:
        cache: the benchmark's folder.
        size: how many samples.
        say: prints a line.

    Raises:
        UserError: the photographs or the text cannot be fetched.
    """
    folder = cache / "data" / size.name / "source"
    if (folder / _COMPLETE).exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if size is QUICK:
        source.write_textures(folder / IMAGES, size.counts["images"])
        text = b" ".join(b"%d" % number for number in range(100_000))
    else:
        _photographs(cache, folder, size.counts["images"], say)
        from paperscale.data.prepare.text import ENWIK8

        text = ENWIK8.fetch(say)[0]["enwik8"]
    for kind, (name, length) in TOKENS.items():
        source.tokens(text, size.counts[kind] * length).tofile(folder / name)
    (folder / _COMPLETE).write_text(json.dumps(size.counts))
    return folder


def _photographs(cache: Path, folder: Path, count: int, say: Callable[[str], None]) -> None:
    from paperscale.data.prepare.images import GROCERY

    python = environments.python_of(cache, "common")
    if python is None:
        raise UserError(
            "the photographs are read with pyarrow of the peers' environment; run `paperscale bench data --setup`"
        )
    parquet = folder / "photographs.parquet"
    parquet.write_bytes(GROCERY.fetch(say)[0]["images2.parquet"])
    say(f"making {count:,} images of {parquet.stat().st_size / 1e6:.0f} MB of photographs")
    command: list[str | Path] = [python, "-m", "paperscale.bench.source", parquet, folder / IMAGES, str(count)]
    result = subprocess.run(command, env=environments.variables(cache, python), capture_output=True, text=True)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"making the images failed: {last}; delete {cache / 'venvs'} and run `paperscale bench data --setup`"
        )
    parquet.unlink()


def facts(folder: Path) -> dict[str, Any]:
    """Return what the images of a source are like."""
    import numpy as np
    from PIL import Image

    paths = sorted((folder / IMAGES).iterdir())
    sizes = np.array([path.stat().st_size for path in paths])
    shapes = np.array([Image.open(path).size for path in paths[:: max(1, len(paths) // 500)]])
    return {
        "images": len(paths),
        "mean_bytes": int(sizes.mean()),
        "percentile_bytes": {str(p): int(np.percentile(sizes, p)) for p in (5, 50, 95)},
        "mean_width": float(shapes[:, 0].mean()),
        "mean_height": float(shapes[:, 1].mean()),
    }


def written(cache: Path, size: Size, peer: str, kind: str) -> Path:
    """Return the folder of a peer's copy of a set."""
    entry = PEERS[peer]
    return cache / "data" / size.name / f"{entry.module}-{entry.peer}".lower() / kind


def write(client: Client, cache: Path, size: Size, peer: str, kind: str) -> str:
    """Let a peer write its copy of a set, if it has not; return why it could not, or an empty string.

    Paperscale's is written every time: it is its code that changes between runs.
    """
    out = written(cache, size, peer, kind)
    marker = out.with_name(f"{kind}-{_COMPLETE}")
    if marker.exists() and peer != "ours":
        return ""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    origin = cache / "data" / size.name / "source"
    answer = client.ask("write", kind=kind, source=str(origin), out=str(out), limit_s=1800)
    if "error" in answer:
        return str(answer["error"])
    marker.write_text(json.dumps(answer))
    return ""
