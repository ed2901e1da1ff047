"""Shards on disk: written atomically and the same every time, readable by anyone, never wrong in silence."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from helpers import wait_for
from paperscale.data import index as shard_index
from paperscale.data.faults import SampleFault
from paperscale.data.shards import ShardSet, read_manifest
from paperscale.data.verify import verify
from paperscale.data.writer import ShardWriter
from paperscale.errors import UserError
from tiny import SIZES, encode, image_of, items, write_set


def test_the_same_input_gives_the_same_bytes(tmp_path, tiny_shards):
    again = write_set(tmp_path / "again")
    for path in tiny_shards.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_every_sample_comes_back(tiny_shards):
    shards = ShardSet(tiny_shards, "train")
    number = 0
    for shard, size in enumerate(shards.sizes):
        for row in range(size):
            sample = shards.read(shard, row)
            image, label = image_of("train", number)
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample["png"]))), image)
            assert int(bytes(sample["cls"])) == label
            number += 1
    assert number == SIZES["train"]


def test_webdataset_reads_our_tars(tiny_shards):
    urls = [str(path) for path in sorted(tiny_shards.glob("train-*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode("l8").to_tuple("png", "cls")
    found = list(dataset)
    assert len(found) == SIZES["train"]
    image, label = image_of("train", 100)
    assert np.array_equal(found[100][0], image)
    assert found[100][1] == label


def test_a_killed_writer_goes_on_after_the_last_complete_shard(tmp_path):
    script = (
        "import os, sys; sys.path.insert(0, sys.argv[2])\n"
        "from tiny import encode, items\nfrom paperscale.data.writer import ShardWriter\n"
        "def dying(item):\n"
        "    if item[1] == 94: os.kill(os.getpid(), 9)\n"
        "    return encode(item)\n"
        "ShardWriter(sys.argv[1], 'tiny', shard_samples=37, num_processes=0).write('train', items('train'), dying)\n"
    )
    here = str(Path(__file__).parents[1])
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path / "set"), here], check=False)
    assert result.returncode == -9
    names = sorted(path.name for path in (tmp_path / "set").glob("*.tar"))
    assert names == ["train-000000.tar", "train-000001.tar"]
    kept = (tmp_path / "set/train-000000.tar").stat().st_mtime_ns
    asked: list[int] = []

    def counting(item):
        asked.append(item[1])
        return encode(item)

    with ShardWriter(tmp_path / "set", "tiny", shard_samples=37, num_processes=0) as writer:
        writer.write("train", items("train"), counting)
    assert asked == [73, *range(74, 230)], "complete shards are not encoded again, but for the sample that is compared"
    assert (tmp_path / "set/train-000000.tar").stat().st_mtime_ns == kept
    whole = write_set(tmp_path / "whole")
    for tar in (tmp_path / "set").glob("*.tar"):
        assert tar.read_bytes() == (whole / tar.name).read_bytes()


def test_a_resumed_writer_refuses_another_input(tmp_path):
    ShardWriter(tmp_path, "tiny", shard_samples=37, num_processes=0).write("train", items("train"), encode)
    with pytest.raises(UserError, match="end with sample 'train-0229', the input has 'train-0000' in its place"):
        ShardWriter(tmp_path, "tiny", num_processes=0).write("train", reversed(items("train")), encode)
    with pytest.raises(UserError, match="end with sample 'train-0229', the input ends before"):
        ShardWriter(tmp_path, "tiny", num_processes=0).write("train", items("train")[:50], encode)


def test_a_resumed_writer_refuses_a_changed_encoding(tmp_path):
    ShardWriter(tmp_path, "tiny", shard_samples=37, num_processes=0).write("train", items("train"), encode)
    with pytest.raises(UserError, match="end with sample 'train-0229', the input gives it another content"):
        ShardWriter(tmp_path, "tiny", num_processes=0).write("train", items("train"), relabelled)


def relabelled(item):
    return {**encode(item), "cls": b"0"}


def test_a_key_with_a_dot_is_refused(tmp_path):
    """WebDataset would cut it there, and take several samples for one."""
    samples = [{"__key__": f"IMG_2024.{n:02d}", "txt": "x"} for n in range(6)]
    with pytest.raises(UserError, match=r"its key 'IMG_2024\.00' has a dot, .*use 'IMG_2024-00'"):
        ShardWriter(tmp_path, "dots").write("train", samples)
    with ShardWriter(tmp_path / "folders", "dots") as writer:
        writer.write("train", [{"__key__": "v1.0/a", "txt": "x"}, {"__key__": "v1.0/b", "txt": "x"}])
    assert ShardSet(tmp_path / "folders", "train").sizes == [2]


def test_an_item_without_a_sample_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"sample 3 of 'train' is NoneType without a '__key__'.*leave out beforehand"):
        ShardWriter(tmp_path, "holes").write("train", range(10), lambda n: None if n == 3 else encode(("train", n)))


def test_two_samples_of_one_key_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"have the same key|occurs twice"):
        ShardWriter(tmp_path, "twice").write("train", [{"__key__": "a", "txt": "x"}, {"__key__": "a", "txt": "y"}])


def test_a_script_without_a_main_guard_is_told(tmp_path):
    script = tmp_path / "write.py"
    script.write_text(
        "from paperscale.data import ShardWriter\n"
        "def encode(n): return {'__key__': str(n), 'txt': 'x'}\n"
        "ShardWriter('set', 'set', num_processes=2).write('train', range(2000), encode)\n"
    )
    result = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "a worker process ended before its time: a script needs `if __name__ == '__main__':`" in result.stderr


def test_an_encoding_that_worker_processes_cannot_have_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"<lambda> cannot be sent to worker processes .*or .*num_processes=0"):
        ShardWriter(tmp_path, "lambda", num_processes=2).write("train", range(9), lambda n: encode(("train", n)))


def test_worker_processes_end_with_a_killed_writer(tmp_path):
    script = tmp_path / "write.py"
    script.write_text(
        "import os, time\nfrom pathlib import Path\nfrom paperscale.data import ShardWriter\n"
        "def encode(n):\n"
        "    Path(f'worker-{os.getpid()}').touch()\n    time.sleep(0.01)\n"
        "    return {'__key__': str(n), 'txt': 'x'}\n"
        "if __name__ == '__main__': ShardWriter('set', 'set', num_processes=2).write('train', range(5000), encode)\n"
    )
    process = subprocess.Popen([sys.executable, script], cwd=tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("worker-*"))) == 2, 30)
    process.kill()
    process.wait()
    workers = [Path("/proc") / path.name.removeprefix("worker-") for path in tmp_path.glob("worker-*")]
    wait_for(lambda: not any(worker.exists() for worker in workers), 15)


def test_an_index_of_other_fields_is_not_taken(own_shards):
    """As a `data index` that was killed between two shards would leave it."""
    tar = own_shards / "train-000001.tar"
    other = shard_index.build(tar, shard_index.Rules(["png"]))
    (own_shards / "train-000001.tar.idx").write_bytes(shard_index.to_bytes(other))
    with pytest.raises(SampleFault, match=r"train-000001\.tar\.idx: not the index of the shard in manifest\.json"):
        ShardSet(own_shards, "train").read(1, 0)
    assert len(verify(own_shards).problems) == 1


def test_the_number_of_processes_does_not_change_the_bytes(tmp_path, tiny_shards):
    again = write_set(tmp_path / "again", num_processes=2)
    for path in tiny_shards.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_shards_are_closed_at_the_target_size(tmp_path):
    with ShardWriter(tmp_path, "tiny", shard_bytes=100_000) as writer:
        writer.write("train", items("train"), encode)
    sizes = [shard.bytes for shard in read_manifest(tmp_path).splits["train"]]
    assert all(100_000 <= size < 115_000 for size in sizes[:-1])
    assert len(sizes) > 3


def test_a_complete_set_is_not_written_over(tiny_shards):
    with pytest.raises(UserError, match="holds a complete set; choose another folder"):
        ShardWriter(tiny_shards, "tiny")


def test_shards_of_a_longer_input_are_removed(tmp_path):
    ShardWriter(tmp_path, "tiny", shard_samples=37, num_processes=0).write("train", items("train"), encode)
    (tmp_path / "train-000002.tar").write_bytes(b"damaged")
    with ShardWriter(tmp_path, "tiny", shard_samples=37, num_processes=0) as writer:
        writer.write("train", items("train")[:100], encode)
    assert sorted(p.name for p in tmp_path.glob("*.tar")) == [f"train-{n:06d}.tar" for n in range(3)]


def test_the_index_knows_the_keys(tiny_shards):
    shards = ShardSet(tiny_shards, "train")
    assert shards.key(1, 3) == "train-0040"
    assert shard_index.load(tiny_shards / "train-000000.tar").all_keys() == [f"train-{n:04d}" for n in range(37)]


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist; make one with `paperscale data prepare"):
        ShardSet(tmp_path / "nowhere", "train")


def test_foreign_folder(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds 1 tar files but no manifest\.json"):
        ShardSet(tmp_path, "train")


def test_missing_split_suggests_the_nearest(tiny_shards):
    with pytest.raises(UserError, match=r"no split 'trian'.*did you mean 'train'"):
        ShardSet(tiny_shards, "trian")


def test_an_index_that_does_not_match_its_tar(own_shards):
    tar = own_shards / "train-000001.tar"
    tar.write_bytes(tar.read_bytes() + b"\0" * 512)
    with pytest.raises(UserError, match=r"train-000001\.tar\.idx: made for a tar of \d+ bytes, train-000001\.tar has"):
        shard_index.load(tar)
    assert "train-000001.tar: has" in ShardSet(own_shards, "train").check()[0]


@pytest.mark.parametrize("damage", ["magic", "body", "cut", "missing"])
def test_a_damaged_index(own_shards, damage):
    path = own_shards / "train-000000.tar.idx"
    content = bytearray(path.read_bytes())
    if damage == "magic":
        content[0] ^= 1
    elif damage == "body":
        content[-1] ^= 1
    elif damage == "cut":
        del content[-40:]
    path.write_bytes(content) if damage != "missing" else path.unlink()
    with pytest.raises(UserError, match=r"train-000000\.tar.*(idx: damaged index|No such file)"):
        ShardSet(own_shards, "train").read(0, 0)


def test_a_flipped_byte_in_a_sample_is_caught_when_it_is_read(own_shards):
    tar = own_shards / "train-000000.tar"
    offset = int(shard_index.load(tar).members[5]["offset"][1])
    content = bytearray(tar.read_bytes())
    content[offset + 10] ^= 1
    tar.write_bytes(content)
    shards = ShardSet(own_shards, "train")
    shards.read(0, 4)
    with pytest.raises(
        SampleFault, match=rf"train-000000\.tar: sample 'train-0005': member 'png' at byte {offset}: its"
    ):
        shards.read(0, 5)


def test_verify_lists_every_damaged_shard(own_shards):
    assert verify(own_shards).problems == []
    (own_shards / "train-000000.tar").unlink()
    tar = own_shards / "val-000000.tar"
    content = bytearray(tar.read_bytes())
    content[512] ^= 1  # the first member
    tar.write_bytes(content)
    problems = verify(own_shards).problems
    assert len(problems) == 3
    assert "train-000000.tar is missing" in problems[0]
    assert "val-000000.tar: its content is not what was written (SHA-256 differs" in problems[1]
    assert "val-000000.tar: sample 'val-0000': member" in problems[2]


def test_a_manifest_of_another_version_is_refused(own_shards):
    manifest = json.loads((own_shards / "manifest.json").read_text())
    (own_shards / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(UserError, match="version 99"):
        read_manifest(own_shards)


@pytest.mark.parametrize("change", ["truncated", "twice", "missing field"])
def test_indexing_refuses_a_bad_tar(tmp_path, change):
    tar = tmp_path / "bad.tar"
    with webdataset.TarWriter(str(tar)) as writer:
        for number in range(3):
            sample = {"__key__": f"k{0 if change == 'twice' else number}", "png": b"x" * 9, "cls": b"1"}
            if change == "missing field" and number == 2:
                del sample["cls"]
            writer.write(sample)
    if change == "truncated":
        tar.write_bytes(tar.read_bytes()[:1700])
    with pytest.raises(UserError, match=r"bad\.tar: "):
        shard_index.build(tar)
