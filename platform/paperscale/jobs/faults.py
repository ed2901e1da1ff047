"""The faults that ``paperscale drill`` can make happen, and how the agents are told."""

from __future__ import annotations

FAULTS = {
    "preempt": "the signal that a scheduler sends before it takes the nodes",
    "kill-rank": "a rank's process is killed",
    "hang": "a rank's process stands still, as one that waits for a dead file system",
    "bad-node": "a node does not pass the preflight of the next attempt",
    "fill-disk": "a rank's writes fail for half a minute, as on a full disk",
}
ORDER = "drill.json"
"""A file in the run's directory that names a fault and the rank that it strikes."""
BAD_NODE_ORDER = "drill-bad-node"
"""A file in the run's directory that names a node which is to fail its next preflight."""
FULL_S = 30.0
"""Seconds that a drill of a full disk lasts."""
