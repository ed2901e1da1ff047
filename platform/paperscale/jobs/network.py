"""Which network interface leads to the other nodes. Standard library only."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
from pathlib import Path

_SIOCGIFADDR = 0x8915


def address_towards(host: str) -> str:
    """Return this node's own address on the way to ``host``; empty where there is no way.

    No packet is sent: connecting a datagram socket only looks up the route.
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return str(probe.getsockname()[0])
    return ""


def interface_of(address: str) -> str:
    """Return the name of the interface that has an IPv4 address; empty where none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                packed = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(packed[20:24]) == address:
                    return name
    return ""


def default_interface() -> str:
    """Return the interface of the default route, else the first that is not the loopback."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/route").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1] == "00000000":
                return fields[0]
    return next((name for _, name in socket.if_nameindex() if name != "lo"), "")


def interface_towards(host: str) -> str:
    """Return the interface by which this node and ``host`` reach each other.

    Where ``host`` is this node, or its name leads to 127.0.1.1 as on Debian, the interface of this node's own
    outer address is meant: the others come in by it.
    """
    address = address_towards(host)
    name = "" if address.startswith("127.") else interface_of(address)
    return name or default_interface()
