"""What every data set is made with: its entry in the registry, the files it is made of, the shards it is written to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from paperscale.data import index as shard_index
from paperscale.data.prepare.originals import Originals
from paperscale.data.random import permutation
from paperscale.data.sources import Download, Files
from paperscale.data.tokenizer import ALL_WORDS, FILE, KINDS, Tokenizer, TokenizerFile, train
from paperscale.data.tokens import Document, write_tokens
from paperscale.data.writer import Sample, ShardWriter
from paperscale.errors import UserError, nearest

T = TypeVar("T")

SCRATCH = "scratch"
HELD_OUT = 5000
"""Samples at the end of an official training set that become the split ``val``, as He et al. 2015 do on CIFAR-10."""

_ORDER = 2015  # key of the order in which sorted sources are written
_TRAIN_BYTES = 256 << 20  # text that a tokenizer is trained on at most


@dataclass(frozen=True)
class Dataset:
    """A data set that ``paperscale data prepare`` makes.

    Attributes:
        title: its name for people.
        what: what it holds, with numbers.
        size: how much there is to download.
        licence: terms of the data.
        write: writes its splits.
        downloads: what is fetched for it.
        originals: the official files that a user names with ``--source``; empty if there is nothing to name.
        fetched: whether it can be made without ``--source``.
        tokenizer: the kind of tokenizer it is written with by default; empty if it holds no text.
        vocab_size: tokens of that tokenizer.
        classes: names of the labels, where they are known beforehand.
        shard_samples: samples of a shard; by default shards are closed at ``--shard-mb``.
    """

    title: str
    what: str
    size: str
    licence: str
    write: Callable[[Job], None]
    downloads: tuple[Download, ...] = ()
    originals: str = ""
    fetched: bool = True
    tokenizer: str = ""
    vocab_size: int = 0
    classes: tuple[str, ...] = ()
    shard_samples: int | None = None


@dataclass(frozen=True)
class Options:
    """What the user asks for beyond the name: the options of ``paperscale data prepare``."""

    source: tuple[Path, ...] = ()
    tokenizer: str | None = None
    vocab_size: int | None = None
    shard_mb: int = 128

    def check(self, name: str, dataset: Dataset) -> None:
        """Refuse what the data set does not take.

        Raises:
            UserError: an option means nothing to this set, or one that it needs is missing.
        """
        if self.source and not dataset.originals:
            raise UserError(f"{name} is fetched and takes no --source; leave it out")
        if not self.source and not dataset.fetched:
            raise UserError(
                f"{name} is not fetched ({dataset.licence}); download {dataset.originals} and name it with --source"
            )
        if not dataset.tokenizer and (self.tokenizer or self.vocab_size):
            option = "--tokenizer" if self.tokenizer else "--vocab-size"
            raise UserError(f"{name} holds no tokens and takes no {option}; leave it out")
        if self.tokenizer and self.tokenizer not in KINDS and not Path(self.tokenizer).is_file():
            hint = f"{', '.join(KINDS)}{nearest(self.tokenizer, KINDS)}"
            raise UserError(f"--tokenizer {self.tokenizer}: no such file; name a tokenizer.json, or one of {hint}")
        if self.vocab_size and (self.tokenizer == "bytes" or (self.tokenizer and self.tokenizer not in KINDS)):
            raise UserError(
                f"--vocab-size {self.vocab_size}: --tokenizer {self.tokenizer} has its own size; leave it out"
            )
        if self.shard_mb < 1:
            raise UserError(f"--shard-mb {self.shard_mb}: a shard holds 1 megabyte or more; give 128, for example")
        for path in self.source:
            if not path.exists():
                raise UserError(f"--source {path}: no such file or folder; name {dataset.originals}")

    def facts(self, dataset: Dataset) -> dict[str, Any]:
        """Return what decides the content of the set, for its manifest."""
        files = [f"{path.name}, {path.stat().st_size} bytes" if path.is_file() else path.name for path in self.source]
        kind = self.tokenizer or dataset.tokenizer
        own_size = kind not in KINDS or kind in ("bytes", "words")
        size = self.vocab_size or (None if own_size else dataset.vocab_size)
        return {"source": files, "tokenizer": kind, "vocab_size": size, "shard_mb": self.shard_mb}


@dataclass
class Job:
    """One preparation under way: fetches, trains the tokenizer, and passes samples to the writer.

    Attributes:
        name: the data set's name.
        dataset: its entry.
        options: what the user asked for.
        writer: where samples go.
        progress: the bar.
    """

    name: str
    dataset: Dataset
    options: Options
    writer: ShardWriter
    progress: Progress
    _hashes: list[Future[dict[str, Any]]] = field(default_factory=list)
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.progress.console.print(line, highlight=False)

    def note(self, **facts: Any) -> None:
        """Add facts to the manifest's provenance."""
        self.writer.provenance.update(facts)

    def fetch(self, download: Download) -> Files:
        """Return the files of a download, and note where they came from."""
        files, facts = download.fetch(self.say)
        self.writer.provenance["sources"].append(facts)
        return files

    def originals(self) -> Originals:
        """Return the files that the user named."""
        return Originals(self.options.source, self.scratch, self.dataset.originals)

    @property
    def scratch(self) -> Path:
        """Return the folder for files that are deleted when the set is complete."""
        return self.writer.folder / SCRATCH

    def hash(self, paths: Iterable[Path]) -> None:
        """Hash the files that the set is made of while it is written."""

        def facts(path: Path) -> dict[str, Any]:
            return {"name": path.name, "bytes": path.stat().st_size, "sha256": shard_index.sha256(path)}

        self._hashes += [self._pool.submit(facts, path) for path in paths]

    def finish(self) -> None:
        """Wait for the hashes and note them."""
        self.writer.provenance["sources"] += [future.result() for future in self._hashes]

    def close(self) -> None:
        """Stop hashing."""
        self._pool.shutdown(cancel_futures=True)

    def tokenizer(self, texts: Iterable[str]) -> TokenizerFile:
        """Return the tokenizer of the set, trained on ``texts`` if none is given; it is kept beside the shards."""
        wanted = self.options.tokenizer or self.dataset.tokenizer
        if wanted in KINDS:
            size = self.options.vocab_size or (ALL_WORDS if wanted == "words" else self.dataset.vocab_size)
            self.say(f"training a tokenizer: {wanted}")
            found, origin = train(wanted, texts, size), wanted
        else:
            found, origin = Tokenizer.load(wanted), Path(wanted).name
        self.writer.attach(FILE, found.to_json().encode())
        self.note(tokenizer={"kind": origin, "vocab_size": found.vocab_size, "special": found.special})
        return TokenizerFile.at(self.writer.folder / FILE)

    @property
    def processes(self) -> int:
        """Return how many processes work on an input of unknown length."""
        return self.writer.processes(iter(()), 0)

    def write(self, split: str, items: Sequence[T], encode: Callable[[T], Sample]) -> None:
        """Write a split of samples."""
        with self.counting(split, len(items)):
            self.writer.write(split, items, encode)

    def counting(self, split: str, total: int | None = None) -> _Counting:
        """Show a bar for a split while it is written."""
        return _Counting(self, f"writing {self.name}: {split}", total)


class _Counting:
    def __init__(self, job: Job, title: str, total: int | None):
        self.job, self.title, self.total = job, title, total

    def __enter__(self) -> None:
        task = self.job.progress.add_task(self.title, total=self.total)
        self.job.writer.progress = lambda done: self.job.progress.advance(task, done)

    def __exit__(self, *error: object) -> None:
        self.job.writer.progress = lambda done: None


def bar(console: Console) -> Progress:
    """Return a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def shuffled(items: Sequence[T]) -> list[T]:
    """Return items in an order that does not depend on theirs.

    Sources sorted by class or by length are written so: a stream shuffles within a window, not over the whole set.
    """
    return [items[i] for i in permutation(len(items), _ORDER)]


def share_of(text: str) -> float:
    """Return a number in [0, 1) fixed by a text: to hold out all samples that have it, wherever they stand."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / (1 << 64)


def write_documents(
    job: Job, split: str, items: Sequence[T], encode: Callable[[T], Document], tokenizer: TokenizerFile
) -> None:
    """Write a split of documents as token shards."""
    job.writer.schema = dict(TOKEN_SCHEMA)
    with job.counting(split):
        write_tokens(job.writer, split, items, encode, tokenizer.open().vocab_size)


TOKEN_SCHEMA = {
    "tokens.npy": "tokens of whole documents, see tokenizer.json",
    "documents.npy": "where each document ends: in tokens, in sentences",
    "sentences.npy": "where each sentence ends in tokens",
    "labels.npy": "the class of each document, where there are classes",
}


def evenly(items: Sequence[T], size: Callable[[T], int] = len, most: int = _TRAIN_BYTES) -> Sequence[T]:  # type: ignore[assignment]
    """Return evenly spaced items of at most about ``most`` characters in all, to train a tokenizer on."""
    looked = np.linspace(0, len(items) - 1, min(len(items), 1000)).astype(int).tolist()
    mean = sum(size(items[i]) for i in looked) / max(len(looked), 1)
    count = max(1, int(most / max(mean, 1)))
    if count >= len(items):
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, count).astype(int).tolist()]
