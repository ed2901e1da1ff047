"""Small sets of text as token shards, with a tokenizer that has BERT's special tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paperscale.data.tokenizer import FILE, Tokenizer
from paperscale.data.tokens import Document, write_tokens
from paperscale.data.writer import ShardWriter

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = 300
CONTINUES = 60
"""The last tokens of the vocabulary, which go on with a word."""
SIZES = {"train": 60, "val": 12, "test": 12}


def tokenizer(size: int = VOCABULARY) -> Tokenizer:
    """Words ``w5`` to ``w239``, and ``##240`` to ``##299``: the number is the token's."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, pre_tokenizers

    words = [f"w{n}" if n < size - CONTINUES else f"##{n}" for n in range(len(SPECIAL), size)]
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    fast = Fast(models.WordPiece(vocabulary, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.add_special_tokens(list(SPECIAL))
    return Tokenizer(fast.to_str())


def article(of: tuple[str, int], size: int = VOCABULARY) -> Document:
    """A document of 1 to 9 sentences of 1 to 30 tokens, which are of few words."""
    split, number = of
    rng = np.random.default_rng([len(split), number])
    words = len(SPECIAL) + (rng.random(25) ** 3 * (size - len(SPECIAL))).astype(int)  # some are frequent everywhere
    sentences = [rng.choice(words, rng.integers(1, 31)) for _ in range(rng.integers(1, 10))]
    return Document(sentences)


def labelled(of: tuple[str, int]) -> Document:
    """A pair of sentences and its class, which is whether the second one begins as the first does."""
    split, number = of
    rng = np.random.default_rng([len(split), number])
    first, second = (rng.integers(len(SPECIAL), VOCABULARY, rng.integers(2, 20)) for _ in range(2))
    if number % 2:
        second[0] = first[0]
    return Document([first, second], number % 2)


def choice(of: tuple[str, int]) -> Document:
    """A context and four endings, of which the one that begins with the context's first token is right."""
    split, number = of
    rng = np.random.default_rng([len(split), number])
    context, *endings = (rng.integers(len(SPECIAL), VOCABULARY, rng.integers(2, 12)) for _ in range(5))
    endings[number % 4][0] = context[0]
    return Document([context, *endings], number % 4)


def write_text(
    folder: Path,
    encode: Callable[[tuple[str, int]], Document] = article,
    sizes: dict[str, int] | None = None,
    classes: Sequence[str] = (),
    size: int = VOCABULARY,
    **options: Any,
) -> Path:
    """Write a set of documents."""
    with ShardWriter(folder, "tiny-text", num_processes=0, classes=list(classes), **options) as writer:
        writer.attach(FILE, tokenizer(size).to_json().encode())
        for split, count in (sizes or SIZES).items():
            write_tokens(writer, split, [(split, number) for number in range(count)], encode, size)
    return folder


def write_for(class_path: str, folder: Path) -> list[str]:
    """Write a small set for a DataModule; return the words of the command line that name it."""
    kind, sizes = class_path.rpartition(".")[2], {"train": 40, "val": 8, "test": 8}
    if kind == "LabelledText":
        return [f"data={write_text(folder, labelled, sizes)}"]
    if kind == "Choices":
        return [f"data={write_text(folder, choice, sizes, '0123')}"]
    if kind in ("Questions", "TaggedWords"):
        return write_json(kind, folder, sizes)
    return [f"data={write_text(folder, sizes=sizes)}"]


def write_json(kind: str, folder: Path, sizes: dict[str, int]) -> list[str]:
    """Write a small set of questions or of tagged sentences, and a tokenizer beside it."""
    import json

    make = question if kind == "Questions" else tagged
    options = {} if kind == "Questions" else {"classes": TAGS}
    with ShardWriter(folder, "tiny-json", num_processes=0, **options) as writer:
        writer.schema = {"json": kind}
        for split, count in sizes.items():
            content = [make(split, number) for number in range(count)]
            writer.write(
                split, [{"__key__": f"{split}-{n:04d}", "json": json.dumps(c).encode()} for n, c in enumerate(content)]
            )
    (beside := folder.with_name(f"{folder.name}-tokenizer.json")).write_text(tokenizer().to_json())
    return [f"data={folder}", f"data.tokenizer={beside}"]


TAGS = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC"]


def question(split: str, number: int) -> dict[str, Any]:
    """A passage of ten words, and a question of the word before the answer."""
    words = [f"w{n}" for n in np.random.default_rng([len(split), number]).integers(5, 200, 10)]
    passage = " ".join(words)
    answers = [{"text": words[3], "start": len(" ".join(words[:3])) + 1}]
    ask = {"id": f"{split}-{number}", "title": "tiny", "question": words[2], "passage": passage}
    return {**ask, "answers": answers, "impossible": False}


def tagged(split: str, number: int) -> dict[str, Any]:
    """A document of two sentences."""
    rng = np.random.default_rng([len(split), number])
    sentences = [
        {"words": [f"w{n}" for n in rng.integers(5, 200, 6)], "tags": [TAGS[n] for n in (0, 1, 2, 0, 5, 0)]}
    ] * 2
    return {"id": f"{split}-{number}", "sentences": sentences}
