"""Errors that end in the fix, and the exit codes that tell a batch script what to do next.

A :class:`UserError` is printed as one line without a traceback; the program then exits with
:data:`USER_ERROR`. Anything else is a defect of ours or of the machine and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

FINISHED = 0
"""The run reached its end; nothing is left to do."""
FAILED = 1
"""The run failed for good; running it again would fail again."""
USER_ERROR = 2
"""The user's input is wrong; the message says what to change."""
REQUEUE = 75
"""A checkpoint is written; run the same job again (``EX_TEMPFAIL`` of ``sysexits.h``)."""


class UserError(Exception):
    """Something the user can mend: the message names the thing that is wrong and ends in the fix."""


class Interrupted(Exception):
    """Raised on every rank at the step they agreed on, after the checkpoint is durable."""


class Superseded(Exception):
    """A newer attempt has taken over the run: this one must neither write nor ask to be run again."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or an empty string."""
    known = list(known)
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not matches:  # a unique ending is as good a hint: "max_epoch" for "trainer.max_epochs"
        tail = name.rsplit(".", 1)[-1]
        tails = {k.rsplit(".", 1)[-1]: k for k in known}
        matches = [tails[m] for m in difflib.get_close_matches(tail, tails, n=1, cutoff=0.75)]
    return f"; did you mean '{matches[0]}'?" if matches else ""
