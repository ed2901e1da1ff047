"""What ``paperscale bench bert`` trains: BERT in several sizes, and documents of ragged lengths."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperscale.data.shards import MANIFEST, ShardSet
from paperscale.data.tokenizer import FILE, Tokenizer
from paperscale.data.tokens import Document, TokenSet, write_tokens
from paperscale.data.writer import ShardWriter
from paperscale.errors import UserError
from paperscale.nn.optimizers import decay_groups
from paperscale.papers.bert import Bert, BertPretraining, PretrainingHeads

VOCABULARY = 30522
"""Of the networks, whatever the documents' tokenizer uses of it."""
ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-6}
WEIGHT_DECAY, CLIP = 0.01, 1.0
"""The optimizer in every way."""
DOCUMENTS = Path("data/enwik8-articles")
_DOCUMENT, _SENTENCE = (6.52, 1.64), (3.28, 0.69)
"""Mean and deviation of the logarithm of lengths in tokens: those of the 7,704 articles of enwik8, the second nearly
the same whatever the vocabulary."""
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LEAST = 64  # documents, so that B of a pair is of many
_SPARE = 1.5  # tokens of documents to those of the sequences: what is cut off, and what is left at documents' ends


@dataclass(frozen=True)
class Work:
    """A pre-training whose steps are measured.

    Attributes:
        size: one of :data:`~paperscale.papers.bert.SIZES`.
        length: tokens of a sequence at most.
        batch_size: sequences of a step.
        warm_up: steps before those that count.
        steps: that count.
        precision: as Lightning's Trainer takes it.
    """

    size: str
    length: int
    batch_size: int
    warm_up: int
    steps: int
    precision: str

    @property
    def title(self) -> str:
        """Return the work in words."""
        sequences = f"batches of {self.batch_size} sequences of at most {self.length} tokens"
        return f"BERT-{self.size}, {sequences}, precision {self.precision}"

    @property
    def sequences(self) -> int:
        """Return the sequences of a training."""
        return self.batch_size * (self.warm_up + self.steps + 1)

    def to_json(self) -> str:
        """Return the work for another process."""
        return json.dumps(asdict(self))


# -- the networks --------------------------------------------------------------------------------------------


def pretraining(work: Work, dropout: float = 0.1) -> BertPretraining:
    """Return the module that a run trains; always the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        bert = Bert(work.size, VOCABULARY, dropout=dropout, attention_dropout=dropout)
        return BertPretraining(bert)


def huggingface(module: BertPretraining) -> nn.Module:
    """Return transformers' network with the weights of ours.

    Raises:
        UserError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError("transformers is not installed; `pip install transformers`") from error
    config: Any = transformers.BertConfig(**module.export_config("huggingface"))
    config._attn_implementation = "sdpa"
    model: nn.Module = transformers.BertForPreTraining(config)
    state, names = module.state_dict(), module.export_names("huggingface")
    fits: Any = model.load_state_dict({other: state[name] for name, other in names.items()}, strict=False)
    if tied := [name for name in fits.missing_keys if not name.startswith("cls.predictions.decoder.")]:
        raise UserError(f"this transformers' BERT has {tied[0]}; use transformers>=5")
    return model


def adamw(network: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of the hand-written loops."""
    return torch.optim.AdamW(decay_groups(network, WEIGHT_DECAY), **ADAMW, fused=True)


def loss_of(network: PretrainingHeads, batch: dict[str, Any]) -> Tensor:
    """Return the loss of our network on a packed batch, as a hand-written loop would compute it."""
    places, pair_N2 = network(batch)
    assert pair_N2 is not None  # noqa: S101  the documents are paired
    return places.loss / len(batch["lengths"]) + F.cross_entropy(pair_N2.float(), batch["label"])


# -- the batches ---------------------------------------------------------------------------------------------


def weighed_as_theirs(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a packed batch whose loss is the mean over all masked tokens, as transformers takes it."""
    share = torch.full_like(batch["share"], len(batch["lengths"]) / len(batch["share"]))
    return {**batch, "share": share}


def padded(batch: dict[str, Any]) -> dict[str, Tensor]:
    """Return a packed batch as transformers' network takes it: int64 [N, longest], and what follows as [N]."""
    label_T = torch.full_like(batch["tokens"], -100)
    label_T[batch["places"]] = batch["targets"]
    flat = {"input_ids": batch["tokens"], "token_type_ids": batch["segment"], "labels": label_T}
    flat["attention_mask"] = torch.ones_like(label_T)
    found = {
        name: nn.utils.rnn.pad_sequence(
            list(values_T.split(batch["lengths"])), batch_first=True, padding_value=-100 if name == "labels" else 0
        )
        for name, values_T in flat.items()
    }
    return {**found, "next_sentence_label": batch["label"]}


def moved(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch whose tensors are on the device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


# -- documents -----------------------------------------------------------------------------------------------


def write_documents(folder: Path, works: Sequence[Work]) -> str:
    """Write enough documents as token shards; return what they are."""
    wanted = int(_SPARE * max(work.sequences * work.length for work in works))
    if (DOCUMENTS / MANIFEST).exists():
        shards = ShardSet(DOCUMENTS, "train", mapped=False)
        tokenizer = Tokenizer(bytes(shards.folder.read_file(FILE)).decode())
        documents, of = _taken(_articles(shards), wanted), f"of {DOCUMENTS}"
    else:
        tokenizer = _numbered_words()
        documents = _taken(_drawn(tokenizer.vocab_size), wanted)
        of = "drawn at random, their lengths distributed as those of Wikipedia's articles in enwik8 (log-normal)"
    with ShardWriter(folder, "documents", num_processes=0) as writer:
        writer.attach(FILE, tokenizer.to_json().encode())
        write_tokens(writer, "train", documents, lambda document: document, tokenizer.vocab_size)
    return f"{len(documents):,} documents {of}"


def _taken(documents: Iterator[Document], wanted: int) -> list[Document]:
    """Return the first documents that have so many tokens together, a few at least; or all."""
    found, tokens = [], 0
    for document in documents:
        found.append(document)
        tokens += sum(len(np.asarray(sentence)) for sentence in document.sentences)
        if tokens >= wanted and len(found) >= _LEAST:
            break
    return found


def _articles(shards: ShardSet) -> Iterator[Document]:
    """Yield the documents of a set in a random order: neighbours are often of like length."""
    tokens = TokenSet(shards)
    starts = np.cumsum([0, *tokens.sizes("documents")])
    for number in np.random.default_rng(0).permutation(starts[-1]):
        shard = int(starts.searchsorted(number, side="right")) - 1
        yield Document(tokens.document(shard, int(number - starts[shard]))[0])


def _drawn(vocab_size: int) -> Iterator[Document]:
    rng = np.random.default_rng(0)
    while True:
        left, sentences = max(1, int(rng.lognormal(*_DOCUMENT))), []
        while left > 0:
            size = min(left, max(1, int(rng.lognormal(*_SENTENCE))))
            sentences.append(rng.integers(len(_SPECIAL), vocab_size, size))
            left -= size
        yield Document(sentences)


def _numbered_words() -> Tokenizer:
    from tokenizers import Tokenizer as Definition
    from tokenizers import models

    words = [*_SPECIAL, *(f"w{number}" for number in range(len(_SPECIAL), VOCABULARY))]
    definition = Definition(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))  # noqa: S106
    definition.add_special_tokens(list(_SPECIAL))
    return Tokenizer(definition.to_str())
