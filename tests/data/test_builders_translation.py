"""Translation pairs: from sources that are fetched, and from the official files of WMT, small ones written here."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from paperscale.data.prepare import prepare, translation
from paperscale.data.prepare.translation import Corpora, Corpus, bible, descriptions, hold_out, libreoffice
from paperscale.data.shards import ShardSet
from paperscale.data.sources import Download, Web
from paperscale.data.tokenizer import Tokenizer, train
from paperscale.data.tokens import TokenSet
from paperscale.errors import UserError

QUIET = Console(quiet=True)


@pytest.fixture(scope="session")
def own_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer for the alphabet."""
    path = tmp_path_factory.mktemp("tokenizer") / "shared.json"
    text = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 äöüß éèàçê .,!?&<>'"
    path.write_text(train("shared-bpe", [text] * 3, 300).to_json())
    return path


def pairs_of(folder: Path, split: str) -> list[tuple[str, ...]]:
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    end = tokenizer.number("end")
    tokens = TokenSet(ShardSet(folder, split))
    found = []
    for row in range(tokens.sizes("documents")[0]):
        sentences = [sentence.tolist() for sentence in tokens.document(0, row)[0]]
        assert all(sentence[-1] == end for sentence in sentences)
        found.append(tuple(tokenizer.decode(sentence) for sentence in sentences))
    return found


def test_no_sentence_that_is_held_out_is_in_train():
    pairs = [(f"source {n % 700}", f"target {n % 900}") for n in range(3000)]
    splits = hold_out(pairs)
    assert all(len(found) > 5 for found in splits.values())
    held = [*splits["val"], *splits["test"]]
    assert not {a for a, _ in held} & {a for a, _ in splits["train"]}
    assert not {b for _, b in held} & {b for _, b in splits["train"]}
    assert not {a for a, _ in splits["val"]} & {a for a, _ in splits["test"]}


# -- English-French ------------------------------------------------------------------------------------------


def test_en_fr_from_the_official_archive(tmp_path, own_tokenizer):
    lines = [f"Word {n}.\tMot {n} !\tCC-BY 2.0 (France) #{n}" for n in range(400)]
    with zipfile.ZipFile(tmp_path / "fra-eng.zip", "w") as archive:
        archive.writestr("fra.txt", "\n".join(lines) + "\n")
    source = [tmp_path / "fra-eng.zip"]
    prepare("en-fr", tmp_path / "set", QUIET, source=source, tokenizer=str(own_tokenizer))
    found = [pair for split in ("train", "val", "test") for pair in pairs_of(tmp_path / "set", split)]
    assert sorted(found) == sorted((f"Word {n}.", f"Mot {n} !") for n in range(400))


def test_an_interrupted_preparation_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    (tmp_path / "fra.txt").write_text("".join(f"Word {n}.\tMot {n} !\t\n" for n in range(400)))
    options = {"source": [tmp_path / "fra.txt"], "vocab_size": 300}
    with monkeypatch.context() as patch:
        patch.setattr(translation, "write_documents", partial(_until, "test", translation.write_documents))
        with pytest.raises(KeyboardInterrupt):
            prepare("en-fr", tmp_path / "set", QUIET, **options)
    assert sorted(path.name for path in (tmp_path / "set").glob("*.tar")) == ["train-000000.tar", "val-000000.tar"]
    inode = (tmp_path / "set/train-000000.tar").stat().st_ino
    prepare("en-fr", tmp_path / "set", QUIET, **options)
    prepare("en-fr", tmp_path / "whole", QUIET, **options)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "set" / path.name).read_bytes() == path.read_bytes(), path.name
    assert (tmp_path / "set/train-000000.tar").stat().st_ino == inode  # not written again


def _until(stop: str, write, job, split, *rest):
    if split == stop:
        raise KeyboardInterrupt
    write(job, split, *rest)


def test_a_line_without_a_tab_is_named(tmp_path):
    (tmp_path / "fra.txt").write_text("Go.\tVa !\nGo.\n")
    with pytest.raises(UserError, match=r"fra\.txt, line 2: no tab between English and French"):
        prepare("en-fr", tmp_path / "set", QUIET, source=[tmp_path / "fra.txt"])


# -- English-German ------------------------------------------------------------------------------------------


def tar_bytes(members: dict[str, str], mode: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return file.getvalue()


def deb(members: dict[str, str]) -> bytes:
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": tar_bytes(members, "w:xz")}
    content = b"!<arch>\n"
    for name, body in parts.items():
        content += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(body):<10}`\n".encode() + body + b"\n" * (len(body) % 2)
        )
    return content


def test_paragraphs_of_the_help_are_paired_by_page_and_id():
    page = '<p class="x" id="par_1" dir="auto">{} <span>{}</span> &amp; so\non</p><h1 id="hd">{}</h1><p id="{}">x</p>'
    english = {
        "e.deb": deb({"./usr/share/libreoffice/help/en-US/text/a.html": page.format("Save", "it", "Title", "e")})
    }
    german = {
        "d.deb": deb({"./usr/share/libreoffice/help/de/text/a.html": page.format("Alles", "speichern", "Titel", "d")})
    }
    assert list(libreoffice(english, german)) == [("Save it & so on", "Alles speichern & so on"), ("Title", "Titel")]


def test_descriptions_are_paired_by_their_original():
    def stanza(language: str, md5: str, title: str, body: str) -> str:
        return f"Package: p\nDescription-md5: {md5}\nDescription-{language}: {title}\n{body}\n"

    english = (
        stanza("en", "1", "a tool", " It does\n this.\n .\n And that.") + "\n" + stanza("en", "2", "old", " Text.")
    )
    german = (
        stanza("de", "1", "ein Werkzeug", " Es tut\n dies.\n .\n Und das.") + "\n" + stanza("de", "3", "neu", " X.")
    )
    lists = {"Translation-en": english.encode(), "Translation-de": german.encode()}
    assert list(descriptions(lists)) == [
        ("a tool", "ein Werkzeug"),
        ("It does this.", "Es tut dies."),
        ("And that.", "Und das."),
    ]


def test_verses_are_paired_by_their_numbers():
    def book(first: str, more: str = "") -> dict[str, bytes]:
        verse = f'<VERS vnumber="1">{first} </VERS>{more}'
        text = f'<XMLBIBLE><BIBLEBOOK bnumber="1"><CHAPTER cnumber="1">{verse}</CHAPTER></BIBLEBOOK></XMLBIBLE>'
        return {"b.tgz": tar_bytes({"package/text/1.xml": "\ufeff" + text}, "w:gz")}

    german = book("Am  Anfang", '<VERS vnumber="2">Und</VERS>')
    assert list(bible(book("In the beginning"), german)) == [("In the beginning", "Am Anfang")]


def test_a_part_of_en_de_that_cannot_be_had_is_left_out_and_said(tmp_path, own_tokenizer, monkeypatch, capsys):
    verse = "".join(f'<VERS vnumber="{n}">{{}} {n}</VERS>' for n in range(300))
    text = f'<XMLBIBLE><BIBLEBOOK bnumber="1"><CHAPTER cnumber="1">{verse}</CHAPTER></BIBLEBOOK></XMLBIBLE>'
    downloads = []
    for name, word in (("en", "Word"), ("de", "Wort")):
        (tmp_path / name).write_bytes(tar_bytes({"package/text/1.xml": text.replace("{}", word)}, "w:gz"))
        downloads.append(Download(name, {name: ""}, (Web(tmp_path.as_uri(), suffix=""),)))
    gone = Download("gone", {"gone": ""}, (Web("http://127.0.0.1:9"),))
    parts = (
        translation.Part("The gone", (gone, gone), bible, "none"),
        translation.Part("The Bible", tuple(downloads), bible, "CC0"),
    )
    monkeypatch.setattr(translation, "EN_DE", parts)
    manifest = prepare("en-de", tmp_path / "set", Console(width=200), tokenizer=str(own_tokenizer))
    assert "left out: The gone: gone: no source can be reached" in capsys.readouterr().out
    assert manifest.provenance["parts"] == {"The Bible": {"pairs": 300, "licence": "CC0"}}
    assert manifest.provenance["left_out"] == ["The gone"]
    found = pairs_of(tmp_path / "set", "train")
    assert all(english.replace("Word", "Wort") == german for english, german in found)
    monkeypatch.setattr(translation, "EN_DE", parts[:1])
    with pytest.raises(UserError, match="none of its sources can be had"):
        prepare("en-de", tmp_path / "set2", QUIET)


# -- WMT 2014 ------------------------------------------------------------------------------------------------


@pytest.fixture
def wmt(tmp_path: Path) -> Path:
    folder = tmp_path / "official"
    (folder / "training").mkdir(parents=True)
    for stem in ("europarl-v7.de-en", "commoncrawl.de-en", "news-commentary-v9.de-en"):
        lines = [(f"Word {stem[0]}{n}.", f"Wort {stem[0]}{n}.") for n in range(20)]
        lines[3] = ("", "Leer.")
        (folder / f"training/{stem}.en").write_text("".join(a + "\n" for a, _ in lines))
        (folder / f"training/{stem}.de").write_text("\n".join(b for _, b in lines))  # no end at the last line
    (folder / "newstest2013.en").write_text("A\u2028b.\n")  # a line separator of Unicode ends no line
    (folder / "newstest2013.de").write_text("Ein b.\n")
    for role, language, text in (("src", "en", "Tea &amp; cake."), ("ref", "de", "Tee &amp; Kuchen.")):
        sgm = f'<srcset setid="x">\n<doc>\n<seg id="1">{text}</seg>\n</doc>\n</srcset>\n'
        (folder / f"newstest2014-deen-{role}.{language}.sgm").write_text(sgm)
    return folder


def test_wmt_from_the_official_files(wmt, tmp_path, own_tokenizer):
    manifest = prepare("wmt14-en-de", tmp_path / "set", QUIET, source=[wmt], tokenizer=str(own_tokenizer))
    found = pairs_of(tmp_path / "set", "train")
    expected = [(f"Word {c}{n}.", f"Wort {c}{n}.") for c in "ecn" for n in range(20) if n != 3]
    assert sorted(found) == sorted(expected)
    assert found != expected  # the corpora are mixed
    assert pairs_of(tmp_path / "set", "test") == [("Tea & cake.", "Tee & Kuchen.")]
    assert manifest.provenance["corpora"]["europarl-v7.de-en"] == 19


def test_wmt_from_its_archives_and_from_gzipped_files(wmt, tmp_path, own_tokenizer):
    for path in (wmt / "training").iterdir():
        path.rename(path.with_name(path.name.replace("de-en", "fr-en").replace(".de", ".fr")))
    for stem in ("undoc.2000.fr-en", "giga-fren.release2.fixed"):
        for language in ("en", "fr"):
            text = f"{stem[0]} {language}\n".encode()
            gz = stem.startswith("giga")
            path = wmt / f"training/{stem}.{language}{'.gz' * gz}"
            path.write_bytes(gzip.compress(text) if gz else text)
    with tarfile.open(wmt / "training-parallel.tgz", "w:gz") as tar:
        tar.add(wmt / "training", "training")
    for path in (wmt / "training").iterdir():
        path.unlink()
    (wmt / "newstest2013.de").rename(wmt / "newstest2013.fr")
    (wmt / "newstest2014-deen-ref.de.sgm").rename(wmt / "newstest2014-fren-ref.fr.sgm")
    (wmt / "newstest2014-deen-src.en.sgm").rename(wmt / "newstest2014-fren-src.en.sgm")
    prepare("wmt14-en-fr", tmp_path / "set", QUIET, source=[wmt], tokenizer=str(own_tokenizer))
    found = pairs_of(tmp_path / "set", "train")
    assert len(found) == 3 * 19 + 2
    assert ("g en", "g fr") in found


def test_files_that_do_not_belong_together_are_named(wmt, tmp_path):
    (wmt / "training/commoncrawl.de-en.de").write_text("eins\n")
    with pytest.raises(UserError, match=r"commoncrawl\.de-en\.en has 20 lines, .*\.de has 1; download both again"):
        prepare("wmt14-en-de", tmp_path / "set", QUIET, source=[wmt])
    (wmt / "training/commoncrawl.de-en.de").write_text("x\n" * 20)
    (wmt / "newstest2013.de").unlink()
    with pytest.raises(UserError, match=r"newstest2013\.de or newstest2013-ref\.de\.sgm is not in"):
        prepare("wmt14-en-de", tmp_path / "set2", QUIET, source=[wmt])


def test_pairs_are_made_one_at_a_time_and_a_part_of_them_is_in_the_same_order(tmp_path):
    (tmp_path / "a").write_text("".join(f"{n}\n" for n in range(50)))
    corpora = Corpora([Corpus(tmp_path / "a", tmp_path / "a")] * 2)
    assert len(corpora) == 100
    assert list(corpora[90:]) == list(corpora)[90:]
    assert sorted(int(a) for a, _ in corpora) == sorted([*range(50)] * 2)
