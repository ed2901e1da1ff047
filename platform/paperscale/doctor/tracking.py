"""Weights & Biases: key, mode, and whether its server can be reached from here."""

from __future__ import annotations

import netrc
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from paperscale.doctor.findings import Asked
from paperscale.findings import Finding

LIMIT_S = 3.0


def wandb(asked: Asked) -> Iterator[Finding]:
    """Are runs sent as they go, or written here?"""
    mode = os.environ.get("WANDB_MODE", "online")
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    host = urlsplit(url).hostname or ""
    if mode != "online":
        yield Finding("OK", "W&B", f"WANDB_MODE is {mode}: runs are written offline, `wandb sync` sends them later")
    elif not _has_key(host):
        yield Finding("OK", "W&B", "no key: runs are written offline (`wandb login` to send them, `wandb sync` later)")
    elif asked.quick:
        yield Finding("OK", "W&B", f"a key is configured: runs are sent to {host} as they go")
    else:
        yield _reach(url, host)


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return host in netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def _reach(url: str, host: str) -> Finding:
    try:
        with urllib.request.urlopen(url, timeout=LIMIT_S):  # noqa: S310  the user's own, or W&B's
            pass
    except urllib.error.HTTPError:  # an answer all the same
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return unreachable(host, str(reason))
    return Finding("OK", "W&B", f"a key is configured and {host} answers: runs are sent as they go")


def unreachable(host: str, reason: str) -> Finding:
    """Return the finding on a server that cannot be reached: no failure, W&B is not needed to train."""
    fix = "export WANDB_MODE=offline: runs are written offline, and `wandb sync` sends them later"
    return Finding("WARN", "W&B", f"a key is configured, but {host} does not answer: {reason}", fix)
