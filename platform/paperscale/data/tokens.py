"""Token shards: text as numbers, with its documents and sentences, and the DataModules that stream it.

A token shard is a tar whose WebDataset samples are chunks of about 65,536 tokens, each with whole documents::

    tokens.npy     uint16 [tokens]; uint32 where the vocabulary needs it
    documents.npy  uint32 [documents, 2], where each document ends: in tokens, in sentences
    sentences.npy  uint32 [sentences], where each sentence ends in tokens
    labels.npy     int32 [documents], where documents have labels

A sentence is whatever the set makes it: a sentence of an article, the source and the target of a translation, the
premise and the hypothesis of an inference.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paperscale.data.faults import SampleFault
from paperscale.data.index import npy_header
from paperscale.data.shards import Shard, ShardSet
from paperscale.data.writer import Done, Sample, ShardWriter, map_in_order
from paperscale.errors import UserError

T = TypeVar("T")
LENGTHS = {"tokens": "tokens.npy", "documents": "documents.npy", "sentences": "sentences.npy"}
CHUNK = 1 << 16
_KEPT = 1024  # chunks whose arrays are kept


class Document(NamedTuple):
    """A document to write.

    Attributes:
        sentences: token numbers of each sentence.
        label: its class, for labelled documents.
    """

    sentences: Sequence[ArrayLike]
    label: int | None = None


class Chunk(NamedTuple):
    """The arrays of one chunk, see the module."""

    tokens: NDArray[Any]
    documents: NDArray[np.uint32]
    sentences: NDArray[np.uint32]
    labels: NDArray[np.int32] | None

    def between(self, first: int, stop: int) -> NDArray[Any]:
        """Return the tokens of the sentences from ``first`` to ``stop``."""
        return self.tokens[self._end(first - 1) : self._end(stop - 1)]

    def sentence_with(self, first: int, tokens: int) -> int:
        """Return the sentence in which, from sentence ``first`` on, there are so many tokens."""
        return max(first, int(self.sentences.searchsorted(self._end(first - 1) + tokens)))

    def _end(self, sentence: int) -> int:
        return int(self.sentences[sentence]) if sentence >= 0 else 0


# -- writing -------------------------------------------------------------------------------------------------


def write_tokens(
    writer: ShardWriter, split: str, items: Sequence[T], encode: Callable[[T], Document], vocab_size: int
) -> list[Shard]:
    """Write a split of documents as token shards.

    Args:
        writer: the set; its ``lengths`` become :data:`LENGTHS`.
        split: name of the split.
        items: what to encode, in order; the same when an interrupted writer is run again.
        encode: tokenises one item; runs on the writer's processes.
        vocab_size: numbers of the vocabulary, which decides between uint16 and uint32.

    Raises:
        UserError: a token lies outside the vocabulary.
    """
    writer.lengths = dict(LENGTHS)
    dtype = np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")

    def samples(done: Done) -> Iterator[Sample]:
        rest = items[done.total("documents") :] if done.shards else items
        documents = map_in_order(encode, rest, writer.processes(items, len(items) - len(rest)))
        return _chunks(split, documents, done.samples, dtype, vocab_size)

    return writer.write_samples(split, samples)


def _chunks(
    split: str, documents: Iterable[Document], number: int, dtype: np.dtype[Any], vocab_size: int
) -> Iterator[Sample]:
    """Yield chunks of whole documents."""
    pending: list[Document] = []
    tokens = 0
    for document in documents:
        pending.append(document)
        tokens += sum(len(np.asarray(sentence)) for sentence in document.sentences)
        if tokens >= CHUNK:
            yield _chunk(f"{split}-{number:08d}", pending, dtype, vocab_size)
            pending, tokens, number = [], 0, number + 1
    if pending:
        yield _chunk(f"{split}-{number:08d}", pending, dtype, vocab_size)


def _chunk(key: str, documents: list[Document], dtype: np.dtype[Any], vocab_size: int) -> Sample:
    sentences = [np.asarray(sentence, np.int64) for document in documents for sentence in document.sentences]
    tokens = np.concatenate([*sentences, np.empty(0, np.int64)])
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise UserError(f"{key}: token {tokens.max()} in a vocabulary of {vocab_size}; use the tokenizer of this set")
    ends = np.cumsum([len(sentence) for sentence in sentences])
    sentence_ends = np.cumsum([len(document.sentences) for document in documents])
    token_ends = np.concatenate([[0], ends])[sentence_ends]
    sample = {
        "__key__": key,
        "tokens.npy": _npy(tokens.astype(dtype)),
        "documents.npy": _npy(np.stack([token_ends, sentence_ends], 1).astype("<u4")),
        "sentences.npy": _npy(ends.astype("<u4")),
    }
    if documents[0].label is not None:
        sample["labels.npy"] = _npy(np.array([document.label for document in documents], "<i4"))
    return sample


def _npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
    return file.getvalue()


# -- reading -------------------------------------------------------------------------------------------------


class TokenSet:
    """The tokens and documents of a split, by number.

    Args:
        shards: the split.

    Raises:
        UserError: it holds no token shards.
    """

    def __init__(self, shards: ShardSet):
        if any("tokens" not in shard.lengths for shard in shards.shards):
            raise UserError(
                f"{shards.path}: split '{shards.split}' holds no token shards; make them with "
                "`paperscale data prepare`, or with paperscale.data.tokens.write_tokens"
            )
        self.shards = shards
        self.token_starts = self._starts("tokens")
        self._chunk_starts: dict[tuple[int, str], list[int]] = {}
        self._block_starts: dict[int, list[int]] = {}
        self._chunks: dict[tuple[int, int], Chunk] = {}

    def _starts(self, length: str) -> NDArray[np.int64]:
        return np.cumsum([0, *(shard.lengths[length] for shard in self.shards.shards)])

    def sizes(self, length: str) -> list[int]:
        """Return the tokens, documents or sentences of each shard."""
        return [shard.lengths[length] for shard in self.shards.shards]

    def chunk_starts(self, shard: int, length: str) -> list[int]:
        """Return where each chunk of a shard begins, in tokens, documents or sentences, and where the last ends."""
        found = self._chunk_starts.get((shard, length))
        if found is None:
            counts = self.shards.opened(shard)[0].lengths[length]
            found = self._chunk_starts[shard, length] = [0, *np.cumsum(counts, dtype=np.int64).tolist()]
        return found

    def chunk_with(self, shard: int, length: str, number: int) -> int:
        """Return the chunk of a shard that holds a token, document or sentence; the last one for what lies behind."""
        starts = self.chunk_starts(shard, length)
        return min(bisect_right(starts, number) - 1, len(starts) - 2)

    def block_starts(self, length: int) -> list[int]:
        """Return where, in each shard, its first block begins, if the split is cut into blocks of ``length`` tokens."""
        found = self._block_starts.get(length)
        if found is None:
            found = self._block_starts[length] = (-self.token_starts % length).tolist()
        return found

    def chunk(self, shard: int, row: int) -> Chunk:
        """Return a chunk; its checksum is compared when it is first met.

        Raises:
            SampleFault: it cannot be read or is damaged.
        """
        found = self._chunks.get((shard, row))
        if found is None:
            sample = self.shards.read(shard, row)
            tokens, documents, sentences = (array(sample[name]) for name in LENGTHS.values())
            labels = array(sample["labels.npy"]) if "labels.npy" in sample else None
            found = Chunk(tokens, documents, sentences, labels)
            if len(self._chunks) >= _KEPT:
                self._chunks = {}
            self._chunks[shard, row] = found
        return found

    def ends(self, shard: int, row: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where a chunk's documents end, in sentences, and its sentences, in tokens; the tokens are not read.

        Raises:
            SampleFault: it cannot be read or is damaged.
        """
        found = self.shards.read(shard, row, (LENGTHS["documents"], LENGTHS["sentences"]))
        documents, sentences = (array(found[LENGTHS[name]]).astype(np.int64) for name in ("documents", "sentences"))
        return documents[:, 1], sentences

    def copy_tokens(self, shard: int, start: int, out: NDArray[np.int64]) -> None:
        """Copy the tokens that begin at ``start`` of a shard, and go on into the shards that follow, into ``out``."""
        starts = self.chunk_starts(shard, "tokens")
        row = bisect_right(starts, start) - 1
        chunk = self._chunks.get((shard, row))  # nearly always there, and the whole block in it
        if chunk is not None:
            inside = start - starts[row]
            tokens = chunk.tokens[inside : inside + len(out)]
            if len(tokens) == len(out):
                out[:] = tokens
                return
        filled = 0
        for chunk, inside, size in self._parts(shard, start, len(out)):
            out[filled : filled + size] = chunk.tokens[inside : inside + size]
            filled += size

    def boundaries(self, shard: int, start: int, size: int) -> NDArray[np.int64]:
        """Return where documents end among the ``size`` tokens that begin at ``start`` of a shard."""
        found, filled = [], 0
        for chunk, inside, taken in self._parts(shard, start, size):
            ends = chunk.documents[:, 0].astype(np.int64)
            found.append(ends[(ends > inside) & (ends <= inside + taken)] - inside + filled)
            filled += taken
        return np.concatenate(found)

    def _parts(self, shard: int, start: int, size: int) -> Iterator[tuple[Chunk, int, int]]:
        """Yield the chunks that hold ``size`` tokens from ``start`` of a shard on, with first token and number."""
        while size:
            starts = self.chunk_starts(shard, "tokens")
            row = bisect_right(starts, start) - 1
            if row == len(starts) - 1:
                shard, start = shard + 1, start - starts[-1]
                continue
            taken = min(starts[row + 1] - start, size)
            yield self.chunk(shard, row), start - starts[row], taken
            start, size = start + taken, size - taken

    def sentences_of(self, shard: int, row: int) -> tuple[Chunk, int, int]:
        """Return where a document's sentences are: their chunk, the first one there, and the one after the last."""
        chunk, inside = self._located(shard, row)
        return chunk, int(chunk.documents[inside - 1, 1]) if inside else 0, int(chunk.documents[inside, 1])

    def _located(self, shard: int, row: int) -> tuple[Chunk, int]:
        """Return the chunk that holds a document, and the document's number in it."""
        at = self.chunk_with(shard, "documents", row)
        return self.chunk(shard, at), row - self.chunk_starts(shard, "documents")[at]

    def document(self, shard: int, row: int) -> tuple[list[NDArray[Any]], int | None]:
        """Return the sentences of a document, and its label."""
        chunk, inside = self._located(shard, row)
        token, first = chunk.documents[inside - 1].tolist() if inside else (0, 0)
        sentences = []
        for end in chunk.sentences[first : chunk.documents[inside, 1]].tolist():
            sentences.append(chunk.tokens[token:end])
            token = end
        return sentences, None if chunk.labels is None else int(chunk.labels[inside])

    def sentence_lengths(
        self, shard: int, rows: NDArray[np.int64], sides: int, damaged: int | None = None
    ) -> NDArray[np.int64]:
        """Return the tokens of the sentences of documents of one shard, int64 [documents, sides].

        Args:
            shard: the shard.
            rows: the documents.
            sides: sentences of each; 1 counts all of a document together.
            damaged: the length to give documents that cannot be read.

        Raises:
            SampleFault: a document cannot be read, and no such length is given.
            UserError: a document has another number of sentences.
        """
        starts = np.array(self.chunk_starts(shard, "documents"))
        chunks = starts.searchsorted(rows, side="right") - 1
        found = np.empty((len(rows), sides), np.int64)
        for at in np.unique(chunks).tolist():
            here = np.flatnonzero(chunks == at)
            try:
                chunk = self.chunk(shard, at)
            except SampleFault:
                if damaged is None:
                    raise
                found[here] = damaged
                continue
            tokens, last = chunk.documents.astype(np.int64).T
            if sides == 1:
                found[here, 0] = np.diff(tokens, prepend=0)[rows[here] - starts[at]]
                continue
            if (np.diff(last, prepend=0) != sides).any():
                raise UserError(
                    f"{self.shards.path}: documents of '{self.shards.split}' do not all have {sides} sentences; "
                    "data.fields names one for each"
                )
            lengths = np.diff(chunk.sentences.astype(np.int64), prepend=0).reshape(-1, sides)
            found[here] = lengths[rows[here] - starts[at]]
        return found


def array(content: bytes | memoryview) -> NDArray[Any]:
    """Return the array of a ``.npy`` file, as a view of it."""
    dtype, shape, start = npy_header(content)
    return np.frombuffer(content, dtype, offset=start).reshape(shape)


class TokenSets:
    """The token sets of a stream's sets, made once."""

    def __init__(self) -> None:
        self._made: dict[int, TokenSet] = {}

    def __getitem__(self, shards: ShardSet) -> TokenSet:
        """Return the tokens of a split."""
        found = self._made.get(id(shards))
        if found is None or found.shards is not shards:
            found = self._made[id(shards)] = TokenSet(shards)
        return found

    def __reduce__(self) -> tuple[type[TokenSets], tuple[()]]:  # worker processes open their own
        return TokenSets, ()
