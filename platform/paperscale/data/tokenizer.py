"""Tokenizers: trained on a data set's own text, or brought along; deterministic either way.

Kinds, with the special tokens that each begins its vocabulary with:

======================  =========================================  =======================================
``bpe``                 ``<|endoftext|>``                          byte-level BPE, Radford et al. 2019, section 2.2
``shared-bpe``          ``<pad> <s> </s> <unk>``                   BPE shared by two languages, Vaswani et al. 2017, 5.1
``wordpiece``           ``[PAD] [UNK] [CLS] [SEP] [MASK]``         Devlin et al. 2019, section 3; lower case, no accents
``wordpiece-cased``     the same                                   the same, as written
``words``               ``<unk> <eos>``                            words between spaces that occur three times or more
``bytes``               none                                       UTF-8 bytes, 256
======================  =========================================  =======================================

The same text gives the same ``tokenizer.json``, to the byte. It is the format of Hugging Face's ``tokenizers``, so a
``tokenizer.json`` of any of their models can be brought along.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paperscale.errors import UserError, nearest

KINDS = ("bpe", "shared-bpe", "wordpiece", "wordpiece-cased", "words", "bytes")
FILE = "tokenizer.json"

_BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_TRANSLATION = ("<pad>", "<s>", "</s>", "<unk>")
_ROLES = {
    "pad": ("[PAD]", "<pad>", "<|endoftext|>"),
    "unknown": ("[UNK]", "<unk>"),
    "begin": ("[CLS]", "<s>", "<|endoftext|>"),
    "end": ("[SEP]", "</s>", "<|endoftext|>", "<eos>"),
    "mask": ("[MASK]", "<mask>"),
}
_UNFRAMED = {
    "pad": "pad_token",
    "unknown": "unk_token",
    "begin": "bos_token",
    "end": "eos_token",
    "mask": "mask_token",
}
_FRAMED = {**_UNFRAMED, "begin": "cls_token", "end": "sep_token"}
"""What transformers calls the roles."""
ALL_WORDS = 1 << 31
"""A vocabulary size that leaves no word out."""

_LETTERS = 1000  # characters a vocabulary knows at most; rarer ones are unknown
_RARE = 3  # WikiText: words that occur less often are <unk> (Merity et al. 2016, section 4.3)


class Tokenizer:
    """Text to numbers and back.

    Args:
        definition: the content of a ``tokenizer.json``.
        name: what error messages call it.

    Attributes:
        vocab_size: number of tokens.
        special: special token to its number.
        is_bytes: whether token n is byte n.

    Raises:
        UserError: the definition is not one.
    """

    def __init__(self, definition: str, name: str = FILE):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(
                f"{name}: not a tokenizer ({error}); name a tokenizer.json as Hugging Face's tokenizers write it"
            ) from error
        self.name = name
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # "[MASK]" in a text is text
        self.vocab_size: int = 1 + max(self._tokenizer.get_vocab().values())
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = {token.content: number for number, token in sorted(added.items()) if token.special}
        self.is_bytes = definition == _bytes()

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a ``tokenizer.json``.

        Raises:
            UserError: there is no such file, or it is not a tokenizer.
        """
        try:
            return cls(Path(path).read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise UserError(
                f"tokenizer {path}: {reason}; name a tokenizer.json, or one of {', '.join(KINDS)}"
            ) from error

    def to_json(self) -> str:
        """Return the content of its ``tokenizer.json``."""
        return _bytes() if self.is_bytes else self._tokenizer.to_str(pretty=False)

    def huggingface_files(self, longest: int | None = None) -> dict[str, str]:
        """Return the files that transformers' ``AutoTokenizer`` reads: their names and contents.

        With ``[CLS]`` and ``[SEP]`` they are put around a text or a pair there, as BERT wants them.

        Args:
            longest: tokens that the model takes at most.
        """
        import tokenizers

        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if longest is not None:
            config["model_max_length"] = longest
        definition = tokenizers.Tokenizer.from_str(self.to_json())
        framed = {"[CLS]", "[SEP]"} <= self.special.keys()
        if framed:
            config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
        if framed and definition.post_processor is None:
            definition.post_processor = tokenizers.processors.TemplateProcessing(
                single="[CLS] $A [SEP]",
                pair="[CLS] $A [SEP] $B:1 [SEP]:1",
                special_tokens=[(token, self.special[token]) for token in ("[CLS]", "[SEP]")],
            )
        for role, key in (_FRAMED if framed else _UNFRAMED).items():
            if token := next((token for token in _ROLES[role] if token in self.special), None):
                config[key] = token
        return {FILE: definition.to_str(), "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text; special tokens are not added."""
        if self.is_bytes:
            return [list(text.encode()) for text in texts]
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def encode_in_place(self, texts: Sequence[str]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Return the tokens of each text, and the characters that each token stands for: int64 [tokens, 2], from, to.

        What a tokenizer leaves out or changes, such as spaces and accents, does not move the characters.
        """
        found = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [(np.array(e.ids, np.int64), np.array(e.offsets, np.int64).reshape(-1, 2)) for e in found]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens; special tokens are left out."""
        if self.is_bytes:
            return bytes(tokens).decode(errors="replace")
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def continues(self) -> NDArray[np.bool_]:
        """Return which tokens go on with the word before them, as ``##ing`` does in WordPiece: bool [vocab_size]."""
        found = np.zeros(self.vocab_size, np.bool_)
        found[[number for token, number in self._tokenizer.get_vocab().items() if token.startswith("##")]] = True
        return found

    def sizes(self) -> NDArray[np.int64] | None:
        """Return how many bytes of text each token stands for, int64 [vocab_size]; special tokens for none.

        ``None`` where tokens are not pieces of the text's bytes, as words and word pieces are not.
        """
        import tokenizers

        if not isinstance(self._tokenizer.decoder, tokenizers.decoders.ByteLevel) or self._tokenizer.normalizer:
            return None
        found = np.zeros(self.vocab_size, np.int64)
        for token, number in self._tokenizer.get_vocab().items():
            found[number] = 0 if token in self.special else len(token)  # a letter is a byte
        return found

    def number(self, role: str) -> int:
        """Return the number of the token for a role: pad, unknown, begin, end or mask.

        Raises:
            UserError: the tokenizer has none.
        """
        for token in _ROLES[role]:
            if token in self.special:
                return self.special[token]
        raise UserError(
            f"{self.name}: has no token for '{role}' ({' or '.join(_ROLES[role])}), only {list(self.special)}; "
            "prepare the set with another --tokenizer"
        )


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer on the disk: cheap to send to worker processes, each of which reads it once.

    Attributes:
        path: its ``tokenizer.json``.
        sha256: the file's hash.
    """

    path: str
    sha256: str

    @classmethod
    def at(cls, path: Path) -> TokenizerFile:
        """Return the tokenizer in a file."""
        return cls(str(path), hashlib.sha256(path.read_bytes()).hexdigest())

    def open(self) -> Tokenizer:
        """Return the tokenizer, read at the first call in each process."""
        return _opened(self)


@functools.lru_cache(maxsize=8)
def _opened(file: TokenizerFile) -> Tokenizer:
    if multiprocessing.parent_process() is not None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core already
    return Tokenizer.load(file.path)


def train(kind: str, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a tokenizer.

    Args:
        kind: one of :data:`KINDS`.
        texts: the text; gone through twice, so it must be a list or the like.
        vocab_size: tokens wanted; there are fewer where the text has fewer. ``bytes`` has 256 whatever is asked for.

    Raises:
        UserError: there is no such kind, or the vocabulary is too small for its characters.
    """
    if kind not in KINDS:
        raise UserError(
            f"no tokenizer '{kind}'; there are {', '.join(KINDS)}, or a tokenizer.json{nearest(kind, KINDS)}"
        )
    if kind == "bytes":
        return Tokenizer(_bytes())
    least = 300
    if kind != "words" and vocab_size < least:
        raise UserError(f"a vocabulary of {vocab_size} is too small for {kind}; give --vocab-size {least} or more")
    makers: dict[str, Callable[[Iterable[str], int], str]] = {
        "bpe": _bpe,
        "shared-bpe": _shared_bpe,
        "wordpiece": functools.partial(_wordpiece, lowercase=True),
        "wordpiece-cased": functools.partial(_wordpiece, lowercase=False),
        "words": _words,
    }
    return Tokenizer(makers[kind](texts, vocab_size))


def _bpe(texts: Iterable[str], vocab_size: int) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def _shared_bpe(texts: Iterable[str], vocab_size: int) -> str:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))  # noqa: S106
    spaces = Regex("[\u00a0\u2009\u202f]")  # French sets them before "!" and within numbers
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(spaces, " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.decoder = decoders.Metaspace()
    letters = [*_alphabet(texts, tokenizer.normalizer, min(_LETTERS, vocab_size // 4)), "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(_TRANSLATION),
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def _wordpiece(texts: Iterable[str], vocab_size: int, lowercase: bool) -> str:
    """Train WordPiece.

    The library numbers the characters inside words in the order of a hash table, which differs from run to run, and
    ties between merges are broken by these numbers. Given as special tokens they have fixed numbers; the vocabulary
    is then put into a tokenizer where they are ordinary tokens.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    def make(vocabulary: dict[str, int]) -> Tokenizer:
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))  # noqa: S106
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer

    untrained = make({})
    letters = _alphabet(texts, untrained.normalizer, min(_LETTERS, vocab_size // 4))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*_BERT, *letters, *(f"##{letter}" for letter in letters)],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    untrained.train_from_iterator(texts, trainer)
    trained = make(untrained.get_vocab())
    trained.add_special_tokens(list(_BERT))
    return trained.to_str()


def _words(texts: Iterable[str], vocab_size: int) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers

    count: Counter[str] = Counter()
    for text in texts:
        count.update(text.split())
    special = ("<unk>", "<eos>")
    known = sorted((word for word, n in count.items() if n >= _RARE), key=lambda word: (-count[word], word))
    words = [*special, *(word for word in known if word not in special)][:vocab_size]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    return tokenizer.to_str()


@functools.lru_cache(maxsize=1)
def _bytes() -> str:
    """Return the definition whose token n is byte n: byte-level BPE without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({letter: byte for byte, letter in enumerate(_byte_letters())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str()


def _byte_letters() -> Iterator[str]:
    """Yield the printable character that byte-level BPE writes for each byte: itself, or one from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    following = 256
    for byte in range(256):
        if byte in printable:
            yield chr(byte)
        else:
            yield chr(following)
            following += 1


def _alphabet(texts: Iterable[str], normalizer: Any, most: int) -> list[str]:
    """Return the most frequent characters of normalised text, sorted."""
    count: Counter[str] = Counter()
    for text in texts:
        count.update(normalizer.normalize_str(text))
    letters = sorted((c for c in count if not c.isspace()), key=lambda c: (-count[c], c))
    return sorted(letters[:most])
