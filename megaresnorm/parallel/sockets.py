"""The TCP sockets that this process has open, as Linux tells them."""

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc/self")
_LISTENING, _ESTABLISHED = "0A", "01"


class OwnSocket(NamedTuple):
    """A TCP socket of this process.

    Attributes:
        descriptor: in this process.
        address, port: of this end.
        listening: whether it waits for others; else it is connected to one.
    """

    descriptor: int
    address: str
    port: int
    listening: bool


def own_sockets() -> list[OwnSocket]:
    """All that listen or are connected; empty if the system does not tell (it does on Linux)."""
    inodes = dict(_inodes())
    found = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        try:
            lines = (_PROC / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            if fields[9] in inodes and fields[3] in (_LISTENING, _ESTABLISHED):
                address, port = _address(fields[1], family)
                found.append(OwnSocket(inodes[fields[9]], address, port, fields[3] == _LISTENING))
    return found


def cut_connections() -> int:
    """Shut down all TCP connections of this process, as a network does that fails; how many there were."""
    connected = [one for one in own_sockets() if not one.listening]
    for one in connected:
        with socket.socket(fileno=os.dup(one.descriptor)) as ours, suppress(OSError):  # its peer may be gone already
            ours.shutdown(socket.SHUT_RDWR)
    return len(connected)


def _inodes() -> Iterator[tuple[str, int]]:
    try:
        links = list((_PROC / "fd").iterdir())
    except OSError:
        return
    for link in links:
        with suppress(OSError):  # that of the listing itself is closed by now
            target = os.readlink(link)
            if target.startswith("socket:["):
                yield target[8:-1], int(link.name)


def _address(text: str, family: socket.AddressFamily) -> tuple[str, int]:
    """Address and port of a table of the kernel, whose words of four bytes have the host's order."""
    raw, _, port = text.partition(":")
    words = [bytes.fromhex(raw[i : i + 8])[::-1] for i in range(0, len(raw), 8)]
    return socket.inet_ntop(family, b"".join(words)).removeprefix("::ffff:"), int(port, 16)
