"""Remote shards: exact bytes, only those that are read, from a cache that is bounded, shared and heals itself."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from paperscale.data.remote import RemoteFolder
from paperscale.data.shards import ShardSet
from paperscale.data.transport import Missing, Replaced
from paperscale.errors import UserError

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
BLOCK = 16 << 10
NAMES = ("a.tar", "b.tar", "c.tar")
BYTES = 1_000_003  # no multiple of a block, on purpose


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Nginx:
    """A web server of our own on this machine, with what it served in its log."""

    def __init__(self, folder: Path):
        self.folder, self.www = folder, folder / "www"
        self.www.mkdir(parents=True)
        self.port, self.process = free_port(), None
        self.url = f"http://127.0.0.1:{self.port}/set"

    def start(self, directives: str = "", listen: str = "") -> Nginx:
        temporary = "".join(
            f"{kind}_temp_path {self.folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (self.folder / "nginx.conf").write_text(
            f"""
            {"user root;" if os.geteuid() == 0 else ""}
            worker_processes 1; pid {self.folder}/pid; error_log {self.folder}/error.log; daemon off;
            events {{ worker_connections 256; }}
            http {{
                {temporary}
                log_format facts '$status $body_bytes_sent $request_uri $http_range';
                access_log {self.folder}/access.log facts;
                server {{ listen 127.0.0.1:{self.port} {listen}; root {self.www}; {directives} }}
            }}"""
        )
        self.process = subprocess.Popen([NGINX, "-p", self.folder, "-c", self.folder / "nginx.conf"], stderr=-3)
        wait_for(lambda: socket.create_connection(("127.0.0.1", self.port), 1).close() is None)
        return self

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait(10)
            self.process = None

    def restart(self, directives: str) -> None:
        self.stop()
        self.start(directives)

    def log(self) -> list[list[str]]:
        time.sleep(0.05)  # a line is written when its request is over
        return [line.split() for line in (self.folder / "access.log").read_text().splitlines()]

    def served(self) -> int:
        return sum(int(line[1]) for line in self.log())


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if condition():
                return
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def content_of(name: str, size: int = BYTES) -> bytes:
    return np.random.default_rng(list(name.encode())).bytes(size)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Nginx]:
    if NGINX is None:
        pytest.skip("no nginx on this machine: apt-get install nginx-light")
    server = Nginx(tmp_path / "nginx")
    (server.www / "set").mkdir()
    for name in NAMES:
        (server.www / "set" / name).write_bytes(content_of(name))
    (server.www / "set" / "manifest.json").write_text('{"name": "first"}')
    server.start()
    yield server
    server.stop()


@pytest.fixture
def folder(nginx: Nginx, tmp_path: Path) -> Iterator[RemoteFolder]:
    remote = open_remote(nginx.url, tmp_path)
    yield remote
    remote.close()


def open_remote(url: str, tmp_path: Path, **options) -> RemoteFolder:
    return RemoteFolder(url, **{"cache": tmp_path / "cache", "block_bytes": BLOCK, "timeout_s": 10, **options})


def check_all(remote: RemoteFolder, size: int = 5_000, names: tuple[str, ...] = NAMES) -> None:
    """Read everything in pieces, in a random order, and compare."""
    pieces = [(name, offset) for name in names for offset in range(0, BYTES, size)]
    random.Random(0).shuffle(pieces)
    contents = {name: content_of(name) for name in names}
    for name, offset in pieces:
        assert bytes(remote.read(name, offset, size)) == contents[name][offset : offset + size]


# -- only what is read is fetched, and once ----------------------------------------------------------------


def test_reading_one_percent_of_the_samples_fetches_their_blocks_alone(nginx, folder):
    content = content_of("a.tar")
    for offset in (0, 500_000, BYTES - 3_000):
        assert bytes(folder.read("a.tar", offset, 3_000)) == content[offset : offset + 3_000]
    assert nginx.served() <= 3 * 2 * BLOCK + 1


def test_what_was_read_is_not_fetched_again_by_another_process_of_the_node(nginx, folder, tmp_path):
    check_all(folder)
    served = nginx.served()
    assert served <= len(NAMES) * (BYTES + 1)
    check_all(open_remote(nginx.url, tmp_path))
    assert nginx.served() == served + len(NAMES), "one byte of each shard, to learn whether it is still the same"


def test_a_hit_is_a_view_and_asks_nobody(nginx, folder):
    folder.read("a.tar", 100, 5_000)
    nginx.stop()
    again = folder.read("a.tar", 100, 5_000)
    assert isinstance(again, memoryview)
    assert again == content_of("a.tar")[100:5_100]


def test_adjacent_missing_blocks_are_one_request(nginx, folder):
    folder.read("a.tar", 5 * BLOCK, 1)
    before = len(nginx.log())
    assert bytes(folder.read("a.tar", 0, 20 * BLOCK)) == content_of("a.tar")[: 20 * BLOCK]
    assert [line[3] for line in nginx.log()[before:]] == [
        f"bytes=0-{5 * BLOCK - 1}",
        f"bytes={6 * BLOCK}-{20 * BLOCK - 1}",
    ]


def test_a_long_read_is_several_requests_at_once(nginx, tmp_path):
    content = content_of("large.tar", 20 << 20)
    (nginx.www / "set" / "large.tar").write_bytes(content)
    remote = open_remote(nginx.url, tmp_path)
    assert bytes(remote.read("large.tar", 7, len(content))) == content[7:]
    assert len(nginx.log()) == 1 + 5


def test_threads_that_need_the_same_block_fetch_it_once(nginx, folder):
    nginx.restart("limit_rate 40k;")  # long enough for all to come
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(bytes(folder.read("a.tar", 0, 100)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == [content_of("a.tar")[:100]] * 8
    assert nginx.served() == BLOCK + 1


def test_what_was_fetched_ahead_needs_no_server(nginx, folder):
    ranges = [(name, offset, 5_000) for name in NAMES for offset in range(0, BYTES, 5_000)]
    random.Random(1).shuffle(ranges)
    start = time.monotonic()
    folder.prefetch(iter(ranges))
    assert time.monotonic() - start < 0.2, "returns at once"
    wait_for(lambda: nginx.served() == len(NAMES) * (BYTES + 1))
    assert len(nginx.log()) == 2 * len(NAMES), "adjacent blocks are fetched together"
    time.sleep(0.1)
    nginx.stop()
    check_all(folder)


def test_shards_are_fetched_ahead_at_the_same_time(nginx, folder):
    nginx.restart("limit_rate 2m;")  # of each connection: half a second for a shard
    folder.prefetch([("a.tar", 0, 10)])
    wait_for(lambda: nginx.served() > BLOCK)
    start = time.monotonic()
    folder.prefetch([(name, 0, BYTES) for name in NAMES])
    wait_for(lambda: nginx.served() >= len(NAMES) * BYTES)
    assert time.monotonic() - start < 1.2


def test_a_read_beyond_the_end_gives_what_is_there(folder):
    assert bytes(folder.read("a.tar", BYTES - 5, 100)) == content_of("a.tar")[-5:]
    assert bytes(folder.read("a.tar", BYTES + 5, 100)) == b""
    assert folder.size("a.tar") == BYTES
    assert bytes(folder.open("a.tar").read(10, 20)) == content_of("a.tar")[10:30]


def test_errors_cross_from_worker_processes_as_they_are(folder):
    for error in (Missing("http://host/a.tar"), Replaced("http://host/a.tar")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))
        assert str(again).startswith("http://host/a.tar")
    assert Missing("http://host/a.tar").filename == "http://host/a.tar"


def test_a_set_behind_a_url_gives_the_samples_of_its_folder(nginx, tmp_path, tiny_shards, monkeypatch):
    monkeypatch.setenv("PAPERSCALE_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tiny_shards, nginx.www / "tiny")
    local, remote = ShardSet(tiny_shards, "train"), ShardSet(nginx.url.replace("/set", "/tiny"), "train")
    assert remote.check() == []
    for shard, size in enumerate(local.sizes):
        for row in range(size):
            found, expected = remote.read(shard, row), local.read(shard, row)
            assert {name: bytes(value) for name, value in found.items()} == {
                name: bytes(value) for name, value in expected.items()
            }


def test_a_pickled_folder_reads_on_in_another_process(folder):
    again = pickle.loads(pickle.dumps(folder))
    assert bytes(again.read("b.tar", 1, 50)) == content_of("b.tar")[1:51]


# -- small files -------------------------------------------------------------------------------------------


def test_a_small_file_is_sent_again_only_if_it_changed(nginx, folder, tmp_path):
    assert folder.read_file("manifest.json") == b'{"name": "first"}'
    assert open_remote(nginx.url, tmp_path).read_file("manifest.json") == b'{"name": "first"}'
    assert [line[0] for line in nginx.log()] == ["200", "304"]
    (nginx.www / "set" / "manifest.json").write_text('{"name": "second"}')
    assert folder.read_file("manifest.json") == b'{"name": "second"}'


def test_a_damaged_small_file_in_the_cache_is_fetched_again(folder, tmp_path):
    folder.read_file("manifest.json")
    (cached,) = tmp_path.glob("cache/*/manifest.json.*")
    cached.write_bytes(cached.read_bytes()[:-3])
    assert folder.read_file("manifest.json") == b'{"name": "first"}'


# -- several processes, kills, bounds ----------------------------------------------------------------------

READER = """
import hashlib, random, sys
from pathlib import Path
from paperscale.data.remote import RemoteFolder
url, cache, limit, seed, rounds = sys.argv[1:6]
folder = RemoteFolder(url, Path(cache), cache_bytes=int(limit), block_bytes=16 << 10, timeout_s=10)
for round in range(int(rounds)):
    digest = hashlib.sha256()
    for first in range(6, len(sys.argv), 5):  # a window of five shards at a time, shuffled
        pieces = [(n, o, 5_000) for n in sys.argv[first : first + 5] for o in range(0, folder.size(n), 5_000)]
        random.Random(f"{seed} {round}").shuffle(pieces)
        folder.prefetch(pieces)
        found = {(n, o): bytes(folder.read(n, o, s)) for n, o, s in pieces}
        digest.update(b"".join(found[key] for key in sorted(found)))
    print(digest.hexdigest(), flush=True)
"""


def reader(url: str, cache: Path, seed: int, limit: int = 1 << 30, rounds: int = 1, names=NAMES) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(READER), url, cache, limit, seed, rounds, *names]
    return subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True)


def digest(names=NAMES, size=BYTES) -> str:
    return hashlib.sha256(b"".join(content_of(name, size) for name in sorted(names))).hexdigest()


def test_processes_share_what_they_fetch(nginx, tmp_path):
    readers = [reader(nginx.url, tmp_path / "cache", seed) for seed in range(4)]
    assert [process.communicate(timeout=60)[0].split() for process in readers] == [[digest()]] * 4
    assert nginx.served() < 2 * len(NAMES) * BYTES


def test_a_process_killed_while_it_fetches_leaves_nothing_wrong(nginx, folder, tmp_path):
    nginx.restart("limit_rate 400k;")
    for _ in range(3):
        before = cached_bytes(tmp_path / "cache")
        process = reader(nginx.url, tmp_path / "cache", seed=1, limit=256 * BLOCK)  # so small that it fetches by blocks
        wait_for(lambda b=before: cached_bytes(tmp_path / "cache") > b + 0.2 * BYTES, 20)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    assert cached_bytes(tmp_path / "cache") < 2.5 * BYTES, "it was killed at work"
    nginx.restart("")
    check_all(folder)


def cached_bytes(cache: Path) -> int:
    held = 0
    for path in cache.glob("*/*.cached"):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            held += path.stat().st_blocks * 512
    return held


def test_the_bound_holds_whatever_processes_share_the_cache(nginx, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("measuring a disk's use, open unlinked files included, needs root to mount one")
    try:
        names, size, limit = [f"{number}.tar" for number in range(10, 60)], 200_000, 5 << 20
        for name in names:
            (nginx.www / "set" / name).write_bytes(content_of(name, size))
        idle = RemoteFolder(nginx.url, disk / "cache", limit, BLOCK)
        for name in names[:15]:  # it holds these open all the time, and does nothing more
            idle.read(name, 0, size)
        readers = [reader(nginx.url, disk / "cache", seed, limit, 2, names) for seed in range(2)]
        most = 0
        while any(process.poll() is None for process in readers):
            most = max(most, cached_bytes(disk / "cache"))
            time.sleep(0.005)
        assert [process.communicate()[0].split() for process in readers] == [[digest(names, size)] * 2] * 2
        assert limit // 2 < most <= limit
        wait_for(lambda: used_bytes(disk) <= limit, 2)  # the idle process has closed what was removed
        idle.close()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def used_bytes(disk: Path) -> int:
    facts = os.statvfs(disk)
    return (facts.f_blocks - facts.f_bfree) * facts.f_frsize


def test_the_shard_that_was_not_read_for_longest_makes_room(nginx, tmp_path):
    cache = tmp_path / "cache"
    remote = open_remote(nginx.url, tmp_path, cache_bytes=3 * BYTES, block_bytes=4096)
    remote.read("a.tar", 0, BYTES)
    remote.read("b.tar", 0, BYTES)
    (a,), (b,) = cache.glob("*/a.tar.*"), cache.glob("*/b.tar.*")
    wait_for(lambda: remote.read("a.tar", 0, 10) and a.stat().st_mtime > b.stat().st_mtime + 0.3)  # hits count
    remote.read("c.tar", 0, BYTES)
    assert {path.name.partition(".")[0] for path in cache.glob("*/*.tar.*")} == {"a", "c"}


def test_the_cache_leaves_the_users_own_files_alone(nginx, tmp_path):
    own = tmp_path / "cache" / "project" / "results.csv"
    own.parent.mkdir(parents=True)
    own.write_bytes(bytes(1 << 20))
    check_all(open_remote(nginx.url, tmp_path, cache_bytes=2 * BYTES, block_bytes=4096))
    assert own.stat().st_size == 1 << 20


def test_a_cache_that_somebody_removes_is_made_again(nginx, folder, tmp_path):
    check_all(folder)
    shutil.rmtree(tmp_path / "cache")
    check_all(folder)
    wait_for(lambda: not folder._shards)  # what was removed is let go of
    check_all(folder)
    assert cached_bytes(tmp_path / "cache") > len(NAMES) * BYTES


def test_a_folder_that_is_dropped_ends_its_threads(nginx, tmp_path):
    before = threading.active_count()
    remote = open_remote(nginx.url, tmp_path)
    remote.prefetch([("a.tar", 0, 10)])
    wait_for(lambda: nginx.served() > BLOCK)
    assert threading.active_count() > before
    del remote
    wait_for(lambda: threading.active_count() <= before)


def test_a_damaged_cache_heals(folder, tmp_path):
    folder.read("a.tar", 0, BYTES)
    (cached,) = tmp_path.glob("cache/*/a.tar.*")
    with cached.open("r+b") as file:
        file.write(bytes(100))
    assert bytes(folder.read("a.tar", 0, 100)) == bytes(100)
    folder.forget("a.tar", 0, 100)
    assert bytes(folder.read("a.tar", 0, 100)) == content_of("a.tar")[:100]


def test_a_full_disk_is_read_past_and_told_once(nginx, small_disk, caplog):
    remote = RemoteFolder(nginx.url, small_disk / "cache", block_bytes=BLOCK, retries=0)
    (small_disk / "others").write_bytes(bytes(int(2.2 * 2**20)))
    with caplog.at_level(logging.WARNING):
        check_all(remote, 50_000)
        check_all(remote, 50_000)
    assert len(caplog.messages) == 1
    assert "set PAPERSCALE_CACHE to a folder on a larger disk" in caplog.text


# -- servers that fail -------------------------------------------------------------------------------------


def test_a_server_that_restarts_is_waited_for(nginx, folder):
    def restart() -> None:
        time.sleep(0.1)
        nginx.stop()
        time.sleep(0.2)
        nginx.start()

    thread = threading.Thread(target=restart)
    thread.start()
    content = content_of("a.tar")
    for start in range(0, BYTES, BLOCK):
        assert bytes(folder.read("a.tar", start, BLOCK)) == content[start : start + BLOCK]
        time.sleep(0.01)
    thread.join()


def test_a_connection_that_breaks_is_taken_up_where_it_broke(tmp_path):
    asked: list[str] = []
    with raw_server(asked) as url:
        remote = open_remote(url, tmp_path, block_bytes=1 << 20)
        assert bytes(remote.read("a.tar", 0, BYTES)) == content_of("a.tar")
    assert asked[:3] == ["bytes=0-0", f"bytes=0-{BYTES - 1}", f"bytes=400000-{BYTES - 1}"]


@contextlib.contextmanager
def raw_server(asked: list[str], seconds_per_byte: float = 0) -> Iterator[str]:
    """A server that closes the connection after 400,000 bytes, or sends one byte at a time."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                with server.accept()[0] as connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    answer(connection)

    def answer(connection: socket.socket) -> None:
        request = connection.recv(1 << 16).decode()
        wanted = next(line for line in request.splitlines() if line.startswith("Range: "))[7:]
        asked.append(wanted)
        start, end = (int(word) for word in wanted.removeprefix("bytes=").split("-"))
        head = f"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {start}-{end}/{BYTES}\r\n"
        head += f'Content-Length: {end - start + 1}\r\nETag: "1"\r\nConnection: close\r\n\r\n'
        connection.sendall(head.encode())
        content = content_of("a.tar")[start : min(end + 1, start + 400_000)]
        step = 1 if seconds_per_byte else len(content)
        for place in range(0, len(content), step):
            connection.sendall(content[place : place + step])
            time.sleep(seconds_per_byte)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/set"
    finally:
        server.close()


def test_a_shard_replaced_on_the_server_is_never_mixed_with_the_old_one(nginx, folder, tmp_path):
    folder.read("a.tar", 0, 100)
    new = content_of("b.tar")
    (nginx.www / "set" / "a.tar").write_bytes(new)
    os.utime(nginx.www / "set" / "a.tar", (1e9, 1e9))  # nginx tells versions apart by size and second
    with pytest.raises(UserError, match=r"/set/a\.tar was replaced on the server .*; start the run again"):
        folder.read("a.tar", 500_000, 100)
    with pytest.raises(UserError, match="was replaced"):
        folder.forget("a.tar", 0, 100)
    fresh = open_remote(nginx.url, tmp_path)
    assert bytes(fresh.read("a.tar", 0, BYTES)) == new


def test_a_shard_that_was_cut_short_on_the_server_counts_as_replaced(nginx, folder):
    folder.read("a.tar", 0, 100)
    (nginx.www / "set" / "a.tar").write_bytes(bytes(1000))
    with pytest.raises(UserError, match="was replaced"):
        folder.read("a.tar", 500_000, 100)


def test_a_file_that_is_not_there(nginx, folder):
    for action in (folder.read_file, folder.size, folder.open):
        with pytest.raises(
            FileNotFoundError, match=r"http://127.*/set/none\.tar is not there; check data\.path"
        ) as info:
            action("none.tar")
        assert isinstance(info.value, UserError)


def test_what_needs_a_password_says_so_without_telling_it(nginx, tmp_path):
    (nginx.folder / "users").write_text("me:{PLAIN}secret\n")
    nginx.restart(f'auth_basic "set"; auth_basic_user_file {nginx.folder}/users;')
    good = nginx.url.replace("http://", "http://me:secret@")
    remote = open_remote(good, tmp_path)
    assert bytes(remote.read("a.tar", 0, 10)) == content_of("a.tar")[:10]
    assert str(remote) == nginx.url
    with pytest.raises(UserError, match=r"access denied \(401\).*check.*credentials") as info:
        open_remote(good.replace("secret", "wrong"), tmp_path).size("a.tar")
    assert "wrong" not in str(info.value)


def test_the_password_may_be_in_netrc(nginx, tmp_path, monkeypatch):
    (nginx.folder / "users").write_text("me:{PLAIN}secret\n")
    nginx.restart(f'auth_basic "set"; auth_basic_user_file {nginx.folder}/users;')
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert open_remote(nginx.url, tmp_path).size("a.tar") == BYTES


def test_an_address_with_a_query_a_redirect_and_names_with_blanks(nginx, tmp_path):
    nginx.restart("rewrite ^/old/(.*)$ /set/$1 redirect;")
    (nginx.www / "set" / "a b%.tar").write_bytes(b"content")
    (nginx.www / "set" / "empty.tar").write_bytes(b"")
    remote = open_remote(nginx.url.replace("/set", "/old/") + "?token=1", tmp_path)
    assert bytes(remote.read("a b%.tar", 1, 4)) == b"onte"
    assert bytes(remote.read("empty.tar", 0, 4)) == b""
    assert nginx.log()[0][2] == "/old/a%20b%25.tar?token=1"
    assert str(remote) == nginx.url.replace("/set", "/old"), "the token is not shown"


def test_a_proxy_of_the_environment_is_used(nginx, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{nginx.port}")  # nginx answers for any host
    assert open_remote("http://data.invalid/set", tmp_path).size("a.tar") == BYTES


def test_a_server_without_ranges(nginx, folder):
    nginx.restart("max_ranges 0;")
    with pytest.raises(UserError, match=r"does not answer Range requests .*nginx.*or copy it to a folder"):
        folder.read("a.tar", 0, 10)


def test_a_server_that_does_not_answer_is_given_up(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        too_slow(f"http://127.0.0.1:{silent.getsockname()[1]}/set", tmp_path)


def test_a_server_that_trickles_is_given_up(tmp_path):
    with raw_server([], seconds_per_byte=0.05) as url:
        too_slow(url, tmp_path)


def too_slow(url: str, tmp_path: Path) -> None:
    remote = open_remote(url, tmp_path, timeout_s=0.3, retries=1)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"no complete answer in 0\.3 s, in 2 attempts; check the network"):
        remote.read("a.tar", 0, BYTES)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "http://127.0.0.1:{port}/set",
            r"no connection to '127\.0\.0\.1' \(.*refused.*\), in 2 attempts; check the host",
        ),
        ("http://no-such-host.invalid/set", r"name 'no-such-host\.invalid' is not known.*check the host's name"),
        ("http://host:port/set", r"data\.path: 'http://host:port/set' is no address; write it as"),
        ("nosuch://bucket/set", r"[Pp]rotocol.*nosuch.*set data\.path to"),
    ],
)
def test_an_address_that_is_wrong(tmp_path, address, message):
    with pytest.raises(UserError, match=message):
        open_remote(address.format(port=free_port()), tmp_path, retries=1).read_file("manifest.json")


def test_an_error_of_the_server_is_attempted_again_and_then_told(nginx, tmp_path, caplog):
    nginx.restart("location / { return 503; }")
    with pytest.raises(UserError, match="status 503, in 3 attempts; try again later"):
        open_remote(nginx.url, tmp_path, retries=2).size("a.tar")
    assert len(nginx.log()) == 3
    assert "attempt 2 of 3 failed" in caplog.text


def test_https_with_a_certificate_that_is_trusted_or_not(nginx, tmp_path, monkeypatch):
    pair = ["-keyout", f"{tmp_path}/key", "-out", f"{tmp_path}/cert", "-subj", "/CN=localhost"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-addext", "subjectAltName=IP:127.0.0.1", *pair]
    if shutil.which("openssl") is None or subprocess.run(make, capture_output=True).returncode:
        pytest.skip("no openssl here to make a certificate with")
    nginx.stop()
    nginx.start(f"ssl_certificate {tmp_path}/cert; ssl_certificate_key {tmp_path}/key;", listen="ssl")
    url = nginx.url.replace("http:", "https:")
    with pytest.raises(UserError, match=r"no trusted connection.*set SSL_CERT_FILE"):
        open_remote(url, tmp_path).size("a.tar")
    monkeypatch.setenv("SSL_CERT_FILE", f"{tmp_path}/cert")
    check_all(open_remote(url, tmp_path), 50_000)


def test_the_cache_of_another_user_is_not_trusted(nginx, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("giving a folder to another user needs root")
    (tmp_path / "cache").mkdir()
    os.chown(tmp_path / "cache", 12345, 12345)
    with pytest.raises(UserError, match="belongs to another user; set PAPERSCALE_CACHE"):
        open_remote(nginx.url, tmp_path).read("a.tar", 0, 10)


# -- S3 ----------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch):
    """An S3 client and a bucket of moto's server: a stand-in on this machine, the real service cannot be had here."""
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'paperscale[s3]'")
    import boto3

    moto = server.ThreadedMotoServer(port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    client = boto3.client("s3")
    client.create_bucket(Bucket="papers")
    for name in NAMES:
        client.put_object(Bucket="papers", Key=f"set/{name}", Body=content_of(name))
    client.put_object(Bucket="papers", Key="set/manifest.json", Body=b"{}")
    yield client
    moto.stop()


def test_s3_is_read_by_ranges_and_a_replaced_object_is_noticed(bucket, tmp_path):
    remote = open_remote("s3://papers/set", tmp_path)
    assert remote.read_file("manifest.json") == remote.read_file("manifest.json") == b"{}"
    check_all(remote, 50_000, NAMES[:2])
    assert cached_bytes(tmp_path / "cache") < 2.2 * BYTES
    with pytest.raises(FileNotFoundError, match=r"s3://papers/set/none\.tar is not there"):
        remote.size("none.tar")
    remote.read("c.tar", 0, 100)
    bucket.put_object(Bucket="papers", Key="set/c.tar", Body=content_of("a.tar"))
    with pytest.raises(UserError, match=r"s3://papers/set/c\.tar was replaced"):
        remote.read("c.tar", 500_000, 100)


def test_whatever_fsspec_knows_can_hold_a_set(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/remote-test/a.tar", content_of("a.tar"))
    remote = open_remote("memory://remote-test", tmp_path)
    check_all(remote, names=NAMES[:1])
    with pytest.raises(FileNotFoundError, match="is not there"):
        remote.open("none.tar")
