"""The identity of a W&B run; imports nothing, so that creating a run is instant."""

from __future__ import annotations

import secrets
import string


def new_id() -> str:
    """Return an id for a W&B run: fixed once, when a run is created, before anything can crash."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
