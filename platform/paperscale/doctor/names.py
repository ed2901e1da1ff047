"""Name service: this machine's own name, and how long it takes to resolve."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from ipaddress import ip_address

from paperscale.doctor.findings import Asked
from paperscale.findings import Finding, Level

_SLOW_S = 1.0


def own_name(asked: Asked) -> Iterator[Finding]:
    """Can the other nodes of a job reach this machine by its name, and does the answer come at once?"""
    name = socket.gethostname()
    began = time.monotonic()
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        fix = "add the name to /etc/hosts or to the name service"
        level: Level = "WARN" if asked.slurm else "OK"
        yield Finding(level, "host name", f"{name}: {error.strerror}; one machine trains all the same", fix)
        return
    forward = time.monotonic() - began
    addresses = sorted({str(entry[4][0]).partition("%")[0] for entry in found})
    yield _address(name, addresses, asked.slurm)
    began = time.monotonic()
    for address in addresses:
        _reverse(address)
    yield _pace(name, forward, time.monotonic() - began)


def _address(name: str, addresses: list[str], slurm: bool) -> Finding:
    found = f"{name} is {', '.join(addresses)}"
    if not all(ip_address(address).is_loopback for address in addresses):
        return Finding("OK", "host name", found)
    if not slurm or "SLURM_JOB_ID" not in os.environ:  # only a node's own name matters, and only among several nodes
        return Finding("OK", "host name", f"{found}: a name for this machine alone")
    found += ": Gloo would listen where no other node reaches it, did jobs not name the network interface"
    fix = "if processes fail to connect all the same, set GLOO_SOCKET_IFNAME in the profile's env"
    return Finding("WARN", "host name", found, fix)


def _reverse(address: str) -> None:
    try:
        socket.getnameinfo((address, 0), socket.NI_NAMEREQD)
    except OSError:  # it has no name, which was found out in time
        return


def _pace(name: str, forward: float, reverse: float) -> Finding:
    found = f"{name} is resolved in {forward * 1000:.0f} ms, its addresses in {reverse * 1000:.0f} ms"
    if forward + reverse < _SLOW_S:
        return Finding("OK", "name service", found)
    fix = "put the nodes into /etc/hosts, and `files` before `dns` in /etc/nsswitch.conf"
    return Finding("WARN", "name service", f"{found}: torch asks for every process at the start of a job", fix)
