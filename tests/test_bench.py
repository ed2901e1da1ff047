"""The benchmark: its statistics are right on sequences known beforehand, and it measures what it says it measures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from paperscale.bench import run as bench
from paperscale.bench.measure import WORKS, Row
from paperscale.bench.meters import TreeClock, cpu_seconds, memory_of, tree
from paperscale.bench.registry import NEEDS
from paperscale.bench.report import Results, goals, markdown, number, ratios, spread
from paperscale.bench.shuffling import global_batches, random_shuffle, shuffle_of, verdict
from paperscale.bench.source import VOCABULARY, photograph, texture, tokens
from paperscale.cli import build_parser
from paperscale.errors import UserError

PEERS = "ours,folder,memmap"


def options(*words: str):
    return build_parser().parse_args(["bench", "data", *words])


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder of a quick run of the whole benchmark, with its report."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPERSCALE_BENCH", str(folder))
        assert bench.run(options("--quick", "--peers", PEERS, "--out", str(folder))) == 0
    return folder


def test_every_work_has_a_row_with_positive_figures_for_every_peer_that_does_it(quick):
    rows = json.loads((quick / "data.json").read_text())["rows"]
    expected = {
        "raw": {"ours", "folder"},
        "tokens": {"ours", "memmap"},
        "decode": {"ours", "folder"},
        "first": {"ours", "memmap"},
        "memory": {"ours", "folder"},
        "planning": {"ours", "memmap"},
        "resume": {"ours", "folder"},
        "shuffle": {"ours", "folder", "random"},
    }
    assert set(expected) | {"decoders"} == set(WORKS)
    for work, peers in expected.items():
        found = {row["peer"]: row for row in rows if row["work"] == work}
        assert set(found) == peers
        for row in found.values():
            assert row["problem"] == ""
            assert row["figures"] or work == "resume"
            for name, values in row["figures"].items():
                assert all(value > 0 for value in values) or name == "megabytes", (work, row["peer"], name)
    resumed = next(row for row in rows if row["work"] == "resume" and row["peer"] == "ours")
    assert set(resumed["texts"].values()) == {"exact", "exact, same order"}


def test_the_report_has_a_table_for_every_work(quick):
    text = (quick / "data.md").read_text()
    assert text.count("\n## ") == len(WORKS) + 1  # and the versions
    assert "| Paperscale | " in text
    assert "folder, torch DataLoader: torch " in text


def test_a_peer_that_is_not_installed_is_a_row_that_says_so(quick, monkeypatch, capsys):
    monkeypatch.setenv("PAPERSCALE_BENCH", str(quick))
    assert bench.run(options("--quick", "--only", "shuffle", "--peers", "mds,ffcv", "--json")) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    problems = [row["problem"] for row in rows if row["peer"] != "random"]
    assert problems[0] == "not installed: `paperscale bench data --setup` installs it"
    assert problems[1].endswith("installs it, which needs " + NEEDS["ffcv"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "decod"], "no work 'decod'.*did you mean 'decode'"),
        (["--peers", "webdatset"], "no peer 'webdatset'.*did you mean 'webdataset'"),
    ],
)
def test_a_wrong_option_says_what_is_right(words, message):
    with pytest.raises(UserError, match=message):
        bench.run(options(*words))


def test_samples_in_writing_order_are_not_shuffled_at_all():
    batches = [range(start, start + 10) for start in range(0, 100, 10)]
    found = shuffle_of(batches, samples=100, shard_size=20)
    assert found.span == pytest.approx(np.std(np.arange(10)) / 100)
    assert found.shards_per_batch == 1
    assert found.near == 1


def test_a_random_order_has_the_statistics_of_a_uniform_distribution():
    found = random_shuffle(60_000, 64, 10_000)
    assert found.span == pytest.approx(np.sqrt(63 / 64 / 12), rel=0.01)
    assert found.shards_per_batch == pytest.approx(6, abs=0.01)
    assert found.near == pytest.approx(200 / 60_000, rel=0.2)


def test_alternating_halves_are_far_apart_and_of_two_shards():
    found = shuffle_of([[0, 1000, 1, 1001], [2, 1002, 3, 1003]], samples=2000, shard_size=1000)
    assert found.near == 0
    assert found.shards_per_batch == 2


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ([[4, 5], [6, 7]], "exact, same order"),
        ([[5, 4], [7, 6]], "exact, same global batches"),
        ([[4, 6], [5, 7]], "exact, another order"),
        ([[4, 5]], "2 lost"),
        ([[3, 4], [5, 6], [7]], "1 repeated"),
        ([[0, 1], [4, 5]], "2 lost, 2 repeated"),
    ],
)
def test_what_became_of_an_interrupted_epoch(after, expected):
    whole = [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert verdict(whole[:2], after, whole, 8) == expected


def test_global_batches_of_ranks_of_different_lengths():
    assert global_batches([[[0], [2]], [[1]]]) == [[0, 1], [2]]


def test_cpu_time_of_a_tree_counts_living_and_ended_children():
    clock = TreeClock(os.getpid())
    before = clock.read()
    busy = "import time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass\n"
    subprocess.run([sys.executable, "-c", busy], check=True)
    assert 0.2 < clock.read() - before < 1
    living = subprocess.Popen([sys.executable, "-c", busy + "input()"], stdin=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 10
        while cpu_seconds(living.pid) < 0.2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert living.pid in tree(os.getpid())
        assert clock.read() - before > 0.4
        assert memory_of(os.getpid()).total > memory_of(living.pid).total > memory_of(living.pid).own > 1e6
    finally:
        living.communicate(b"\n", timeout=10)


def test_photographs_follow_from_their_number_alone():
    picture = texture(3)
    assert photograph(picture, 5) == photograph(picture, 5)
    assert photograph(picture, 5) != photograph(picture, 6)


def test_tokens_are_pairs_of_characters():
    assert tokens(b"abcd", 3).tolist() == [(97 << 7) | 98, (99 << 7) | 100, (97 << 7) | 98]
    assert tokens(bytes(range(256)), 128).max() < VOCABULARY


def test_ratios_are_taken_round_by_round():
    ours, peer = Row("raw", "ours", {"cpu_us": [5.0, 10.0]}), Row("raw", "folder", {"cpu_us": [10.0, 40.0]})
    assert ratios(peer, ours, "cpu_us") == [2, 4]
    assert spread([2.0, 4.0, 3.0]) == "3.00 [2.00..4.00]"
    assert [number(value) for value in (0, 0.01234, 12.3456, 12345.6)] == ["0", "0.0123", "12.3", "12,346"]


def test_a_goal_that_is_missed_is_said_to_be_missed():
    facts = {"images": 1, "mean_bytes": 1, "percentile_bytes": {"50": 1}, "mean_width": 1.0, "mean_height": 1.0}
    rows = [Row("raw", "ours", {"cpu_us": [9.0], "per_s": [1.0]}), Row("decode", "ours", problem="no disk")]
    results = Results("full", 1, rows, facts, {}, {})
    assert [(goal.met, goal.measured) for goal in goals(results)] == [(False, "9.00 µs"), (False, "no disk")]
    assert "| Decode and augment | Paperscale | no disk |" not in markdown(results)
    assert "| Paperscale | no disk |" in markdown(results)


def test_the_files_that_run_in_a_peers_interpreter_need_nothing_else_of_paperscale():
    package = Path(bench.__file__).parent
    alone = [
        "runner",
        "registry",
        "meters",
        "works",
        "source",
        *(f"peers/{name.stem}" for name in package.glob("peers/*")),
    ]
    for name in alone:
        if name in ("peers/ours", "peers/__pycache__"):
            continue
        for line in (package / f"{name}.py").read_text().splitlines():
            if line.strip().startswith(("from paperscale", "import paperscale")):
                assert "paperscale.bench" in line, f"{name}: {line}"
