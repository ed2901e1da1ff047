"""Text sets from files in the official layout, small ones that are written here."""

from __future__ import annotations

import bz2
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from paperscale.data.prepare import prepare
from paperscale.data.prepare.glue import DATASETS as GLUE
from paperscale.data.prepare.sentences import split_sentences
from paperscale.data.prepare.text import _articles, _pages, encode_article
from paperscale.data.prepare.wikipedia import Page, pages, plain_text, sentences_of
from paperscale.data.shards import ShardSet
from paperscale.data.tokenizer import Tokenizer, TokenizerFile, train
from paperscale.data.tokens import TokenSet
from paperscale.errors import UserError

QUIET = Console(quiet=True)
WORDS = {"tokenizer": "words"}


def documents(folder: Path, split: str) -> list[tuple[list[str], int | None]]:
    """The documents of a split as the words of their sentences, and their labels."""
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    tokens = TokenSet(ShardSet(folder, split))
    found = []
    for shard, size in enumerate(tokens.sizes("documents")):
        for row in range(size):
            sentences, label = tokens.document(shard, row)
            found.append(([tokenizer.decode(s.tolist()) for s in sentences], label))
    return found


@pytest.fixture(scope="session")
def own_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer brought along, which loses nothing."""
    path = tmp_path_factory.mktemp("tokenizer") / "bytes.json"
    path.write_text(train("bytes", [], 0).to_json())
    return path


# -- sentences -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("It rained. It poured! Did it? Yes.", 4),
        ("Dr. Smith met J. R. R. Tolkien at St. Mary's. They talked.", 2),
        ("He lives in the U.S. The weather is fine.", 2),
        ("The U.S. Army came at 5 p.m. on Monday.", 1),
        ('"Why?" he asked. "Because," she said.', 2),
        ('She said "No." Then she left.', 2),
        ("It costs 3.50 dollars, i.e. too much, cf. Fig. 3.", 1),
        ("See p. 5 and No. 7. (He did.) [They did not.]", 3),
        ("First line\nsecond line", 2),
        ("Wait ... what? And so on ... e.g. this.", 2),
        ("A tokenised text . It goes on , here .", 2),
        ("Er kam. Über Nacht blieb er.", 2),
        ("これは文です。次の文です。", 2),
        ("It is plan B. The end.", 2),
        ("So am I. He knew.", 2),
    ],
)
def test_sentences(text, count):
    assert len(split_sentences(text)) == count, split_sentences(text)


@given(st.text(alphabet="aA.!?…\"')( \nU。\u00a0\r9", max_size=60))
def test_sentences_joined_are_the_text(text):
    found = split_sentences(text)
    assert "".join(found) == text
    assert all(found)


# -- language models -----------------------------------------------------------------------------------------

WIKITEXT = (
    " \n = Valkyria = \n \n A game . It sold . \n \n = = Plot = = \n \n War = peace . \n \n = Next = \n \n B . \n"
)


def test_wikitext_articles_are_cut_at_titles_and_nothing_is_lost():
    found = _articles(WIKITEXT)
    assert [article.split("\n")[1] for article in found] == [" = Valkyria = ", " = Next = "]
    assert "".join(found) == WIKITEXT


def tokenizer_file(folder: Path, kind: str) -> TokenizerFile:
    path = folder / f"{kind}.json"
    path.write_text(train(kind, [WIKITEXT] * 3, 400).to_json())
    return TokenizerFile.at(path)


def test_an_article_for_gpt_is_its_text_and_an_end(tmp_path):
    file = tokenizer_file(tmp_path, "bpe")
    article = _articles(WIKITEXT)[0]
    tokens = [token for sentence in encode_article(article, file).sentences for token in sentence]
    assert tokens.pop() == file.open().special["<|endoftext|>"]
    assert file.open().decode(tokens) == article


def test_an_article_for_bert_is_its_sentences_without_headings(tmp_path):
    file = tokenizer_file(tmp_path, "wordpiece")
    found = [file.open().decode(s) for s in encode_article(_articles(WIKITEXT)[0], file).sentences]
    assert found == ["a game.", "it sold.", "war = peace."]


def test_an_article_in_words_has_an_end_for_each_line(tmp_path):
    file = tokenizer_file(tmp_path, "words")
    article = _articles(WIKITEXT)[0]
    document = encode_article(article, file)
    assert len(document.sentences) == article.count("\n")
    assert sum(map(len, document.sentences)) == len(article.split()) + article.count("\n")


def test_pages_of_enwik8_joined_are_the_file():
    content = b"<mediawiki>\n  <page>\n a\n  </page>\n  <page>\n b\n  </page>\n"
    assert len(_pages(content)) == 3
    assert b"".join(_pages(content)) == content


# -- IMDb, SNLI ----------------------------------------------------------------------------------------------


def test_imdb_from_the_official_archive(tmp_path, own_tokenizer):
    with tarfile.open(tmp_path / "aclImdb_v1.tar.gz", "w:gz") as tar:
        for split in ("train", "test"):
            for sentiment in ("neg", "pos"):
                for i in range(5):
                    content = f"{split} {sentiment} {i}<br /><br />end".encode()
                    info = tarfile.TarInfo(f"aclImdb/{split}/{sentiment}/{i}_7.txt")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        tar.addfile(tarfile.TarInfo("aclImdb/train/unsup/0_0.txt"))
    archive = tmp_path / "aclImdb_v1.tar.gz"
    manifest = prepare("imdb", tmp_path / "set", QUIET, source=[archive], tokenizer=str(own_tokenizer))
    found = {split: documents(tmp_path / "set", split) for split in manifest.splits}
    assert [len(found[split]) for split in ("train", "val", "test")] == [8, 2, 10]
    everything = found["train"] + found["val"]
    assert sorted(text for (text,), _ in everything) == sorted(
        f"train {s} {i}\nend" for s in ("neg", "pos") for i in range(5)
    )
    assert all(label == ("pos" in text) for (text,), label in everything + found["test"])


def snli_line(premise: str, hypothesis: str, label: str) -> str:
    return json.dumps({"sentence1": premise, "sentence2": hypothesis, "gold_label": label})


def test_snli_from_the_official_archive(tmp_path, own_tokenizer):
    rows = [("A man.", "A person.", "entailment"), ("A man.", "A cat.", "contradiction"), ("A.", "B.", "-")]
    with zipfile.ZipFile(tmp_path / "snli_1.0.zip", "w") as archive:
        for name in ("train", "dev", "test"):
            text = "".join(snli_line(f"{name} {p}", h, label) + "\r\n" for p, h, label in rows)
            archive.writestr(f"snli_1.0/snli_1.0_{name}.jsonl", text)
            archive.writestr(f"__MACOSX/snli_1.0/._snli_1.0_{name}.jsonl", "x")
    options = {"source": [tmp_path / "snli_1.0.zip"], "tokenizer": str(own_tokenizer)}
    manifest = prepare("snli", tmp_path / "set", QUIET, **options)
    assert documents(tmp_path / "set", "val") == [(["dev A man.", "A person."], 0), (["dev A man.", "A cat."], 2)]
    assert manifest.classes == ["entailment", "neutral", "contradiction"]


def test_a_bad_line_of_snli_is_named(tmp_path):
    for name in ("train", "dev", "test"):
        (tmp_path / f"snli_1.0_{name}.jsonl").write_text(snli_line("a", "b", "neutral") + "\n{cut")
    with pytest.raises(UserError, match=r"snli_1\.0_train\.jsonl, line 2: not a pair of SNLI.*download the file again"):
        prepare("snli", tmp_path / "set", QUIET, source=[tmp_path])


# -- Wikipedia and books -------------------------------------------------------------------------------------

ARTICLE = """{{Infobox person|name={{nowrap|Ada}}|born={{birth date|1815|12|10}}}}
[[File:Ada.jpg|thumb|A picture of [[Ada]] herself]]
'''Ada Lovelace'''<ref name="a">{{cite book|title=X}}</ref> ({{IPAc-en|x}}; 1815 to 1852) was an [[England|English]]
mathematician.<ref name="a" /> She walked {{convert|5|km|mi}} to [https://x.org a site] &amp;
said &quot;''oui''&quot;.<!-- no -->

== Life ==
{| class="wikitable"
| cell || {{x}}
{|
| inner
|}
|}
* a list
She met Dr. [[Charles Babbage|Babbage]] at 5&nbsp;p.m. on Monday. {{lang|fr|Bonjour}}.
<gallery>
File:a.jpg
</gallery>
[[Category:People]]
[[de:Ada]]
"""


def test_prose_of_an_article():
    assert plain_text(ARTICLE).split("\n") == [
        "Ada Lovelace (1815 to 1852) was an English",
        "mathematician. She walked 5 km to a site &",
        'said "oui".',
        "She met Dr. Babbage at 5 p.m. on Monday. Bonjour.",
    ]


@pytest.mark.parametrize(
    "damaged", ["{{never closed", "}} never opened", "[[a|b", "{| no end\n| cell", "<ref>no end", "{{a}} {{{b", ""]
)
def test_damaged_wikitext_does_not_fail(damaged):
    assert "kept" in plain_text(f"kept before\n{damaged}\n== H ==\nkept after")


REDIRECT = '<redirect title="x" />'


def dump(articles: dict[str, str]) -> bytes:
    body = "".join(
        f"<page><title>{title}</title><ns>{int(title.startswith('Talk:'))}</ns><id>1</id>"
        f"{REDIRECT if text == 'redirect' else ''}<revision><id>2</id><text>{text}</text></revision></page>\n"
        for title, text in articles.items()
    )
    return f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/">\n<siteinfo/>\n{body}</mediawiki>'.encode()


def test_a_dump_in_several_streams_is_read_without_talk_and_redirects(tmp_path):
    content = dump({"A": "Text &lt;b&gt;a&lt;/b&gt;.", "Talk:A": "no", "R": "redirect", "B": "b"})
    path = tmp_path / "x-pages-articles.xml.bz2"
    path.write_bytes(bz2.compress(content[:150]) + bz2.compress(content[150:]))
    assert list(pages(path)) == [Page("A", "Text <b>a</b>.", True), Page("B", "b", True)]


def test_wikipedia_and_books_become_documents_of_sentences(tmp_path, own_tokenizer):
    articles = {f"T{n}": f"'''Article''' {n} is [[short]]. It ends.\n\n== H ==\n* list" for n in range(700)}
    (tmp_path / "x-pages-articles.xml.bz2").write_bytes(bz2.compress(dump({**articles, "Empty": "{{stub}}"})))
    (tmp_path / "books").mkdir()
    (tmp_path / "books/one.txt").write_text("CHAPTER I\n\nIt was a dark\nnight. It rained.\n")
    sources = [tmp_path / "x-pages-articles.xml.bz2", tmp_path / "books"]
    manifest = prepare("wikipedia", tmp_path / "set", QUIET, source=sources, tokenizer="wordpiece", vocab_size=300)
    found = documents(tmp_path / "set", "train")
    assert sum(manifest.provenance["articles"].values()) == 701
    assert 0 < manifest.provenance["articles"]["val"] < 20
    assert found[0][0][1] == "it ends."
    assert found[-1][0] == ["chapter i", "it was a dark night.", "it rained."]
    assert not (tmp_path / "set/scratch").exists()


def test_a_dump_that_is_cut_off_is_named(tmp_path):
    whole = bz2.compress(dump({f"T{n}": "Text." for n in range(50)}))
    path = tmp_path / "x-pages-articles.xml.bz2"
    path.write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"x-pages-articles\.xml\.bz2: damaged or cut off.*download it again"):
        prepare("wikipedia", tmp_path / "set", QUIET, source=[path])
    path.write_bytes(bz2.compress(dump({"A": "a <b> c"})))
    with pytest.raises(UserError, match=r"line 3: not the XML of a dump.*download it again"):
        prepare("wikipedia", tmp_path / "set2", QUIET, source=[path])


def test_a_page_without_prose_has_no_sentence():
    assert sentences_of(Page("x", "{{a|b}}\n* c\n== d ==", True)) == ""


# -- GLUE ----------------------------------------------------------------------------------------------------

TABLES = {
    "glue-cola": {
        "train.tsv": 'gj04\t1\t\tThey sang.\ngj04\t0\t*\tThey "sang\n',
        "dev.tsv": "gj04\t1\t\tWe ran.\n",
        "test.tsv": "index\tsentence\n0\tYou ran.\n",
    },
    "glue-sst2": {
        "train.tsv": "sentence\tlabel\nhide new secretions \t0\nfine \t1\n",
        "dev.tsv": "sentence\tlabel\nit 's\t1\n",
        "test.tsv": "index\tsentence\n0\tmeh\n",
    },
    "glue-stsb": {
        "train.tsv": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tg\tf\ty\to\ts\ts\tA plane.\tAn air plane.\t4.750\n",
        "dev.tsv": "index\tsentence1\tsentence2\tscore\n0\ta\tb\t0.000\n",
        "test.tsv": "index\tsentence1\tsentence2\n0\tc\td\n",
    },
    "glue-qqp": {
        "train.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        "1\t2\t3\tWhy?\tHow?\t0\n4\t5\tcut\n6\t7\t8\tA?\tA?\t1\n",
        "dev.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tWho?\tWhat?\t0\n",
        "test.tsv": "id\tquestion1\tquestion2\n0\tx?\ty?\n",
    },
    "glue-mnli": {
        "train.tsv": "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\tp\th\tneutral\tneutral\n",
        "dev_matched.tsv": "index\tsentence1\tsentence2\tlabel1\tlabel2\tgold_label\n0\tp\th\tx\ty\tcontradiction\n",
        "dev_mismatched.tsv": "index\tsentence1\tsentence2\tlabel1\tlabel2\tgold_label\n0\tp\th\tx\ty\tentailment\n",
        "test_matched.tsv": "index\tsentence1\tsentence2\n0\tp\th\n",
        "test_mismatched.tsv": "index\tsentence1\tsentence2\n0\tp\th\n",
    },
    "glue-qnli": {
        "train.tsv": "index\tquestion\tsentence\tlabel\n0\tq\ts\tnot_entailment\n",
        "dev.tsv": "index\tquestion\tsentence\tlabel\n0\tq\ts\tentailment\n",
        "test.tsv": "index\tquestion\tsentence\n0\tq\ts\n",
    },
    "glue-rte": {
        "train.tsv": "index\tsentence1\tsentence2\tlabel\n0\tp\th\tentailment\n",
        "dev.tsv": "index\tsentence1\tsentence2\tlabel\n0\tp\th\tnot_entailment\n",
        "test.tsv": "index\tsentence1\tsentence2\n0\tp\th\n",
    },
    "glue-wnli": {
        "train.tsv": "index\tsentence1\tsentence2\tlabel\n0\tp\th\t1\n",
        "dev.tsv": "index\tsentence1\tsentence2\tlabel\n0\tp\th\t0\n",
        "test.tsv": "index\tsentence1\tsentence2\n0\tp\th\n",
    },
}
EXPECTED = {
    "glue-cola": ([(['They "sang'], 0), (["They sang."], 1)], [(["We ran."], 1)], [(["You ran."], None)]),
    "glue-sst2": ([(["fine "], 1), (["hide new secretions "], 0)], [(["it 's"], 1)], [(["meh"], None)]),
    "glue-qqp": ([(["A?", "A?"], 1), (["Why?", "How?"], 0)], [(["Who?", "What?"], 0)], [(["x?", "y?"], None)]),
    "glue-mnli": ([(["p", "h"], 1)], [(["p", "h"], 2)], [(["p", "h"], None)]),
    "glue-qnli": ([(["q", "s"], 1)], [(["q", "s"], 0)], [(["q", "s"], None)]),
    "glue-rte": ([(["p", "h"], 0)], [(["p", "h"], 1)], [(["p", "h"], None)]),
    "glue-wnli": ([(["p", "h"], 1)], [(["p", "h"], 0)], [(["p", "h"], None)]),
}


def write_tables(folder: Path, tables: dict[str, str]) -> Path:
    folder.mkdir()
    for name, text in tables.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("name", EXPECTED)
def test_a_task_of_glue(name, tmp_path, own_tokenizer):
    folder = write_tables(tmp_path / "official", TABLES[name])
    manifest = prepare(name, tmp_path / "set", QUIET, source=[folder], tokenizer=str(own_tokenizer))
    train_split, val, test = EXPECTED[name]
    assert sorted(documents(tmp_path / "set", "train")) == train_split
    assert documents(tmp_path / "set", "val") == val
    assert documents(tmp_path / "set", "test") == test
    assert len(manifest.splits) == (5 if name == "glue-mnli" else 3)


def test_every_task_of_glue_is_tested():
    assert {*EXPECTED, "glue-stsb", "glue-mrpc"} == set(GLUE)


def test_stsb_has_scores(tmp_path, own_tokenizer):
    folder = write_tables(tmp_path / "official", TABLES["glue-stsb"])
    prepare("glue-stsb", tmp_path / "set", QUIET, source=[folder], tokenizer=str(own_tokenizer))
    rows = [json.loads(bytes(ShardSet(tmp_path / "set", s).read(0, 0)["json"])) for s in ("train", "test")]
    assert rows[0] == {
        "sentences": ["A plane.", "An air plane."],
        "tokens": [list(b"A plane."), list(b"An air plane.")],
        "score": 4.75,
    }
    assert rows[1]["score"] is None


def test_mrpc_from_the_files_of_microsoft(tmp_path, own_tokenizer):
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    tables = {
        "msr_paraphrase_train.txt": header + "1\t10\t11\tA.\tB.\n0\t12\t13\tC.\tD.\n",
        "msr_paraphrase_test.txt": header + "1\t14\t15\tE.\tF.\n",
        "dev_ids.tsv": "12\t13\n",
    }
    folder = write_tables(tmp_path / "official", tables)
    prepare("glue-mrpc", tmp_path / "set", QUIET, source=[folder], tokenizer=str(own_tokenizer))
    assert documents(tmp_path / "set", "train") == [(["A.", "B."], 1)]
    assert documents(tmp_path / "set", "val") == [(["C.", "D."], 0)]
    assert documents(tmp_path / "set", "test") == [(["E.", "F."], 1)]


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        ("glue-rte", "train.tsv", "index\tsentence1\tsentence2\n0\tp\th\n", r"train\.tsv, line 1: no column 'label'"),
        (
            "glue-rte",
            "dev.tsv",
            "index\tsentence1\tsentence2\tlabel\n0\tp\n",
            r"dev\.tsv, line 2: 2 columns, 4 or more",
        ),
        (
            "glue-rte",
            "dev.tsv",
            "index\tsentence1\tsentence2\tlabel\n0\tp\th\tmaybe\n",
            "line 2: label 'maybe' is none",
        ),
        (
            "glue-cola",
            "train.tsv",
            "gj04\t1\n",
            r"train\.tsv, line 1: 2 columns, 4 or more expected; download it again",
        ),
        ("glue-stsb", "dev.tsv", "index\tsentence1\tsentence2\tscore\n0\ta\tb\t7\n", "label '7' is none of 0 to 5"),
    ],
)
def test_a_malformed_table_is_named_with_its_line(name, file, text, message, tmp_path, own_tokenizer):
    folder = write_tables(tmp_path / "official", {**TABLES[name], file: text})
    with pytest.raises(UserError, match=message):
        prepare(name, tmp_path / "set", QUIET, source=[folder], tokenizer=str(own_tokenizer))


def test_a_folder_of_several_tasks_is_refused(tmp_path):
    (tmp_path / "glue").mkdir()
    write_tables(tmp_path / "glue/RTE", TABLES["glue-rte"])
    write_tables(tmp_path / "glue/QNLI", TABLES["glue-qnli"])
    with pytest.raises(UserError, match=r"'train\.tsv' is there twice.*name the folder of one set"):
        prepare("glue-rte", tmp_path / "set", QUIET, source=[tmp_path / "glue"])


# -- SQuAD ---------------------------------------------------------------------------------------------------


def squad(question: dict[str, object]) -> str:
    paragraph = {"context": "The cat sat.", "qas": [question]}
    return json.dumps({"version": "2.0", "data": [{"title": "Cats", "paragraphs": [paragraph]}]})


def test_squad_keeps_answers_by_their_characters(tmp_path):
    answer = {"text": "cat", "answer_start": 4}
    (tmp_path / "train-v2.0.json").write_text(squad({"id": "q1", "question": "Who?", "answers": [answer]}))
    impossible = {"id": "q2", "question": "Why?", "answers": [], "is_impossible": True, "plausible_answers": [answer]}
    (tmp_path / "dev-v2.0.json").write_text(squad(impossible))
    prepare("squad-2.0", tmp_path / "set", QUIET, source=[tmp_path / "train-v2.0.json", tmp_path / "dev-v2.0.json"])
    rows = [json.loads(bytes(ShardSet(tmp_path / "set", s).read(0, 0)["json"])) for s in ("train", "val")]
    assert rows[0] == {
        "id": "q1",
        "title": "Cats",
        "question": "Who?",
        "passage": "The cat sat.",
        "answers": [{"text": "cat", "start": 4}],
        "impossible": False,
    }
    assert rows[1]["impossible"]
    assert rows[1]["answers"] == []


def test_malformed_squad_is_named(tmp_path):
    (tmp_path / "dev-v1.1.json").write_text(squad({"id": "q", "question": "Q", "answers": []}))
    (tmp_path / "train-v1.1.json").write_text(squad({"id": "q9", "question": "Q"}))
    with pytest.raises(UserError, match=r"train-v1\.1\.json: question q9 or what follows lacks 'answers'"):
        prepare("squad-1.1", tmp_path / "set", QUIET, source=[tmp_path])
    (tmp_path / "train-v1.1.json").write_text('{"data":\n [')
    with pytest.raises(UserError, match=r"train-v1\.1\.json, line 2: no JSON .*download it again"):
        prepare("squad-1.1", tmp_path / "set", QUIET, source=[tmp_path])
