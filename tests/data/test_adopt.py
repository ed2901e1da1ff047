"""Somebody's WebDataset shards become a set, unchanged; what cannot be is refused with a reason."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from paperscale.cli import main
from paperscale.data import index as shard_index
from paperscale.data.adopt import adopt
from paperscale.data.index import Rules
from paperscale.data.shards import ShardSet
from paperscale.data.verify import verify
from paperscale.errors import UserError
from streams import pictures


def picture(number: int) -> bytes:
    png = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (8, 8), dtype=np.uint8)).save(png, "png")
    return png.getvalue()


def write(path: Path, numbers: range, **members: bytes) -> None:
    with webdataset.TarWriter(str(path)) as writer:
        for number in numbers:
            sample = {"__key__": f"photos/{number:05d}", "png": picture(number), "cls": number % 7}
            writer.write({**sample, **members})


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    folder = tmp_path / "foreign"
    folder.mkdir()
    for shard in range(3):
        write(folder / f"train-{shard:04d}.tar", range(shard * 20, shard * 20 + 20))
    write(folder / "val-0000.tar", range(60, 70))
    return folder


def test_foreign_shards_become_a_set_without_being_changed(foreign):
    before = {path.name: path.read_bytes() for path in foreign.glob("*.tar")}
    adopted = adopt(foreign)
    assert {split: sum(s.samples for s in shards) for split, shards in adopted.manifest.splits.items()} == {
        "train": 60,
        "val": 10,
    }
    assert adopted.fields == ("cls", "png")
    assert {path.name: path.read_bytes() for path in foreign.glob("*.tar")} == before
    assert verify(foreign, deep=True).problems == []
    shards = ShardSet(foreign, "train")
    assert shards.key(1, 3) == "photos/00023"
    assert bytes(shards.read(1, 3)["png"]) == picture(23)
    seen = [n for batch in pictures(foreign).train_dataloader() for n in batch["sample"].tolist()]
    assert sorted(seen) == list(range(60))


def test_shards_that_cannot_be_written_beside_are_indexed_elsewhere(foreign, tmp_path):
    adopt(foreign, out=tmp_path / "index")
    assert not list(foreign.glob("*.idx"))
    assert verify(tmp_path / "index").problems == []
    assert bytes(ShardSet(tmp_path / "index", "val").read(0, 9)["png"]) == picture(69)


def test_splits_by_brace_patterns(foreign):
    adopted = adopt(foreign, {"train": ["train-{0000..0001}.tar"], "val": ["{train-0002,val-0000}.tar"]})
    assert [shard.name for shard in adopted.manifest.splits["val"]] == ["train-0002.tar", "val-0000.tar"]
    with pytest.raises(UserError, match=r"train-0003\.tar is missing; give the numbers of the shards that are there"):
        adopt(foreign, {"train": ["train-{0000..0005}.tar"]})
    with pytest.raises(UserError, match="Unbalanced braces"):
        adopt(foreign, {"train": ["train-{0000..0005.tar"]})


def test_shards_in_folders(tmp_path):
    for split, first in (("train", 0), ("val", 20)):
        (tmp_path / "nest" / split).mkdir(parents=True)
        write(tmp_path / "nest" / split / "0.tar", range(first, first + 10))
    for out in (None, tmp_path / "out"):
        adopted = adopt(tmp_path / "nest", out=out)
        assert {split: [s.name for s in shards] for split, shards in adopted.manifest.splits.items()} == {
            "train": ["train/0.tar"],
            "val": ["val/0.tar"],
        }
        assert verify(out or tmp_path / "nest", deep=True).problems == []
        assert bytes(ShardSet(out or tmp_path / "nest", "val").read(0, 1)["png"]) == picture(21)


def test_a_tar_in_two_splits_is_refused(foreign):
    with pytest.raises(UserError, match=r"train-0000\.tar is in train and in val: its samples would be in both"):
        adopt(foreign, {"train": ["train-*.tar"], "val": ["*-0000.tar"]})


def test_a_split_may_have_several_patterns(foreign, capsys):
    words = [
        "data",
        "index",
        str(foreign),
        "--split",
        "train=train-{0000..0001}.tar",
        "--split",
        "train=train-0002.tar",
    ]
    assert main(words) == 0
    assert "3 shards, train 60 samples" in capsys.readouterr().out


def test_a_failed_index_leaves_the_set_as_it_was(foreign):
    adopt(foreign)
    before = {path.name: path.read_bytes() for path in foreign.iterdir() if path.suffix != ".tar"}
    whole = (foreign / "train-0002.tar").read_bytes()
    (foreign / "train-0002.tar").write_bytes(whole[:3000])
    with pytest.raises(UserError, match=r"train-0002\.tar: not a readable tar"):
        adopt(foreign, rules=Rules(["png"]))
    (foreign / "train-0002.tar").write_bytes(whole)
    assert {name: (foreign / name).read_bytes() for name in before} == before
    assert verify(foreign).problems == []


def test_fields_in_capitals_are_webdatasets(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "train-0.tar")) as writer:
        writer.write({"__key__": "a", "PNG": picture(1), "CLS": b"1"})
    assert adopt(tmp_path).fields == ("cls", "png")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fields", "pgn"], "no sample has any of the fields ['pgn'], only ['cls', 'png']; did you mean 'png'?"),
        (["--length", "frames=nope.npy"], "--length frames=nope.npy: its samples have only ['cls', 'png']"),
        (["--classes", "nofile"], "--classes nofile: No such file or directory; name a text file"),
        (["--split", "train=nope*.tar"], "matches; it holds train-0000.tar, train-0001.tar, train-0002.tar..."),
    ],
)
def test_mistakes_name_what_is_there(foreign, words, message, capsys):
    assert main(["data", "index", str(foreign), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_set_that_is_not_a_folder_of_tars(foreign, tmp_path, capsys):
    os.mkfifo(foreign / "train-0009.tar")  # must not be waited for
    assert main(["data", "index", str(foreign)]) == 0
    (tmp_path / "empty").mkdir()
    for folder, message in (
        (foreign / "train-0000.tar", "is a file; name the folder that holds the tars"),
        ("http://host/x", "is a URL; index the shards where they can be written to"),
        (tmp_path / "empty", "holds no .tar file"),
    ):
        assert main(["data", "index", str(folder)]) == 2
        assert message in capsys.readouterr().err
    assert main(["data", "info", str(tmp_path / "empty")]) == 2
    assert "holds neither manifest.json nor a tar" in capsys.readouterr().err


def test_mistakes_in_showing(foreign, capsys):
    with webdataset.TarWriter(str(foreign / "names-0.tar")) as writer:
        writer.write({"__key__": "a", "png": picture(1), "cls": "cat"})
    adopt(foreign)
    assert verify(foreign, deep=True).problems == [], "a label may be a name"
    assert main(["data", "show", str(foreign), "--split", "names", "--out", str(foreign / "a.png")]) == 0
    for words, message in (
        (["--start", "-5"], "'-5' is not a whole number of at least 0"),
        (["--start", "60"], "split 'train' has 60 samples, numbered from 0"),
        (["--count", "0"], "'0' is not a whole number of at least 1"),
        (["--out", "/nope/x.png"], "/nope/x.png cannot be written"),
    ):
        assert main(["data", "show", str(foreign), *words]) == 2
        assert message in capsys.readouterr().err


def test_tars_of_every_kind_are_read(tmp_path):
    """GNU tar's and Python's formats, folders inside, long names, hidden files beside."""
    for number, kind in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        with tarfile.open(tmp_path / f"set-{number}.tar", "w", format=kind) as tar:
            folder = tarfile.TarInfo("deep")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for sample in range(5):
                info = tarfile.TarInfo(f"deep/{'x' * 90}{number}{sample}.seg.png")
                info.size = len(picture(sample))
                tar.addfile(info, io.BytesIO(picture(sample)))
    adopted = adopt(tmp_path)
    shards = ShardSet(tmp_path, "set")
    assert adopted.fields == ("seg.png",)
    assert all(bytes(shards.read(shard, row)["seg.png"]) == picture(row) for shard in range(3) for row in range(5))
    names = [sample["__key__"] for sample in webdataset.WebDataset(str(tmp_path / "set-1.tar"), shardshuffle=False)]
    assert names == [shards.key(1, row) for row in range(5)], "keys are WebDataset's"


def test_compressed_shards_are_refused_with_the_reason(foreign):
    tar = foreign / "train-0001.tar"
    (foreign / "train-0001.tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
    tar.unlink()
    with pytest.raises(UserError, match=r"train-0001\.tar\.gz: is compressed, so that no sample.*gunzip train-0001"):
        adopt(foreign)
    shutil.move(foreign / "train-0001.tar.gz", tar)  # whatever it is called
    with pytest.raises(UserError, match="is compressed, so that no sample"):
        adopt(foreign)


def test_compressed_members_are_refused_or_left_out(tmp_path):
    write(tmp_path / "set-0.tar", range(5), **{"json.gz": gzip.compress(b"{}")})
    with pytest.raises(
        UserError, match=r"member 'photos/00000\.json\.gz' is compressed.*or leave it out with `--fields`"
    ):
        adopt(tmp_path)
    assert adopt(tmp_path, rules=Rules(["png", "cls"])).fields == ("cls", "png")


def test_duplicate_keys_are_refused_in_a_shard_and_counted_across_shards(foreign):
    write(foreign / "train-0002.tar", range(10, 30))
    assert adopt(foreign).duplicates == {"train": 20, "val": 0}
    with webdataset.TarWriter(str(foreign / "train-0001.tar")) as writer:
        for key in ("a", "b", "a"):
            writer.write({"__key__": key, "png": b"x", "cls": b"1"})
    with pytest.raises(UserError, match=r"train-0001\.tar: .*sample 'a' .*or two samples have this key"):
        adopt(foreign)


@pytest.fixture
def incomplete(tmp_path: Path) -> Path:
    with webdataset.TarWriter(str(tmp_path / "train-0.tar")) as writer:
        for number in range(6):
            sample = {"__key__": f"{number}", "png": picture(number), "cls": b"1"}
            if number in (2, 4):
                del sample["cls"]
            writer.write(sample)
    return tmp_path


def test_missing_fields_are_refused_dropped_or_kept(incomplete):
    with pytest.raises(UserError, match=r"sample '2' has no 'cls', and 1 more samples; .*`--missing drop`"):
        adopt(incomplete)
    adopted = adopt(incomplete, rules=Rules(missing="drop"))
    assert adopted.incomplete == {"train": 2}
    assert [ShardSet(incomplete, "train").key(0, row) for row in range(4)] == ["0", "1", "3", "5"]
    assert adopt(incomplete, rules=Rules(missing="keep")).incomplete == {"train": 2}
    shards = ShardSet(incomplete, "train")
    assert shards.sizes == [6]
    assert list(shards.read(0, 2)) == ["png"]
    assert adopt(incomplete, rules=Rules(["png"])).incomplete == {"train": 0}


@pytest.mark.parametrize("damage", ["cut in a member", "cut between members", "zeros inside"])
def test_damaged_tars_are_refused(foreign, damage):
    tar = foreign / "train-0001.tar"
    content = tar.read_bytes()
    if damage == "cut in a member":
        content = content[:5000]
    elif damage == "cut between members":
        content = content[:8192]
    else:
        content = content[:8192] + bytes(4096) + content[12288:]
    tar.write_bytes(content)
    with pytest.raises(UserError, match=r"train-0001\.tar: not a readable tar \(.*write or copy the shard again"):
        adopt(foreign)


def test_lengths_are_taken_from_arrays(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "train-0.tar")) as writer:
        for number in range(5):
            writer.write({"__key__": f"{number}", "ids.npy": np.arange(number + 1)})
    adopt(tmp_path, rules=Rules(lengths={"tokens": "ids.npy"}))
    shards = ShardSet(tmp_path, "train")
    assert shards.shards[0].lengths == {"tokens": 15}
    assert shards.lengths(np.zeros(2, int), np.array([4, 0]), ["tokens"]).tolist() == [[5], [1]]


def test_what_is_known_of_a_set_is_kept_when_it_is_indexed_again(own_shards):
    before = ShardSet(own_shards, "train").manifest
    for path in own_shards.glob("*.idx"):
        path.unlink()
    after = adopt(own_shards).manifest
    assert (after.name, after.classes, after.image, after.provenance, after.splits["train"]) == (
        before.name,
        before.classes,
        before.image,
        before.provenance,
        before.splits["train"],
    )


def test_the_commands(foreign, capsys):
    assert main(["data", "index", str(foreign), "--fields", "png,cls"]) == 0
    assert "4 shards, train 60, val 10 samples; fields cls, png" in capsys.readouterr().out
    assert main(["data", "info", str(foreign)]) == 0
    assert "val      1 shards, 10 samples" in capsys.readouterr().out
    sheet = foreign.parent / "sheet.png"
    assert main(["data", "show", str(foreign), "--count", "5", "--seed", "3", "--out", str(sheet)]) == 0
    assert Image.open(sheet).size > (300, 100)
    assert capsys.readouterr().out.count("photos/000") == 5
    assert main(["data", "verify", str(foreign), "--deep"]) == 0
    assert "70 samples decoded" in capsys.readouterr().out
    content = bytearray((foreign / "train-0001.tar").read_bytes())
    content[int(shard_index.load(foreign / "train-0001.tar").members[0, 0]["offset"]) + 9] ^= 255
    (foreign / "train-0001.tar").write_bytes(content)
    assert main(["data", "verify", str(foreign)]) == 1
    assert "sample 'photos/00020'" in capsys.readouterr().out


def test_gnu_tar_made_shards(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
        (tmp_path / f"{number}.cls").write_text("3")
    subprocess.run(["tar", "--sort=name", "-cf", "00000.tar", *(f"{n}.{e}" for n in range(4) for e in ("cls", "png"))],
                   cwd=tmp_path, check=True)  # fmt: skip
    assert sum(s.samples for s in adopt(tmp_path).manifest.splits["train"]) == 4
