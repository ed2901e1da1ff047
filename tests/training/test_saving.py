"""Whatever happens while a checkpoint is written, the newest one that is there is complete and true (contract 2)."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from torch import nn

from helpers import equal, final_state, rows, trained_samples
from paperscale.errors import FINISHED, REQUEUE, UserError
from paperscale.training import saving
from paperscale.training.checkpoint import (
    MANIFEST,
    CheckpointOptions,
    Retention,
    all_checkpoints,
    clear_unfinished,
    newest_verified,
    publish,
    read_manifest,
    read_state,
    step_of,
    verify,
)
from paperscale.training.checkpointing import Checkpointing
from paperscale.training.pieces import Piece, piece_of, to_write
from paperscale.training.saving import Files, Job, Saver
from paperscale.training.strategies.single import SingleStrategy
from paperscale.training.tensorfile import Buffer, TensorReader, header, tensor_file
from processes import all_say, free_port, start_ranks
from test_resume import at_step, attempt, new_run, own_signals  # noqa: F401  a fixture for every test here

FACTS = {"consumed": 0}
SHORT = "trainer.max_epochs=1"
"""Of eight steps, the fifth and the last of which are followed by checkpoints."""


def files_of(rank: int, step: int, size: int = 1 << 19) -> Files:
    """Return what a rank writes at a step: a function of both."""
    block = random.Random(f"{rank} {step}").randbytes(1 << 12)
    files: Files = {tensor_file(rank): [block[:100], memoryview(block * (size >> 12))], f"rank-{rank:05d}.pt": [block]}
    if rank == 0:
        files["state.pt"] = [block]
    return files


def savers(folders: list[Path], **settings: Any) -> list[Saver]:
    """Return the savers of ranks that share a store, as they share one over processes."""
    store = dist.HashStore() if len(folders) > 1 else None
    keep = settings.pop("keep", Retention())
    return [Saver(folder, keep, rank, len(folders), store, **settings) for rank, folder in enumerate(folders)]


def save(ranks: list[Saver], step: int, **facts: Any) -> list[str | None]:
    """Save on all ranks; return what went wrong."""
    for rank, saver in enumerate(ranks):
        saver.start(Job(step, files_of(rank, step), {**FACTS, "world_size": len(ranks), **facts}))
    return [saver.wait() for saver in ranks]


def written(folder: Path, step: int, ranks: int = 2) -> bool:
    """Return whether the checkpoint holds exactly what was written at its step."""
    checkpoint = folder / f"step-{step:08d}"
    verify(checkpoint)
    expected = {
        name: b"".join(map(bytes, parts)) for rank in range(ranks) for name, parts in files_of(rank, step).items()
    }
    return {path.name for path in checkpoint.iterdir()} == {*expected, MANIFEST} and all(
        (checkpoint / name).read_bytes() == content for name, content in expected.items()
    )


# -- killed --------------------------------------------------------------------------------------------------


def save_until_killed(folder: Path, rank: int, ranks: int, port: int, begun: int) -> None:
    """Do nothing but save, from the newest checkpoint on. Runs in a process of its own."""
    store = dist.TCPStore("127.0.0.1", port, ranks, is_master=rank == 0) if ranks > 1 else None
    newest, _ = newest_verified(folder)
    saver = Saver(folder, Retention(), rank, ranks, store, resume=newest)
    step = step_of(newest) if newest else 0
    os.write(begun, b".")
    while True:
        step += 1
        saver.start(Job(step, files_of(rank, step), {**FACTS, "world_size": ranks}))
        if saver.wait():
            os._exit(1)


def killed(folder: Path, ranks: int, seconds: float) -> None:
    """Let processes save, and ``kill -9`` them after a time."""
    port = free_port()
    reading, begun = os.pipe()
    children = []
    for rank in range(ranks):
        if (child := os.fork()) == 0:
            with contextlib.suppress(BaseException):
                save_until_killed(folder, rank, ranks, port, begun)
            os._exit(1)
        children.append(child)
    for _ in children:
        os.read(reading, 1)
    time.sleep(seconds)
    for child in children:
        os.kill(child, signal.SIGKILL)
    codes = [os.waitpid(child, 0)[1] for child in children]
    os.close(reading)
    os.close(begun)
    assert codes == [signal.SIGKILL] * ranks, "none had ended by itself"


@pytest.mark.parametrize(
    ("ranks", "kills"),
    [(1, 10), (2, 5), pytest.param(1, 100, marks=pytest.mark.slow), pytest.param(2, 100, marks=pytest.mark.slow)],
)
def test_killed_at_any_moment_leaves_only_whole_checkpoints(tmp_path, ranks, kills):
    newest, unfinished, began = 0, 0, time.monotonic()
    assert set(save(savers([tmp_path] * ranks), 1)) == {""}
    a_few = 4 * (time.monotonic() - began)
    for number in range(kills):
        clear_unfinished(tmp_path)  # what each attempt begins with
        assert not list(tmp_path.glob(".*"))
        killed(tmp_path, ranks, random.Random(number).uniform(0, a_few))
        found = all_checkpoints(tmp_path)
        steps = [step_of(checkpoint) for checkpoint in found]
        assert all(written(tmp_path, step, ranks) for step in steps), "none is half one"
        assert steps == list(range(max(steps, default=0), 0, -1))[: len(steps)]
        assert max(steps, default=0) >= newest
        newest = max(steps, default=0)
        assert len(steps) >= min(newest, 2), "what was to be kept"
        others = [path.name for path in tmp_path.iterdir() if path not in found]
        assert all(name.startswith(".step-") and ".partial" in name for name in others)
        unfinished += bool(others)
    assert newest > 3, "each went on from where the one before had been killed"
    assert unfinished, "some were killed in the midst of it"
    clear_unfinished(tmp_path)
    assert set(save(savers([tmp_path] * ranks), newest + 1)) == {""}
    assert kept(tmp_path) == [newest, newest + 1]


@pytest.mark.slow
def test_a_training_killed_again_and_again_ends_as_one_that_was_not(runs, tiny_recipe):
    often = ("checkpoint.every_n_steps=1", "trainer.max_epochs=2")
    whole = new_run("whole", tiny_recipe, *often)
    assert attempt(whole) == FINISHED
    run = new_run("killed", tiny_recipe, *often, "trainer.callbacks+={class_path: helpers.Slowly}")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    for number in range(1, 20):
        (run.path / f"attempts/{number:04d}").mkdir()
        command = [sys.executable, "-m", "paperscale.jobs.worker", str(run.path), str(number)]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        before = len(trained_samples(run))
        while process.poll() is None and len(trained_samples(run)) < before + 3:
            time.sleep(0.02)
        time.sleep(random.uniform(0, 0.2))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
    assert process.returncode == FINISHED
    assert number > 2
    assert equal(final_state(run), final_state(whole))
    assert rows(run) == rows(whole)


# -- damaged -------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder of two checkpoints that two ranks have written."""
    ranks = savers([tmp_path / "checkpoints"] * 2)
    ranks[0].folder.mkdir()
    assert save(ranks, 1) == save(ranks, 2, metrics={"val/loss": 0.25}) == ["", ""]
    return ranks[0].folder


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def test_a_damaged_file_is_named_and_the_checkpoint_before_it_taken(two):
    good = two.with_name("good")
    shutil.copytree(two, good)
    files = sorted((good / "step-00000002").iterdir())
    assert [f.name for f in files] == [
        MANIFEST, "rank-00000.pt", "rank-00001.pt", "state.pt", tensor_file(0), tensor_file(1)
    ]  # fmt: skip
    damages: list[Callable[[Path], None]] = [
        *(lambda path, at=at: flip(path, int(at * 8 * path.stat().st_size)) for at in (0, 0.37, 0.999999)),
        truncate,
        Path.unlink,
        lambda path: (path.unlink(), path.mkdir()),
    ]
    for file in files:
        for damage in damages:
            victim = two / "step-00000002" / file.name
            damage(victim)
            checkpoint, (reason,) = newest_verified(two)
            assert checkpoint == two / "step-00000001"
            assert reason.startswith(f"step-00000002: {victim}"), reason
            shutil.rmtree(victim) if victim.is_dir() else victim.unlink(missing_ok=True)
            shutil.copy(file, victim)
    assert newest_verified(two) == (two / "step-00000002", [])


def test_no_bit_of_the_manifest_can_flip_unseen(two):
    path = two / "step-00000002" / MANIFEST
    whole, content = read_manifest(path.parent), path.read_bytes()
    refused = 0
    for byte in range(0, len(content), 5):
        flip(path, 8 * byte + random.Random(byte).randrange(8))
        try:
            assert read_manifest(path.parent) == whole, "the last digits of a number can mean the same"
        except UserError as error:
            refused += str(error).startswith(str(path))
        path.write_bytes(content)
    assert refused > len(content) // 5 - 2


def test_a_file_of_another_checkpoint_is_refused_and_a_note_is_not(two):
    newest = two / "step-00000002"
    (newest / "note.txt").write_text("the best so far")
    assert newest_verified(two) == (newest, [])
    shutil.copy(newest / tensor_file(1), newest / tensor_file(2))
    with pytest.raises(UserError, match=r"tensors-00002.safetensors is not of this checkpoint; move it elsewhere"):
        verify(newest)
    (two / "step-notes").mkdir()
    (two / "step-00000003").write_text("not a folder")
    checkpoint, passed_over = newest_verified(two)
    assert checkpoint == two / "step-00000001"
    assert [reason.partition(":")[0] for reason in passed_over] == ["step-00000003", "step-00000002"]


def test_a_checkpoint_of_another_layout_is_passed_over_for_that(two):
    old = {"step": 2, "consumed": 64, "world_size": 1, "files": {}, "versions": {}, "version": 1}
    (two / "step-00000002" / MANIFEST).write_text(json.dumps(old))
    checkpoint, (reason,) = newest_verified(two)
    assert checkpoint == two / "step-00000001"
    assert reason.endswith("manifest.json: version 1, this release reads 2; use the release that wrote it")


# -- what cannot be written ----------------------------------------------------------------------------------


def fill(folder: Path, left: int) -> Path:
    filler = folder / "filler"
    filler.write_bytes(b"\0" * (shutil.disk_usage(folder).free - left))
    return filler


def test_a_full_disk_costs_the_checkpoint_only_and_the_next_is_written(small_disk):
    ranks = savers([small_disk] * 2, keep=Retention(last=1))
    assert save(ranks, 1) == ["", ""]
    filler = fill(small_disk, left=1 << 20)
    first, second = save(ranks, 2)
    assert first == second
    assert str(first).endswith("[Errno 28] No space left on device")
    assert newest_verified(small_disk) == (small_disk / "step-00000001", [])
    assert {path.name for path in small_disk.iterdir()} == {"step-00000001", "filler"}
    filler.unlink()
    assert save(ranks, 2) == ["", ""], "the same step can be tried again"
    assert written(small_disk, 2)


def test_a_read_only_folder_costs_the_checkpoint_only(small_disk):
    ranks = savers([small_disk] * 2)
    assert save(ranks, 1) == ["", ""]
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    (reason, _) = save(ranks, 2)
    assert str(reason).startswith("rank 0: [Errno 30] Read-only file system")
    assert newest_verified(small_disk) == (small_disk / "step-00000001", [])
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert save(ranks, 3) == ["", ""]


def test_what_one_rank_cannot_write_no_rank_believes_written(tmp_path):
    shared, lost = tmp_path / "shared", tmp_path / "mount/lost"
    shared.mkdir()
    ranks = savers([shared, lost])  # rank 1's node has lost the file system
    outcomes = save(ranks, 1)
    assert outcomes == [f"rank 1: [Errno 2] No such file or directory: '{lost}/.step-00000001.partial-1'"] * 2
    assert not list(shared.iterdir())
    lost.parent.mkdir()
    lost.symlink_to(shared)
    assert save(ranks, 2) == ["", ""]
    assert written(shared, 2)


def test_no_rank_waits_for_one_whose_error_is_not_of_the_disk(tmp_path):
    ranks = savers([tmp_path] * 2)
    for rank, saver in enumerate(ranks):
        wrong: Files = {"state.pt": ["text"]} if rank else {}  # type: ignore[list-item]
        saver.start(Job(1, wrong, {**FACTS, "world_size": 2}))
    assert {saver.wait() for saver in ranks} == {
        "rank 1: TypeError: memoryview: a bytes-like object is required, not 'str'"
    }
    ranks = savers([tmp_path] * 2, attempt=2)
    assert save(ranks, 1, no_such_field=1)[0] == save(ranks, 2, no_such_field=1)[1]
    assert not list(tmp_path.iterdir())


class Frees(Callback):
    """Removes a file after a step.

    Args:
        path: of it.
        step: after which.
    """

    def __init__(self, path: str, step: int):
        self.path, self.step = Path(path), step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.path.unlink()


@pytest.mark.slow
def test_training_goes_on_past_a_full_disk_and_saves_when_there_is_space(tiny_recipe, small_disk, capfd, monkeypatch):
    monkeypatch.setenv("PAPERSCALE_RUNS", str(small_disk / "runs"))
    filler = small_disk / "filler"
    frees = f"trainer.callbacks+={{class_path: test_saving.Frees, init_args: {{path: {filler}, step: 6}}}}"
    run = new_run("full", tiny_recipe, frees, SHORT)
    fill(small_disk, left=256 << 10)
    assert attempt(run) == FINISHED
    (warned,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert warned.startswith("WARNING checkpoint at step 5 not written: [Errno 28] No space left on device; the prev")
    assert newest_verified(run.checkpoints) == (run.checkpoints / "step-00000008", [])


# -- on the side of the training -----------------------------------------------------------------------------


class Releases(Callback):
    """Lets the disk of :func:`held_disk` write once a step is over; may then fail.

    Args:
        step: the step.
        fails: whether to.
    """

    released = threading.Event()

    def __init__(self, step: int, fails: bool = False):
        self.step, self.fails = step, fails

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.released.set()
            print(1 / (not self.fails))


@pytest.fixture
def held_disk(monkeypatch) -> list[bool]:
    """A disk on which nothing is written before :class:`Releases` says so; returns whether it did, for each file."""
    files: list[bool] = []
    really = saving.write_durably

    def held(path: Path, parts: Any) -> dict[str, Any]:
        files.append(Releases.released.wait(20))
        time.sleep(0.05)
        return really(path, parts)

    Releases.released.clear()
    monkeypatch.setattr(saving, "write_durably", held)
    return files


def releases(step: int, fails: bool = False) -> str:
    return f"trainer.callbacks+={{class_path: test_saving.Releases, init_args: {{step: {step}, fails: {fails}}}}}"


def test_preempted_while_a_checkpoint_is_written(runs, tiny_recipe, request):
    """Steps go on while the thread writes; the stop's own checkpoint follows the one that is being written."""
    whole = new_run("whole", tiny_recipe, SHORT)
    assert attempt(whole) == FINISHED
    held_disk = request.getfixturevalue("held_disk")
    run = new_run("preempted", tiny_recipe, releases(7), at_step(7), SHORT)
    assert attempt(run) == REQUEUE
    assert all(held_disk), "steps 6 and 7 have not waited for the files of step 5"
    assert [checkpoint.name for checkpoint in all_checkpoints(run.checkpoints)] == ["step-00000007", "step-00000005"]
    assert newest_verified(run.checkpoints)[1] == []
    (run.checkpoints / ".step-00000009.partial-1").mkdir()
    assert attempt(run) == FINISHED
    assert run.attempts()[1].facts["resumed_from"] == "step-00000007"
    assert not list(run.checkpoints.glob(".*")), "what an attempt has not finished is cleared by the next"
    assert equal(final_state(run), final_state(whole))
    assert rows(run) == rows(whole)


class EachStep(Checkpointing):
    """Writes after each step of a training that has no stream."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.save(trainer)


class Stream(BoringDataModule):
    consumed = 0


def fit(folder: Path, callback: Callback) -> None:
    """Train three steps of Lightning's own example."""
    trainer = Trainer(
        accelerator="cpu",
        strategy=SingleStrategy(device="cpu"),
        max_steps=3,
        callbacks=[callback, EachStep(folder, CheckpointOptions())],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(BoringModel(), datamodule=Stream())


def test_an_error_lets_the_checkpoint_before_it_be_finished(tmp_path, held_disk):
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, Releases(2, fails=True))
    assert held_disk
    assert all(held_disk)
    assert newest_verified(tmp_path) == (tmp_path / "step-00000001", [])


class Keeps(Callback):
    """Keeps in its state what no reader of plain data takes."""

    def state_dict(self) -> dict[str, Any]:
        return {"best": {"path": Path("a")}}


def test_state_that_could_not_be_read_back_is_said_at_the_first_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"with callbacks.Keeps.best.path \(PosixPath\) in it; keep only numbers"):
        fit(tmp_path, Keeps())
    assert not all_checkpoints(tmp_path)


# -- retention -----------------------------------------------------------------------------------------------


def checkpoint_at(folder: Path, step: int, accuracy: float | None = None) -> Path:
    partial = folder / ".partial"
    partial.mkdir(parents=True)
    metrics = {} if accuracy is None else {"val/accuracy": accuracy}
    final = folder / f"step-{step:08d}"
    publish(partial, final, {}, {**FACTS, "step": step, "world_size": 1, "metrics": metrics})
    return final


def kept(folder: Path) -> list[int]:
    return sorted(step_of(checkpoint) for checkpoint in all_checkpoints(folder))


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (CheckpointOptions(), [9, 10]),
        (CheckpointOptions(keep_last=3, keep_every_n_steps=4), [4, 8, 9, 10]),
        (CheckpointOptions(monitor="val/accuracy"), [6, 9, 10]),  # of equals the newer
        (CheckpointOptions(monitor="val/accuracy", keep_best=3), [3, 4, 6, 9, 10]),
        (CheckpointOptions(monitor="val/accuracy", mode="min"), [1, 9, 10]),
        (CheckpointOptions(monitor="val/other"), [9, 10]),
    ],
)
def test_what_is_kept(tmp_path, options, left):
    values = {1: 0.1, 2: math.nan, 3: 0.9, 4: 0.8, 5: None, 6: 0.9, 7: 0.5, 8: math.nan, 9: None, 10: 0.2}
    for step, value in values.items():
        checkpoint_at(tmp_path, step, value)
        assert options.retention.prune(tmp_path) == []
        best = max((v, s) for s, v in values.items() if s <= step and v is not None and not math.isnan(v))
        assert step in kept(tmp_path)
        assert options.monitor != "val/accuracy" or options.mode == "min" or best[1] in kept(tmp_path)
    assert kept(tmp_path) == left


def test_steps_are_numbers_however_many_digits_they_have(tmp_path):
    for step in (99_999_999, 100_000_000, 100_000_001):
        checkpoint_at(tmp_path, step)
    Retention().prune(tmp_path)
    assert kept(tmp_path) == [100_000_000, 100_000_001]


def test_checkpoints_that_did_not_verify_are_not_counted_among_those_that_are_kept(tmp_path):
    for step in (5, 10, 15, 20):
        checkpoint_at(tmp_path, step)
    for step in (15, 20):
        truncate(tmp_path / f"step-{step:08d}" / MANIFEST)
    resume, passed_over = newest_verified(tmp_path)
    assert resume == tmp_path / "step-00000010"
    assert len(passed_over) == 2
    ranks = savers([tmp_path], resume=resume)
    assert save(ranks, 12) == [""]
    assert kept(tmp_path) == [10, 12, 15, 20], "two that verify"
    assert save(ranks, 15) == [""]
    assert kept(tmp_path) == [12, 15, 20], "a damaged one makes room for the true one of its step"
    assert save(ranks, 25) == [""]
    assert kept(tmp_path) == [15, 25]
    assert newest_verified(tmp_path) == (tmp_path / "step-00000025", [])


def test_an_old_checkpoint_that_cannot_be_removed_does_not_fail_the_new_one(tmp_path, small_disk):
    """A mounted file system stands for a file that another process of an NFS client holds open: busy."""
    ranks = savers([tmp_path])
    for step in (1, 2):
        assert save(ranks, step) == [""]
    (tmp_path / "step-00000001/held").mkdir()
    subprocess.run(["mount", "--bind", str(small_disk), str(tmp_path / "step-00000001/held")], check=True)
    assert save(ranks, 3) == [""]
    assert ranks[0].left == [
        ".step-00000001.partial cannot be removed (Device or resource busy); remove it by hand"
    ] or ("step-00000001 cannot be removed" in ranks[0].left[0])
    assert newest_verified(tmp_path) == (tmp_path / "step-00000003", [])
    assert kept(tmp_path) == [2, 3]
    subprocess.run(["umount", str(tmp_path / ".step-00000001.partial/held")], check=True)
    assert save(ranks, 4) == [""]
    assert ranks[0].left == []
    assert not list(tmp_path.glob(".*")), "it was tried again"


@pytest.mark.parametrize("name", ["every_n_steps", "every_n_epochs", "keep_every_n_steps", "keep_best"])
def test_numbers_that_make_no_sense_are_refused(name):
    with pytest.raises(UserError, match=f"checkpoint.{name} is 0; use 1 or more"):
        CheckpointOptions(**{name: 0})


# -- files that lie ------------------------------------------------------------------------------------------


class Runs:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_code_in_a_state_file_is_not_run(tmp_path, protocol):
    done, path = tmp_path / "done", tmp_path / "state.pt"
    if protocol == "torch":
        torch.save({"callbacks": Runs(done)}, path)
    else:
        path.write_bytes(pickle.dumps(Runs(done), 2))
    with pytest.raises(
        UserError, match=r"state.pt is not plain data and was not loaded \(.*\); restore it from a copy"
    ):
        read_state(path)
    assert not done.exists()


def test_garbage_in_a_state_file_is_a_sentence(tmp_path):
    path = tmp_path / "rank-00000.pt"
    for content in (b"", b"\x80", os.urandom(1000), b"PK\x03\x04" + bytes(100), pickle.dumps([1], 2)[:-1]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"rank-00000.pt is not plain data"):
            read_state(path)


def tensors_with(folder: Path, entry: dict[str, Any], place: Any, length: int | None = None) -> TensorReader:
    """Return a reader of a file of 16 bytes of data with one entry in its header."""
    table = {"w": entry, "__metadata__": {"paperscale": json.dumps({"w": place})}}
    content = header(table)
    if length is not None:
        content = length.to_bytes(8, "little") + content[8:]
    (folder / tensor_file(0)).write_bytes(content + bytes(16))
    return TensorReader(folder)


TRUE: dict[str, Any] = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("entry", "place", "length"),
    [
        (TRUE, [[4], 0], 1 << 40),
        (TRUE, [[4], 0], (1 << 64) - 1),
        (TRUE, [[4], 0], 0),
        ({**TRUE, "data_offsets": [0, 32]}, [[8], 0], None),
        ({**TRUE, "data_offsets": [-16, 0]}, [[4], 0], None),
        ({**TRUE, "data_offsets": [16, 0]}, [[4], 0], None),
        ({**TRUE, "data_offsets": [0]}, [[4], 0], None),
        ({**TRUE, "dtype": "F33"}, [[4], 0], None),
        ({"shape": [4]}, [[4], 0], None),
        (TRUE, [[4], 1], None),
        (TRUE, [[4], -1], None),
        (TRUE, [[-4, -1], 0], None),
        (TRUE, [["4"], 0], None),
        (TRUE, [4, 0], None),
        (TRUE, 4, None),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, entry, place, length):
    with pytest.raises(UserError, match=r"tensors-00000.safetensors: not a readable file of tensors .*; restore it"):
        tensors_with(tmp_path, entry, place, length)


def test_a_tensor_said_to_be_huge_takes_no_memory(tmp_path):
    assert torch.equal(tensors_with(tmp_path, TRUE, [[4], 0]).whole("w"), torch.zeros(4))
    reader = tensors_with(tmp_path, TRUE, [[1 << 20, 1 << 30], 0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="w has 4 of the elements 0 to"):
        reader.whole("w")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + (64 << 10)


def test_elements_that_two_files_hold_are_refused(tmp_path):
    tensors_with(tmp_path, TRUE, [[8], 2])
    shutil.copy(tmp_path / tensor_file(0), tmp_path / tensor_file(1))
    with pytest.raises(UserError, match="two files hold the same elements of w"):
        TensorReader(tmp_path)


# -- the same again ------------------------------------------------------------------------------------------


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a network and its optimizer after two steps."""
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5 * 36, 7))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.half()[3].float()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return model, optimizer


def pieces_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Piece]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = [
        piece_of(f"optimizer0/{names[parameter]}/{key}", value)
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    ]
    return [*(piece_of(f"model/{name}", tensor) for name, tensor in model.state_dict().items()), *state]


def save_pieces(folder: Path, pieces: list[Piece], ranks: int, step: int) -> Path:
    folder.mkdir(exist_ok=True)
    these = savers([folder] * ranks)
    for rank, saver in enumerate(these):
        files: Files = {tensor_file(rank): Buffer().take(to_write(pieces, rank, ranks))}
        saver.start(Job(step, files, {**FACTS, "world_size": ranks}))
    assert {saver.wait() for saver in these} == {""}
    return folder / f"step-{step:08d}"


def hashes(checkpoint: Path) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in verify(checkpoint).files.items()}


def test_the_same_state_is_the_same_bytes_and_another_number_of_ranks_the_same_tensors(tmp_path):
    torch.manual_seed(0)
    pieces = pieces_of(*trained())
    two = save_pieces(tmp_path / "a", pieces, 2, 1)
    assert hashes(two) == hashes(save_pieces(tmp_path / "b", pieces, 2, 1))
    torch.manual_seed(1)
    read = pieces_of(*trained())
    reader = TensorReader(two)
    assert set(reader.tensors) == {piece.name for piece in read}
    for piece in read:
        reader.fill(piece)
    one = TensorReader(save_pieces(tmp_path / "c", read, 1, 1))
    for piece in pieces:
        for values in (reader.whole(piece.name), one.whole(piece.name)):
            assert values.dtype == piece.tensor.dtype
            assert torch.equal(values, piece.tensor), piece.name
    three = save_pieces(tmp_path / "d", read, 3, 1)
    assert hashes(save_pieces(tmp_path / "e", read, 2, 1)) == hashes(two)
    assert len(hashes(three)) == 3


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_and_one_reads_and_writes_the_same_tensors(tmp_path, tiny_shards):
    def run(ranks: int, *words: str) -> None:
        all_say(start_ranks(Path(__file__).with_name("saving_rank.py"), ranks, tiny_shards, *words), 120)

    first, second, third = (tmp_path / name for name in "abc")
    run(2, str(first), str(second))
    assert hashes(first / "step-00000003") == hashes(second / "step-00000003")
    run(1, str(third), "--resume", str(first / "step-00000003"))
    before, after = (TensorReader(folder / "step-00000003") for folder in (first, third))
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(before.whole(name), after.whole(name)) for name in before.tensors)
