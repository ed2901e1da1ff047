"""What is damaged is named, or skipped and counted; nothing hangs and nothing is silent."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from paperscale.data import index as shard_index
from paperscale.data.adopt import adopt
from paperscale.data.faults import SampleFault
from paperscale.data.files import LocalFolder
from paperscale.data.shards import ShardSet
from paperscale.errors import UserError
from streams import pictures

TAR = "train-000002.tar"
ROWS = range(74, 111)  # its samples


def member(folder: Path, row: int) -> tuple[int, int]:
    """Offset and size of a picture."""
    index = shard_index.load(folder / TAR)
    offset, size, _ = index.members[row, index.fields.index("png")].tolist()
    return offset, size


def truncate(folder: Path) -> None:
    os.truncate(folder / TAR, member(folder, 30)[0] + 20)


def zeros(folder: Path) -> None:
    start, stop = member(folder, 10)[0], member(folder, 20)[0]
    with (folder / TAR).open("r+b") as file:
        file.seek(start)
        file.write(bytes(stop - start))


def flip(folder: Path) -> None:
    with (folder / TAR).open("r+b") as file:
        file.seek(member(folder, 5)[0] + 40)
        file.write(b"\xff\x00\xff")


def remove(folder: Path) -> None:
    (folder / TAR).unlink()


def replace(folder: Path) -> None:
    """Another shard under the same name, with an index that fits it."""
    for suffix in ("", shard_index.SUFFIX):
        shutil.copy(folder / f"train-000003.tar{suffix}", folder / f"{TAR}{suffix}.new")
        (folder / f"{TAR}{suffix}.new").replace(folder / (TAR + suffix))


def undecodable(folder: Path) -> None:
    """A picture that was broken before it was written: every checksum is right."""
    offset, size = member(folder, 5)
    with (folder / TAR).open("r+b") as file:
        file.seek(offset)
        file.write(b"not a picture"[:size])
    adopt(folder)


FAULTS = {
    truncate: (r"sample 'train-01\d\d': member '\w+' at byte \d+: the shard ends at byte \d+, inside or before", 7),
    zeros: (r"sample 'train-00\d\d': member 'png' at byte \d+: zeros instead of its content", 11),
    flip: (r"sample 'train-0079': member 'png' at byte \d+: its content is not what was written \(checksum\)", 1),
    remove: (r"sample 'row \d+': .*train-000002\.tar: No such file", 37),
    replace: (r"sample 'row \d+': .*the shard was replaced", 37),
    undecodable: (r"sample 'train-0079': does not decode: ", 1),
}


def run(stream) -> list[int]:
    """Train on an epoch; return the samples that were seen."""
    seen = []
    for batch in stream.train_dataloader():
        seen += batch["sample"].tolist()
        stream.advance(batch["cursor"])
    return seen


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_ends_the_run_and_is_named(own_shards, fault):
    fault(own_shards)
    with pytest.raises(SampleFault, match=rf"shards/{TAR}: {FAULTS[fault][0]}"):
        run(pictures(own_shards))


def test_a_fault_in_a_worker_process_is_named_as_well(own_shards):
    undecodable(own_shards)
    with pytest.raises(SampleFault, match=rf"shards/{TAR}: {FAULTS[undecodable][0]}"):
        run(pictures(own_shards, num_processes=1))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_skipped_counted_and_part_of_the_state(own_shards, fault, tiny_shards):
    whole = run(pictures(tiny_shards))
    fault(own_shards)
    stream = pictures(own_shards, on_fault="skip")
    seen = run(stream)
    _, lost = FAULTS[fault]
    skipped = sorted(stream.state_dict()["skipped"])
    assert len(skipped) == lost
    assert set(skipped) <= set(ROWS)
    assert seen == [sample for sample in whole if sample not in skipped], "all others, in the same order"
    assert stream.consumed == len(whole), "what was skipped is consumed: the position stays exact"


def test_skipping_does_not_move_the_position(own_shards, tiny_shards):
    """Interrupted and resumed with damage on the way: the same batches as without an interruption."""
    flip(own_shards)
    zeros(own_shards)
    whole = run(pictures(own_shards, on_fault="skip"))
    first = pictures(own_shards, on_fault="skip")
    seen = []
    for number, batch in enumerate(first.train_dataloader()):
        seen += batch["sample"].tolist()
        first.advance(batch["cursor"])
        if number == 3:
            break
    state = first.state_dict()
    state["content"] = pictures(own_shards).state_dict()["content"]
    ranks = []
    for rank in range(3):
        stream = pictures(own_shards, rank, 3, on_fault="skip")
        stream.load_state_dict(state)
        ranks.append(list(stream.train_dataloader()))
        for batch in ranks[-1]:
            stream.advance(batch["cursor"])
        assert set(stream.faults.times) >= set(state["skipped"]), "the count goes on where it was"
    for pieces in zip(*ranks, strict=True):
        seen += [sample for piece in pieces if piece["cursor"].weight for sample in piece["sample"].tolist()]
    assert seen == whole


def test_too_many_faults_end_the_run(own_shards):
    remove(own_shards)
    with pytest.raises(UserError, match=r"samples could not be read, at most 10 may be skipped \(data\.max_skipped\)"):
        run(pictures(own_shards, on_fault="skip", max_skipped=10))


def test_a_batch_of_nothing_but_faults_has_weight_zero(own_shards):
    remove(own_shards)
    stream = pictures(own_shards, on_fault="skip", global_batch_size=1)
    weights = [batch["cursor"].weight for batch in stream.train_dataloader()]
    assert weights.count(0.0) == 37
    assert weights.count(1.0) == 193


def test_evaluation_says_what_it_leaves_out(own_shards, capfd):
    (own_shards / "val-000000.tar").write_bytes((own_shards / "val-000000.tar").read_bytes()[:20_000])
    with pytest.raises(SampleFault, match=r"val-000000\.tar"):
        list(pictures(own_shards).val_dataloader())
    found = list(pictures(own_shards, on_fault="skip").val_dataloader())
    left = 50 - sum(len(batch["sample"]) for batch in found)
    assert left > 0
    assert capfd.readouterr().err.count("WARNING left out of the evaluation: ") == left


def test_a_shard_cut_off_under_the_run_is_an_error_not_a_crash(own_shards):
    """A mapped file that becomes shorter would kill the process with SIGBUS."""
    shards = ShardSet(own_shards, "train")
    shards.read(2, 0)
    assert shards.tars.mapped
    os.truncate(own_shards / TAR, 1000)
    with pytest.raises(SampleFault, match="the shard ends at byte"):
        shards.read(2, 36)


def test_a_shard_replaced_under_the_run_goes_on_with_what_was_opened(own_shards):
    shards = ShardSet(own_shards, "train")
    before = bytes(shards.read(2, 7)["png"])
    replace(own_shards)
    assert bytes(shards.read(2, 7)["png"]) == before
    with pytest.raises(SampleFault, match="the shard was replaced"):
        ShardSet(own_shards, "train").read(2, 7)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_mount_that_went_away_is_named_and_one_that_came_back_is_read(own_shards, tmp_path):
    mount = tmp_path / "mount"
    mount.mkdir()

    def do(*command: str) -> bool:
        return subprocess.run(command, capture_output=True).returncode == 0

    if not do("mount", "--bind", str(own_shards), str(mount)):
        pytest.skip("this container may not mount")
    try:
        shards = ShardSet(mount, "train")
        shards.read(0, 0)
        assert do("umount", "-l", str(mount))
        with pytest.raises(
            SampleFault, match=r"mount/train-000004\.tar: sample 'row 3': .*mount/train-000004\.tar\.idx: No such file"
        ):
            shards.read(4, 3)
        assert do("mount", "--bind", str(own_shards), str(mount))
        assert shards.read(4, 3)
    finally:
        do("umount", "-l", str(mount))


def test_network_file_systems_are_read_without_a_mapping(own_shards):
    mapped, copied = LocalFolder(own_shards, mapped=True), LocalFolder(own_shards, mapped=False)
    for offset, size in ((0, 100), (512, 4000), (10**9, 5)):
        assert bytes(mapped.open(TAR).read(offset, size)) == bytes(copied.open(TAR).read(offset, size))


def test_check_finds_missing_and_short_shards_before_the_run(own_shards):
    stream = pictures(own_shards)
    stream.check()
    truncate(own_shards)
    with pytest.raises(UserError, match=rf"{TAR}: has \d+ bytes, \d+ were written"):
        stream.check()
    pictures(own_shards, on_fault="skip").check()
    remove(own_shards)
    with pytest.raises(UserError, match=rf"{TAR} is missing"):
        stream.check()
