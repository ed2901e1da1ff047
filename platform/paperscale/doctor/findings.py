"""Findings, and how the checks that make them are run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from paperscale.errors import UserError
from paperscale.findings import Finding

if TYPE_CHECKING:
    from paperscale.jobs.profile import Profile


@dataclass(frozen=True)
class Asked:
    """What the user wants to be true here.

    Attributes:
        cluster: the profile that must work, if one must.
        data: folder or URL of a set of shards to verify.
        quick: leave out what takes long: imports, speeds, W&B's server, every byte of a set.
    """

    cluster: str | None = None
    data: str | None = None
    quick: bool = False

    @property
    def profile(self) -> Profile | None:
        """Return the profile.

        Raises:
            UserError: there is none of that name, or a field is wrong.
        """
        from paperscale.jobs import profile

        return profile.load(self.cluster) if self.cluster else None

    @property
    def slurm(self) -> bool:
        """Return whether a SLURM cluster must work here; a profile that cannot be read counts as one."""
        try:
            return self.profile is not None and self.profile.engine == "slurm"
        except UserError:
            return True


Function = Callable[[Asked], Iterable[Finding]]


@dataclass(frozen=True)
class Work:
    """A check to run.

    Attributes:
        name: of the finding, should the check crash or hang.
        function: makes the findings.
        limit_s: seconds until it is given up; ``None`` waits for as long as it takes.
        hung: the finding then, if not a failure.
    """

    name: str
    function: Function
    limit_s: float | None = 30.0
    hung: Finding | None = None


class _Running:
    """A check in a thread of its own, which a process that ends does not wait for."""

    def __init__(self, work: Work, asked: Asked):
        self.work, self.asked = work, asked
        self._found: list[Finding] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._began = time.monotonic()
        self._thread.start()

    def _run(self) -> None:
        try:
            for check in self.work.function(self.asked):
                self._found.append(check)
        except UserError as error:  # says itself what to do
            what, _, fix = str(error).rpartition("; ")
            self._found.append(Finding("FAIL", self.work.name, what or fix, fix if what else "mend what it names"))
        except Exception as error:  # the check itself is at fault; the others go on
            what = f"this check failed: {type(error).__name__}: {' '.join(str(error).split())}"
            fix = "report it at the project's issue tracker, with this line"
            self._found.append(Finding("FAIL", self.work.name, what, fix))

    def results(self) -> list[Finding]:
        """Return the findings, as many as there are when the time is over."""
        if self.work.limit_s is None:
            self._thread.join()
        else:
            self._thread.join(max(0.0, self._began + self.work.limit_s - time.monotonic()))
        if not self._thread.is_alive():
            return self._found
        what = f"no answer within {self.work.limit_s:g} s"
        failure = Finding("FAIL", self.work.name, what, "find out what hangs there: a training would too")
        return [*self._found, self.work.hung or failure]


def checks(asked: Asked) -> Iterator[Finding]:
    """Yield the findings, always in the same order."""
    for running in [_Running(work, asked) for work in all_work(asked)]:
        yield from running.results()


def all_work(asked: Asked) -> list[Work]:
    """Return the checks to run."""
    from paperscale.doctor import data, machine, names, scheduler, software, storage, tracking

    folders = [
        Work(f"{system.role}: file system", partial(storage.check, system)) for system in storage.file_systems(asked)
    ]
    return [
        Work("Python", software.python),
        Work("packages", software.packages),
        Work("torch", software.torch, 60),
        Work("deepspeed", software.deepspeed, 60),
        Work("compiled operators", software.stale_locks),
        Work("images", data.images),
        Work("CPUs", machine.cpus),
        Work("memory", machine.memory),
        Work("limits", machine.limits),
        *folders,
        Work("quota", storage.quota, 10),
        Work("host name", names.own_name, 15),
        Work("W&B", tracking.wandb, tracking.LIMIT_S + 1, tracking.unreachable("its server", "no answer to its name")),
        Work("SLURM", scheduler.slurm, 60),
        *([Work("profile", scheduler.profile, 180)] if asked.cluster else []),
        *([Work("shards", data.shards, None)] if asked.data else []),
    ]
