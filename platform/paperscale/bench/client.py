"""The other end of the runner: starts a peer's process, asks it, and gives up on it in time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from paperscale.bench import environments

LIMIT_S = 900.0
_SILENT = "the process ended without an answer; see its log"


class Client:
    """A peer's process.

    Args:
        peer: its name.
        cache: the benchmark's folder; the process writes its log there.
        python: the interpreter.
        extra: further environment variables.
    """

    def __init__(self, peer: str, cache: Path, python: str, extra: Mapping[str, str] | None = None):
        self.peer = peer
        log = cache / "logs" / f"{peer}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [python, "-m", "paperscale.bench.runner", peer],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=log.parent,
                env={**environments.variables(cache, python), **(extra or {})},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Return the process's number."""
        return self._process.pid

    def ask(self, command: str, limit_s: float = LIMIT_S, **fields: Any) -> dict[str, Any]:
        """Return the answer; one with the field ``error`` where there is none in time."""
        requests, answers = self._pipes()
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self.kill()

        timer = threading.Timer(limit_s, give_up)
        timer.start()
        try:
            requests.write(json.dumps({"command": command, **fields}) + "\n")
            requests.flush()
            line = answers.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if late.is_set():
            return {"error": f"no answer in {limit_s:.0f} s"}
        answer: dict[str, Any] = json.loads(line) if line else {"error": _SILENT}
        return answer

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the process has no pipes")
        return self._process.stdin, self._process.stdout

    def finish(self) -> None:
        """Let the process end by itself: its input ends."""
        with contextlib.suppress(OSError):
            self._pipes()[0].close()

    def kill(self) -> None:
        """End the process and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()
        if kind is not None:  # interrupted: what it still does is of no use
            self.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=20)
        self.kill()
        self._process.wait()
        self._pipes()[1].close()
