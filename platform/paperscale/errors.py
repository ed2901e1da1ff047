"""Errors that end in the fix, and the exit codes that tell a batch script what to do next.

A :class:`UserError` is printed as one line without a traceback; the program then exits with
:data:`USER_ERROR`. Anything else is a defect of ours or of the machine and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable

FINISHED = 0
"""The run reached its end; nothing is left to do."""
FAILED = 1
"""The run failed for good; running it again would fail again."""
USER_ERROR = 2
"""The user's input is wrong; the message says what to change."""
REQUEUE = 75
"""A checkpoint is written; run the same job again (``EX_TEMPFAIL`` of ``sysexits.h``)."""
LOST = 76
"""Another rank or the way to it was lost; run the same job again."""
HUNG = 77
"""The ranks stood still until the watchdog ended them; run the same job again."""
BAD_NODE = 78
"""A node did not pass the preflight; run the same job again without it."""
SUPERSEDED = 79
"""A newer attempt has taken over the run; this one ends without a trace."""
ROLLBACK = 80
"""Training went wrong; run the same job again, which passes over the samples it went wrong on."""
OUT_OF_MEMORY = 81
"""A forward pass did not fit into memory; run the same job again, which divides the batch further."""


class UserError(Exception):
    """Something the user can mend: the message names the thing that is wrong and ends in the fix."""


class Interrupted(Exception):
    """Raised on every rank at the step they agreed on, after the checkpoint is durable."""


class BadNode(Exception):
    """This node cannot carry the run; another may."""


class LostRank(Exception):
    """Another rank, or the way to it, was lost: not this rank's failure, and worth another attempt."""


class Superseded(Exception):
    """A newer attempt has taken over the run: this one must neither write nor ask to be run again."""


class RolledBack(Exception):
    """Raised on every rank at the same step: the run goes back to its last checkpoint and passes over some samples.

    Args:
        message: what has happened.
        start: samples consumed where those begin that are passed over.
        stop: samples consumed where they end.
    """

    def __init__(self, message: str, start: int, stop: int):
        super().__init__(message)
        self.start, self.stop = start, stop


_OF_THE_DISK = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space within your quota",
    errno.EACCES: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that is not read-only",
}


_LOST = re.compile(
    r"connection (?:closed|reset|refused|was likely closed)|broken pipe|no route to host|connectfullmesh"
    r"|timed out waiting|socket timeout|failed to recv|watchdog caught"
    r"|remote process exited|network error|unhandled system error",
    re.IGNORECASE,
)


def is_lost_rank(error: BaseException) -> bool:
    """Return whether an error tells of another rank's end, in the words of gloo, NCCL or torch's store."""
    if isinstance(error, LostRank):
        return True
    names = {kind.__name__ for kind in type(error).__mro__}
    if "DistError" in names:
        return True
    return type(error) is RuntimeError and bool(_LOST.search(str(error)))


def is_users_mistake(error: BaseException) -> bool:
    """Return whether the user can mend it: no traceback then, and :data:`USER_ERROR`."""
    disk = isinstance(error, OSError) and error.errno in _OF_THE_DISK
    return disk or isinstance(error, UserError) or type(error).__name__ == "MisconfigurationException"


def describe(error: BaseException) -> str:
    """Return a user's mistake as one line that ends in the fix."""
    if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
        return f"{error.filename or 'cannot write'}: {error.strerror}; {_OF_THE_DISK[error.errno]} and run it again"
    return " ".join(str(error).split())


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or an empty string."""
    known = list(known)
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not matches:  # a unique ending is as good a hint: "max_epoch" for "trainer.max_epochs"
        tail = name.rsplit(".", 1)[-1]
        tails = {k.rsplit(".", 1)[-1]: k for k in known}
        matches = [tails[m] for m in difflib.get_close_matches(tail, tails, n=1, cutoff=0.75)]
    return f"; did you mean '{matches[0]}'?" if matches else ""
