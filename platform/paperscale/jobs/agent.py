"""``python -m paperscale.jobs.agent RUN ATTEMPT``: one per node; starts the node's ranks and watches them.

The batch script starts it with srun on every node, the local cluster without srun. Standard library only, so that
it is there within a tenth of a second and stays small. It checks the node, opens the rendezvous, gives every rank
a log, passes signals on, ends the others soon after one has failed, and exits with the code that says what is next.
While the ranks run it looks once a second whether they still move, whether a newer attempt has taken the run over,
and whether the user wants it saved or stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

from paperscale.atomic import write_atomically
from paperscale.errors import BAD_NODE, HUNG, LOST, REQUEUE, SUPERSEDED, BadNode
from paperscale.jobs.faults import FULL_S, ORDER
from paperscale.jobs.network import interface_towards
from paperscale.jobs.preflight import NodeReport, check_node
from paperscale.jobs.run import Attempt, Run, read_json
from paperscale.jobs.watchdog import Watchdog, rank_facts
from paperscale.training import pulse
from paperscale.training.signals import end_with_parent

TICK_S = 0.1
LOOK_S = 1.0
REPORT_S = 5.0
GRACE_S = 10.0
"""Seconds that the other ranks have to end by themselves after one has failed."""
LAST_GRACE_S = 60.0
"""Seconds between the first rank that is through and the last."""
RENDEZVOUS_S = 120.0
_DUMP_S = 0.3
_ROOM_BYTES = 16384
_OUT_OF_MEMORY = " (by a person, or for want of memory: see `dmesg` of the node, and ask for more with mem_per_node)"
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class Agent:
    """The node's part of an attempt.

    Args:
        run: the run's directory.
        attempt: the attempt's directory.
    """

    def __init__(self, run: Run, attempt: Attempt):
        self.run, self.attempt, self.info = run, attempt, run.info
        self.on_slurm = self.info.engine == "slurm"
        self.node = int(os.environ.get("SLURM_NODEID", 0)) if self.on_slurm else 0
        self.host = socket.gethostname()
        self.report = NodeReport(self.host)
        self.signals: list[int] = []
        self.ranks: list[subprocess.Popen[bytes]] = []
        self.count = self.info.procs_per_node
        self.first_rank = self.node * self.count
        self._file = tempfile.TemporaryFile(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)  # noqa: S108, SIM115
        self._file.truncate(self.count * pulse.SLOT_BYTES)
        self.slots = pulse.Slots(self._file.fileno(), self.count)
        self.listener = socket.create_server(("", 0), backlog=128)  # other agents try whether this node can be reached
        self.watchdog = Watchdog(self.attempt, self.node)
        self.failed_at: float | None = None
        self.outcome: int | None = None
        self.killing = False
        self.full: tuple[int, float] | None = None
        self.ended: set[int] = set()
        self._looked = self._reported = 0.0

    # -- start ---------------------------------------------------------------------------------------------

    def carry_out(self) -> int:
        """Run the node's ranks to their end; return the exit code."""
        (self.attempt.path / f"agent-{self.node}.pid").write_text(str(os.getpid()))
        try:
            self.report = check_node(self.run, self.attempt.path, self.info.gpus_per_node)
        except BadNode as error:
            self.attempt.suspect(self.host, str(error))
            return self._fail(BAD_NODE, f"node {self.host} did not pass its preflight: {error}")
        for warning in self.report.warnings:
            say(f"WARNING {self.host}: {warning}")
        environment = self._rendezvous()
        if environment is None:
            return self._fail(LOST, f"node {self.node} ({self.host}): node 0 has not opened the rendezvous")
        self._start(environment)
        self._write_report()
        while any(rank.poll() is None for rank in self.ranks):
            self._tick()
            time.sleep(TICK_S)
        self._collect()
        self._write_report()
        return self._exit_code()

    def _fail(self, code: int, error: str) -> int:
        """Record what ends the attempt, unless something else has before; return the code that counts."""
        say(error)
        self.attempt.fail(code, error)
        return self.attempt.verdict or code

    def _rendezvous(self) -> dict[str, str] | None:
        """Return where rank 0 listens, as environment variables; node 0 opens the port and tells the others.

        The port is one that is free: rank 0 inherits the open socket, so that nothing can take it in between.
        """
        note = self.attempt.path / "rendezvous.json"
        if self.node == 0:
            self._store = socket.create_server(("", 0), backlog=4096)
            write_atomically(note, json.dumps({"port": self._store.getsockname()[1]}).encode())
        deadline = time.monotonic() + RENDEZVOUS_S
        while not note.exists():
            if time.monotonic() > deadline or self.attempt.verdict is not None:
                return None
            time.sleep(TICK_S)
        address = "127.0.0.1" if self.info.nodes == 1 else os.environ["MASTER_ADDR"]
        environment = {"MASTER_ADDR": address, "MASTER_PORT": str(json.loads(note.read_text())["port"])}
        if self.info.nodes > 1 and (interface := interface_towards(address)):
            environment |= {f"{kind}_SOCKET_IFNAME": interface for kind in ("GLOO", "NCCL", "TP")}
            self.report.facts["interface"] = interface
        return environment

    def _start(self, environment: dict[str, str]) -> None:
        world_size = self.info.nodes * self.count
        command = [sys.executable, "-m", "paperscale.jobs.worker", str(self.run.path), str(self.attempt.number)]
        for local_rank in range(self.count):
            rank = self.first_rank + local_rank
            env = {
                **environment,
                **os.environ,  # what the profile sets wins
                "MASTER_ADDR": environment["MASTER_ADDR"],
                "MASTER_PORT": environment["MASTER_PORT"],
                "WORLD_SIZE": str(world_size),
                "RANK": str(rank),
                "LOCAL_RANK": str(local_rank),
                "NODE_RANK": str(self.node),
                pulse.ENVIRONMENT: f"{self._file.fileno()}:{local_rank}",
            }
            files = [self._file.fileno()]
            if rank == 0:
                files.append(self._store.fileno())
                env[pulse.LISTEN] = str(self._store.fileno())
            with self.attempt.log(rank).open("ab") as log:
                self.ranks.append(
                    subprocess.Popen(
                        command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, pass_fds=files
                    )
                )
        self.started = time.monotonic()
        if self.node == 0:
            self._store.close()

    # -- while they run ------------------------------------------------------------------------------------

    def _tick(self) -> None:
        while self.signals:
            self._signal_all(self.signals.pop(0))
        self._collect()
        now = time.monotonic()
        if self.failed_at is not None and now - self.failed_at > GRACE_S:
            self._kill()
        if now - self._looked >= LOOK_S:
            self._looked = now
            self._look()
        if now - self._reported >= REPORT_S:
            self._write_report()
            for slow in self.watchdog.compare_ranks() if self.node == 0 else ():
                say(
                    f"WARNING rank {slow['rank']} on {slow['host']} is slow: "
                    f"its {slow['what']} takes {slow['seconds']} s more a step than the others' ({slow['slower']} x)"
                )

    def _collect(self) -> None:
        """Record failures as ranks end, and set the time for the others to end."""
        for local_rank, process in enumerate(self.ranks):
            code = process.poll()
            if code is None or local_rank in self.ended:
                continue
            self.ended.add(local_rank)
            if self.killing:
                continue
            if code not in (0, REQUEUE):
                self._record(self.first_rank + local_rank, code)
                self.failed_at = self.failed_at or time.monotonic()
            elif self.failed_at is None and len(self.ranks) > 1:
                self.failed_at = time.monotonic() + LAST_GRACE_S - GRACE_S

    def _record(self, rank: int, code: int) -> None:
        where = f"rank {rank} on {self.host}"
        if code >= 0:
            self._fail(code, f"{where}: ended with exit code {code}; see its log")
            return
        why = _OUT_OF_MEMORY if code == -signal.SIGKILL else ""
        self._fail(128 - code, f"{where}: killed by {signal.Signals(-code).name}{why}")

    def _look(self) -> None:
        if not self.attempt.path.exists():
            say(f"{self.host}: the run's folder is gone; this attempt ends")
            self._end(SUPERSEDED)
        elif self.run.attempts()[-1].number > self.attempt.number:
            self._fail(SUPERSEDED, f"{self.host}: a newer attempt has taken over the run")
            self._end(SUPERSEDED)
        elif (verdict := self.attempt.verdict) is not None and self.failed_at is None:
            say(f"{self.host}: ends with exit code {verdict}: {self.attempt.error}")
            self._end(verdict)
        elif self.failed_at is None:
            self._pass_requests_on()
            self._obey_drill()
            self._watch()

    def _end(self, code: int) -> None:
        self.outcome = code
        self._kill()
        self.failed_at = time.monotonic()

    def _kill(self) -> None:
        self._collect()  # who has ended by itself is not to be taken for killed
        self.killing = True
        self._signal_all(signal.SIGKILL)

    def _pass_requests_on(self) -> None:
        """Let rank 0 know what the user has asked for by a file in the run's directory."""
        if self.node != 0:
            return
        if (self.run.path / "save").exists():
            with contextlib.suppress(OSError):
                (self.run.path / "save").unlink()
            self.slots.request(0, pulse.SAVE)
        if (self.run.path / "stop").exists() or self.run.cancelled:
            self.slots.request(0, pulse.STOP)

    def _obey_drill(self) -> None:
        """Do to a rank of this node what `paperscale drill` asks for."""
        order = read_json(self.run.path / ORDER)
        slot = order.get("rank", -1) - self.first_rank
        if 0 <= slot < self.count:
            (self.run.path / ORDER).unlink(missing_ok=True)
            say(f"{self.host}: drill, {order['fault']} at rank {order['rank']}")
            if order["fault"] == "fill-disk":
                room = self.attempt.log(order["rank"]).stat().st_size + _ROOM_BYTES  # its log can still be written
                resource.prlimit(self.ranks[slot].pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
                self.full = self.ranks[slot].pid, time.monotonic() + FULL_S
            else:
                self.ranks[slot].send_signal(signal.SIGKILL if order["fault"] == "kill-rank" else signal.SIGSTOP)
        if self.full and time.monotonic() > self.full[1]:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(self.full[0], resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            self.full = None

    def _watch(self) -> None:
        """Where the ranks stand still: keep where each is, name the one that is waited for, and end them."""
        limit = self.watchdog.hung(self._readings())
        if limit is None and not self.watchdog.announced():
            return
        self._write_report()  # before the stacks: a stopped process has to be woken for them
        self.watchdog.announce()
        self._dump_stacks()
        text = self.watchdog.name_the_cause(limit)
        self._fail(HUNG, text)
        self._end(HUNG)

    def _readings(self) -> list[dict[str, Any]]:
        return [
            rank_facts(self.first_rank + slot, process, self.slots.read(slot), self.started)
            for slot, process in enumerate(self.ranks)
        ]

    def _dump_stacks(self) -> None:
        """Let every rank write where it is, and go no further; the handler runs even where Python does not."""
        self._signal_all(signal.SIGQUIT)
        self._signal_all(signal.SIGCONT)  # a stopped process takes signals when it runs
        time.sleep(_DUMP_S)
        self._signal_all(signal.SIGSTOP)

    def _write_report(self) -> None:
        self._reported = time.monotonic()
        ranks = self._readings() if self.ranks else []
        content = {
            "node": self.node,
            "host": self.host,
            "time": time.time(),
            "port": self.listener.getsockname()[1],
            "ranks": ranks,
            "preflight": self.report.facts,
            "warnings": self.report.warnings,
        }
        with contextlib.suppress(OSError):  # a full disk must not end the training
            write_atomically(self.attempt.path / f"node-{self.node}.json", json.dumps(content).encode())

    def _signal_all(self, number: int) -> None:
        for process in self.ranks:
            if process.poll() is None:
                process.send_signal(number)

    def _exit_code(self) -> int:
        """Return what the launcher is to see: srun ends all nodes at the first code that is not 0.

        That the ranks were told to stop and did is therefore left to a file; node 0 writes it.
        """
        if self.outcome is not None:
            return self.outcome
        codes = [128 - code if code < 0 else code for code in (rank.wait() for rank in self.ranks)]
        verdict = self.attempt.verdict
        if verdict is not None or max(codes) != REQUEUE:
            return verdict or max(codes)
        if self.node == 0:
            try:
                (self.attempt.path / "verdict").write_text(f"{REQUEUE}\n")
            except OSError:
                return REQUEUE
        return 0


def say(line: str) -> None:
    """Print a line; a log on a full disk must not end the training."""
    with contextlib.suppress(OSError):
        print(time.strftime("%FT%T"), line, flush=True)


def main(run_dir: str, number: int) -> int:
    """Run the node's part of an attempt; return the exit code."""
    run = Run(Path(run_dir))
    agent = Agent(run, Attempt(run.path / "attempts" / f"{number:04d}"))

    def note(number: int, frame: FrameType | None) -> None:
        agent.signals.append(number)

    for forwarded in _FORWARDED:
        signal.signal(forwarded, note)
    if not agent.on_slurm:
        end_with_parent(signal.SIGTERM)  # without its job script nobody would run it again: checkpoint and end
    code = agent.carry_out()
    for forwarded in _FORWARDED:
        signal.signal(forwarded, signal.SIG_IGN)  # the outcome is decided, only the exit is left
    return code


if __name__ == "__main__":
    code = main(sys.argv[1], int(sys.argv[2]))
    sys.stdout.flush()
    os._exit(code)  # an interpreter that winds up has given signals their default action back
