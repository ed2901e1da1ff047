"""Wikipedia, from a dump of its articles, and books: what BERT is trained on (Devlin et al. 2019, section 3.1).

``pages-articles.xml.bz2`` is read as a stream. Of each article the prose is kept: templates, tables, files, references,
headings and lists go, links become their text. The prose is written, a sentence a line and an empty line after each
article, to a file beside the shards; the tokenizer is trained on that, and the shards are written from it.
"""

from __future__ import annotations

import bz2
import html
import mmap
import re
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from paperscale.data.prepare.base import Dataset, Job, evenly, share_of, write_documents
from paperscale.data.prepare.sentences import split_sentences
from paperscale.data.prepare.text import ENWIK8, enwik8_splits
from paperscale.data.tokenizer import TokenizerFile
from paperscale.data.tokens import Document
from paperscale.data.writer import map_in_order
from paperscale.errors import UserError

_HELD = 1 / 200  # share of the articles that is val


class Page(NamedTuple):
    """A page of a dump, or a book."""

    title: str
    text: str
    wiki: bool


# -- from the dump to text -----------------------------------------------------------------------------------


def pages(dump: Path) -> Iterator[Page]:
    """Yield the articles of a dump, without redirects; uncompressed or bz2.

    Raises:
        UserError: the dump is damaged or cut off.
    """
    try:
        with _open(dump) as file:
            for page in _parse(file):
                fields = {element.tag.rpartition("}")[2]: element.text or "" for element in page.iter()}
                if _is_article(fields):
                    yield Page(fields["title"], fields["text"], wiki=True)
    except ElementTree.ParseError as error:
        raise UserError(
            f"{dump}, line {error.position[0]}: not the XML of a dump ({error}); download it again"
        ) from error
    except KeyError as error:
        raise UserError(f"{dump}: a page without {error}; name a pages-articles dump") from error
    except (EOFError, OSError) as error:
        raise UserError(f"{dump}: damaged or cut off ({error}); download it again") from error


def _is_article(fields: dict[str, str]) -> bool:
    """Return whether a page is in the main namespace and no redirect; dumps before 2010 say neither in a field."""
    title, text = fields["title"], fields["text"]
    main = fields["ns"] == "0" if "ns" in fields else title.partition(":")[0].lower() not in _NAMESPACES
    return main and "redirect" not in fields and not text[:12].lstrip().lower().startswith("#redirect")


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    with bz2.open(path) if path.suffix == ".bz2" else path.open("rb") as file:
        yield file  # type: ignore[misc]  # both read bytes


def _parse(file: BinaryIO) -> Iterator[ElementTree.Element]:
    """Yield each <page> and forget it."""
    parser = ElementTree.iterparse(file, events=("start", "end"))  # noqa: S314  # a dump the user trusts
    root = None
    for event, element in parser:
        if root is None:
            root = element
        if event == "end" and element.tag.rpartition("}")[2] == "page":
            yield element
            root.clear()


def books(paths: Sequence[Path]) -> Iterator[Page]:
    """Yield each text file as a book: paragraphs are parted by empty lines."""
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="replace")
        paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
        yield Page(path.stem, "\n".join(paragraphs), wiki=False)


def sentences_of(page: Page) -> str:
    """Return the sentences of a page, one a line; empty if it has none."""
    text = plain_text(page.text) if page.wiki else page.text
    found = (" ".join(s.split()) for line in text.split("\n") for s in split_sentences(line))
    return "\n".join(sentence for sentence in found if sentence)


_DROPPED = (
    "ref|math|gallery|timeline|syntaxhighlight|source|code|score|imagemap|table|chem|hiero|graph|mapframe|"
    "templatestyles"
)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_EMPTY_ELEMENT = re.compile(rf"<(?:{_DROPPED})\b[^<>]*/>", re.IGNORECASE)
_ELEMENT = re.compile(rf"<({_DROPPED})\b[^<>]*>.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
_TEMPLATE = re.compile(r"\{\{([^{}]*)\}\}")
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_EXTERNAL = re.compile(r"\[(?:https?:|ftp:)?//[^\s\]]+\s*([^\[\]]*)\]")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_SWITCH = re.compile(r"__[A-Z]+__")
_QUOTES = re.compile(r"'{2,5}")
_NOTHING_INSIDE = re.compile(r"\s*[(\[]\s*[,;:\s]*[)\]]")
_LEADING = re.compile(r"([(\[])\s*[,;:]\s*")
_HEADING = re.compile(r"\s*(={1,6})\s*(.+?)\s*\1\s*$")
_NOT_PROSE = ("*", "#", ":", ";", "|", "!", "{|", "----")
_NAMESPACE = re.compile(r"\s*:?\s*([A-Za-z][\w -]*?)\s*:(?! )")
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[a-z-]+)?$")
_NAMESPACES = frozenset(
    "file image category media template portal wikipedia help user talk special module draft mediawiki".split()  # noqa: SIM905
)


def plain_text(wikitext: str) -> str:
    r"""Return the prose of an article, a paragraph a line.

    >>> plain_text("'''Ada''' was an [[Analyst|analyst]].<ref>x</ref>\n\n== Life ==\n* item")
    'Ada was an analyst.'
    """
    text = _COMMENT.sub("", wikitext)
    text = _ELEMENT.sub("", _EMPTY_ELEMENT.sub("", text))
    text = _innermost(_TEMPLATE, _template, text)
    text = _innermost(_LINK, _link, _without_tables(text))
    text = _EXTERNAL.sub(r"\1", text)
    text = html.unescape(_SWITCH.sub("", _QUOTES.sub("", _TAG.sub("", text))))
    lines = (line.strip() for line in text.split("\n"))
    prose = (line for line in lines if line and not line.startswith(_NOT_PROSE) and not _HEADING.match(line))
    return "\n".join(tidied for line in prose if (tidied := _tidied(line)))


def _innermost(pattern: re.Pattern[str], replace: Any, text: str) -> str:
    """Replace from the inside out, as templates and links are nested."""
    for _ in range(30):
        text, count = pattern.subn(replace, text)
        if not count:
            break
    return text


def _template(match: re.Match[str]) -> str:
    """Return the text that a template shows: of most none."""
    name, *arguments = (part.strip() for part in match[1].split("|"))
    plain = [argument for argument in arguments if not re.match(r"[\w ]+=", argument)]
    name = name.lower()
    if name in ("convert", "cvt") and len(plain) >= 2:
        return " ".join(plain[:2])
    if (name == "lang" or name.startswith(("lang-", "transl"))) and plain:
        return plain[-1]
    if name in ("nowrap", "abbr", "small", "nobr", "em", "strong", "not a typo", "visible anchor") and plain:
        return plain[0]
    return {"ndash": "–", "snd": " – ", "spaced ndash": " – ", "mdash": "—", "nbsp": " ", "'": "'"}.get(name, "")  # noqa: RUF001


def _link(match: re.Match[str]) -> str:
    target, _, shown = match[1].partition("|")
    namespace = _NAMESPACE.match(target)
    if namespace and not target.lstrip().startswith(":"):
        name = namespace[1].lower()
        if name in _NAMESPACES or _LANGUAGE.match(namespace[1]):
            return ""
    return shown.rpartition("|")[2] if shown else target.lstrip(" :")


def _without_tables(text: str) -> str:
    """Drop the lines of tables; a heading ends one that is never closed."""
    if "{|" not in text:
        return text
    kept, depth = [], 0
    for line in text.split("\n"):
        start = line.lstrip(" :")
        if start.startswith("{|"):
            depth += 1
        elif depth and _HEADING.match(line):
            depth = 0
        if not depth:
            kept.append(line)
        elif start.startswith("|}"):
            depth -= 1
    return "\n".join(kept)


def _tidied(line: str) -> str:
    """Return a line without what removed templates leave behind; empty if no word is left."""
    line = _LEADING.sub(r"\1", _NOTHING_INSIDE.sub("", line))
    line = " ".join(line.replace("{{", "").replace("}}", "").replace("[[", "").replace("]]", "").split())
    return line if re.search(r"\w", line) else ""


# -- from text to shards -------------------------------------------------------------------------------------


class TextFile(Sequence[str]):
    """Documents of a text file, parted by empty lines.

    Args:
        path: the file.
        bounds: int64 [documents, 2], where each begins and ends in bytes.
    """

    def __init__(self, path: Path, bounds: NDArray[np.int64]):
        self.path, self.bounds = path, bounds
        with path.open("rb") as file:
            self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return TextFile(self.path, self.bounds[i])
        start, end = self.bounds[i].tolist()
        return self._content[start:end].decode()


def write_wikipedia(job: Job) -> None:
    """Write the articles of a dump, and books if a folder of them is named: a document each, of sentences."""
    originals = job.originals()
    dumps = originals.matching(r"\.xml(-p\d+p\d+)?(\.bz2)?")  # one file, or its numbered parts
    texts = originals.matching(r"\.txt")
    if not dumps:
        paths = ", ".join(map(str, job.options.source))
        raise UserError(f"{paths}: no .xml.bz2 among them; name {job.dataset.originals}")
    job.hash(originals.used)
    splits = _extract(job, dumps, texts)
    file = job.tokenizer(evenly(splits["train"]))
    job.note(articles={split: len(found) for split, found in splits.items()})
    for split, found in splits.items():
        write_documents(job, split, found, partial(encode_lines, file=file), file)


def _extract(job: Job, dumps: Sequence[Path], texts: Sequence[Path]) -> dict[str, TextFile]:
    """Write the prose to a scratch file, or find it there; return its documents by split."""
    job.scratch.mkdir(parents=True, exist_ok=True)
    path, done = job.scratch / "sentences.txt", job.scratch / "documents.npz"
    if not done.exists():
        found = _write_prose(job, path, dumps, texts)
        whole = done.with_name("unfinished.npz")
        np.savez(whole, **found)  # type: ignore[arg-type]
        whole.replace(done)
    with np.load(done) as bounds:
        return {split: TextFile(path, bounds[split]) for split in ("train", "val")}


def _write_prose(job: Job, path: Path, dumps: Sequence[Path], texts: Sequence[Path]) -> dict[str, NDArray[np.int64]]:
    """Write the prose; return where each document begins and ends, by split."""
    bounds = {"train": array("q"), "val": array("q")}
    source = (page for found in (*map(pages, dumps), books(texts)) for page in found)
    with path.open("wb") as out, job.counting("prose"):
        at = 0
        for document in map_in_order(sentences_of, source, job.processes):
            job.writer.progress(1)
            if not document:
                continue
            content = document.encode()
            split = "val" if share_of(document[:200]) < _HELD else "train"
            bounds[split].extend((at, at + len(content)))
            at += out.write(content + b"\n\n")
    if not bounds["train"] or not bounds["val"]:
        total = sum(map(len, bounds.values())) // 2
        raise UserError(f"{dumps[0]}: {total} articles with prose are too few; name a pages-articles dump")
    return {split: np.array(found, np.int64).reshape(-1, 2) for split, found in bounds.items()}


def write_enwik8_articles(job: Job) -> None:
    """Write the prose of enwik8's articles: the first 90 million bytes train, then 5 and 5 million, as of enwik8."""
    content = job.fetch(job.dataset.downloads[0])["enwik8"]
    splits: dict[str, list[str]] = {}
    for split, part in enwik8_splits(content).items():
        found = (article for page in part if (article := _article(page)) is not None)
        with job.counting(f"{split}, prose"):
            texts = map_in_order(sentences_of, found, job.processes)
            splits[split] = [text for text in _counted(job, texts) if text]
    file = job.tokenizer(splits["train"])
    job.note(articles={split: len(found) for split, found in splits.items()})
    for split, documents in splits.items():
        write_documents(job, split, documents, partial(encode_lines, file=file), file)


def _counted(job: Job, texts: Iterator[str]) -> Iterator[str]:
    for text in texts:
        job.writer.progress(1)
        yield text


def _article(page: bytes) -> Page | None:
    """Return a page of the dump as an article; ``None`` for what is none, or is cut off at the end of the file."""
    title = re.search(rb"<title>(.*?)</title>", page)
    text = re.search(rb"<text[^>]*>(.*?)</text>", page, re.DOTALL)
    if title is None or text is None:
        return None
    fields = {"title": html.unescape(title[1].decode()), "text": html.unescape(text[1].decode(errors="replace"))}
    return Page(**fields, wiki=True) if _is_article(fields) else None


def encode_lines(text: str, file: TokenizerFile) -> Document:
    """Return an article as a document: a line is a sentence; the tokenizer's end of text, if it has one, ends it."""
    tokenizer = file.open()
    lines = text.split("\n")
    if "[MASK]" in tokenizer.special or "<mask>" in tokenizer.special:
        return Document(tokenizer.encode(lines))
    found = tokenizer.encode([line if i == 0 else " " + line for i, line in enumerate(lines)])
    end = [tokenizer.special[token] for token in ("<|endoftext|>", "<eos>") if token in tokenizer.special]
    return Document([*found, end[:1]] if end else found)


DATASETS = {
    "enwik8-articles": Dataset(
        "the articles of enwik8",
        "Wikipedia's prose, sentence by sentence: 10 + 0.6 + 0.6 million words",
        "37 MB",
        "GFDL, CC BY-SA 3.0",
        write_enwik8_articles,
        (ENWIK8,),
        tokenizer="wordpiece",
        vocab_size=8192,
    ),
    "wikipedia": Dataset(
        "Wikipedia and books",
        "the prose of a dump's articles; a folder of books as .txt may be added",
        "22 GB",
        "CC BY-SA 4.0, GFDL; books as theirs",
        write_wikipedia,
        originals="enwiki-latest-pages-articles.xml.bz2 from https://dumps.wikimedia.org (and a folder of .txt)",
        fetched=False,
        tokenizer="wordpiece",
        vocab_size=30522,
    ),
}
