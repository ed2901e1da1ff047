"""Tokenizers: the same text gives the same file, text survives the way there and back, special tokens have roles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from paperscale.data.tokenizer import ALL_WORDS, KINDS, Tokenizer, TokenizerFile, train
from paperscale.errors import UserError

TEXTS = [
    "The quick brown fox jumps over the lazy dog; the dog, being lazy, does not care.",
    "A fox is quick. A dog is lazy! Does the fox care about the dog?",
    "Der schnelle braune Fuchs springt über den faulen Hund. Ähnlich übrigens die Katze.",
    "Le renard brun « saute » par-dessus le chien\u202f!",
    "数 and ∑ are rare.",
] * 5


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_text_gives_the_same_file_in_another_process(kind):
    script = (
        "import json, sys; from paperscale.data.tokenizer import train\n"
        "kind, texts = json.load(sys.stdin); print(train(kind, texts, 400).to_json(), end='')"
    )
    made = train(kind, TEXTS, 400).to_json()
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    command = (sys.executable, "-c", script)
    other = subprocess.run(command, input=json.dumps([kind, TEXTS]), env=environment, capture_output=True, text=True)
    assert other.stdout == made, other.stderr


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_byte_level_tokens_are_the_text(kind):
    tokenizer = train(kind, TEXTS, 400)
    texts = ["  The dog\n\n\tcares. ", "über 数 🦊", "<|endoftext|>", ""]
    assert [tokenizer.decode(tokens) for tokens in tokenizer.encode(texts)] == texts


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_the_bytes_of_byte_level_tokens_are_counted(kind):
    tokenizer = train(kind, TEXTS, 400)
    sizes = tokenizer.sizes()
    for text in (*TEXTS[:5], "  über 数 🦊\n\n"):
        assert sizes[tokenizer.encode([text])[0]].sum() == len(text.encode())
    assert [sizes[number] for number in tokenizer.special.values()] == [0] * len(tokenizer.special)
    assert train("wordpiece", TEXTS, 400).sizes() is None


def test_byte_tokens_are_the_bytes():
    tokenizer = train("bytes", [], 0)
    assert tokenizer.vocab_size == 256
    assert tokenizer.encode(["é\n"]) == [[0xC3, 0xA9, 10]]
    assert Tokenizer(tokenizer.to_json()).is_bytes


def test_a_translation_is_put_together_again():
    tokenizer = train("shared-bpe", TEXTS, 400)
    english, french = tokenizer.encode(["The fox, lazy!", "le chien\u202f!"])
    assert tokenizer.decode(english) == "The fox, lazy!"
    assert tokenizer.decode(french) == "le chien !"  # narrow spaces are spaces


def test_wordpiece_knows_case_only_where_asked():
    uncased, cased = train("wordpiece", TEXTS, 400), train("wordpiece-cased", TEXTS, 400)
    assert uncased.encode(["THE FOX über"]) == uncased.encode(["the fox uber"])
    assert cased.encode(["The"]) != cased.encode(["the"])


def test_words_are_those_that_occur_three_times():
    tokenizer = train("words", ["a a a b b b b c c", "<unk>"], ALL_WORDS)
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode(["b a c <unk>"]) == [[2, 3, 0, 0]]


def test_special_tokens_in_a_text_are_text():
    for kind in ("bpe", "shared-bpe", "wordpiece"):
        tokenizer = train(kind, TEXTS, 400)
        unknown = {tokenizer.special[t] for t in ("[UNK]", "<unk>") if t in tokenizer.special}
        tokens = tokenizer.encode(["[MASK] <pad> </s> <|endoftext|>"])[0]
        assert not (set(tokenizer.special.values()) - unknown) & set(tokens)


def test_special_tokens_begin_the_vocabulary():
    assert train("wordpiece", TEXTS, 400).special == {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    assert train("shared-bpe", TEXTS, 400).special == {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    assert train("bpe", TEXTS, 400).special == {"<|endoftext|>": 0}


def test_a_role_is_found_in_every_kind_or_refused():
    assert train("wordpiece", TEXTS, 400).number("mask") == 4
    assert train("shared-bpe", TEXTS, 400).number("end") == 2
    with pytest.raises(UserError, match=r"no token for 'mask'.*another --tokenizer"):
        train("bpe", TEXTS, 400).number("mask")


def test_a_tokenizer_brought_along_neither_pads_nor_cuts(tmp_path: Path):
    import tokenizers

    theirs = tokenizers.Tokenizer.from_str(train("wordpiece", TEXTS, 400).to_json())
    theirs.enable_padding(length=64)
    theirs.enable_truncation(4)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = TokenizerFile.at(tmp_path / "tokenizer.json").open()
    assert len(ours.encode(["the quick brown fox jumps"])[0]) >= 5
    assert len(ours.encode(["the"])[0]) == 1


def test_mistakes_are_named(tmp_path: Path):
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(UserError, match=r"t\.json: not a tokenizer.*name a tokenizer\.json"):
        Tokenizer.load(tmp_path / "t.json")
    with pytest.raises(UserError, match=r"none\.json: No such file or directory; name a tokenizer\.json"):
        Tokenizer.load(tmp_path / "none.json")
    with pytest.raises(UserError, match="did you mean 'wordpiece'"):
        train("wordpeice", TEXTS, 400)
    with pytest.raises(UserError, match="too small for bpe; give --vocab-size 300 or more"):
        train("bpe", TEXTS, 10)
