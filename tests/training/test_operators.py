"""DeepSpeed's operators: ZeRO needs none; others are compiled once, with a word, and nobody waits for them in vain."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from helpers import wait_for
from paperscale.doctor import software
from paperscale.errors import UserError
from paperscale.training import operators
from processes import all_say, start_ranks

HOLD = """
import sys, time
from pathlib import Path
from paperscale.training import operators
with operators._locked(Path(sys.argv[1]), lambda line: print(line, flush=True)):
    print("held", flush=True)
    time.sleep(60)
"""
LOAD = """
from paperscale.training import operators
operators.prepare(say=lambda line: print(line, flush=True))
from deepspeed.ops.op_builder import PinMemoryBuilder
handle = PinMemoryBuilder().load().pin_handle()
print("loaded", flush=True)
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of operators."""
    monkeypatch.setenv("PAPERSCALE_OPERATORS", str(tmp_path / "operators"))
    return tmp_path / "operators"


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_zero_trains_on_cpus_without_compiling_anything(home):
    """All stages, and offload with torch's optimizer: equal losses on two real processes, and no operator."""
    for output in all_say(start_ranks(Path(__file__).with_name("zero_rank.py"), 2), 120):
        found: dict[str, Any] = json.loads(output.splitlines()[-1])
        first, *others = found["losses"]
        assert first[-1] < 0.9 * first[0]
        for losses in others:
            assert losses == pytest.approx(first, abs=1e-5)
        assert found["built"] == []
    assert not list(home.glob("*/*.so"))


def test_a_lock_ends_with_the_process_that_holds_it(home, tmp_path):
    holder = start("-c", HOLD, str(home))
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    waiter = start("-c", HOLD, str(home))
    assert waiter.stdout is not None
    host = socket.gethostname()
    assert waiter.stdout.readline().startswith(f"waiting for process {holder.pid} on {host}, which builds")
    holder.send_signal(signal.SIGKILL)
    assert waiter.stdout.readline() == "held\n"
    waiter.kill()
    waiter.communicate()
    holder.communicate()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("CXX", "no-such-compiler", "there is no C++ compiler; install g++, or name a compiler in CXX"),
        ("SLURM_MEM_PER_NODE", "1024", "needs 2.2 GiB of memory and 1.0 are free; run `paperscale doctor --build`"),
        ("PAPERSCALE_OPERATORS", "/proc/no", "; set PAPERSCALE_OPERATORS to a folder that you may write to"),
    ],
)
def test_what_keeps_an_operator_from_being_compiled_is_said_with_the_fix(home, monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        operators.build(["cpu_adam"], "cpu")
    assert words in str(error.value)


def test_operators_of_cpu_and_gpu_lie_apart_and_what_lies_there_is_not_compiled_again(home):
    place = operators.folder("cpu")
    assert place != operators.folder("cuda")
    place.mkdir(parents=True)
    operators.library("cpu_adam", "cpu").touch()
    operators.build(["cpu_adam"], "cpu", pytest.fail)
    assert operators.built("cpu") == ["cpu_adam"]
    assert operators.built("cuda") == []


def test_the_doctor_says_what_is_compiled_and_what_could_be():
    fits = {"cpu_adam": True, "cpu_lion": True, "async_io": False}
    found = software.judge_operators(["cpu_adam"], fits, "/usr/bin/c++")
    assert found.level == "OK"
    assert "compiled: cpu_adam; not on this machine: async_io; at first use: cpu_lion" in found.found
    assert software.judge_operators(["cpu_adam"], fits, None).level == "WARN"
    assert software.judge_operators(["cpu_adam", "cpu_lion"], fits, None).level == "OK"


def compilers() -> list[str]:
    """Return the processes that work for a build in this test's folder."""
    chosen = os.environ["PAPERSCALE_OPERATORS"]
    found = []
    for path in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if str(path.readlink()).startswith(chosen):
                found.append((path.parent / "comm").read_text().strip())
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_a_build_that_is_killed_ends_wholly_and_the_next_is_made_once_for_all(home):
    killed = start("-c", LOAD)
    wait_for(lambda: "cc1plus" in compilers(), what="a compiler")
    killed.kill()
    killed.communicate()
    wait_for(lambda: not compilers(), seconds=5, what="the end of its compilers")
    assert list(home.glob("*/.build-*")), "what it left"
    began = time.monotonic()
    both = [start("-c", LOAD) for _ in range(2)]
    outputs = [process.communicate(timeout=280)[0] for process in both]
    assert all(output.endswith("loaded\n") for output in outputs), outputs
    assert sum("built DeepSpeed's pin_memory in" in output for output in outputs) == 1
    assert sum("waiting for process" in output for output in outputs) == 1
    assert [path.name for path in operators.folder("cpu").iterdir() if path.name != ".lock"] == ["pin_memory.so"]
    took, began = time.monotonic() - began, time.monotonic()
    assert start("-c", LOAD).communicate()[0] == "loaded\n"
    assert time.monotonic() - began < took


@pytest.mark.slow
def test_a_compiler_that_fails_is_reported_and_its_output_kept(home, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.write_text(
        '#!/bin/sh\ncase "$1" in -dump*|-v|--version) exec c++ "$@";; esac\necho "fatal error: no" >&2\nexit 1\n'
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(
        UserError, match=r"cpu_lion cannot be compiled: fatal error: no; see .*cpu_lion.log, mend what it names"
    ):
        operators.build(["cpu_lion"], "cpu")
    assert "fatal error: no" in (operators.folder("cpu") / "cpu_lion.log").read_text()
