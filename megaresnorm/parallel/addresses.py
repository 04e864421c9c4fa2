"""The address by which other nodes reach this one, and the network interface that has it."""

import errno
import fcntl
import re
import socket
import struct
import subprocess
from pathlib import Path

ELSEWHERE = "192.0.2.1"  # an address that no host has (RFC 5737)
LOOPBACK = "lo"
_IPV6_ADDRESSES = Path("/proc/net/if_inet6")  # Linux: address in hex, index, prefix length, scope, flags, interface
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def local_address_of(host: str, port: int) -> str | None:
    """The address by which other nodes reach this one: the local end of its route to ``host``.

    Where /etc/hosts of this node maps the name to loopback, as Debian does with the node's own name, that route says
    nothing; then it is the address of the default route.

    Returns:
        None where the name cannot be resolved yet.
    """
    address = address_towards(host, port)
    named = host != "localhost" and not is_loopback(host)
    if not named or address is None or not is_loopback(address):
        return address
    return address_towards(ELSEWHERE, port) or _only_address() or address


def is_loopback(address: str) -> bool:
    """Whether an address is this host's own, to which no other host has a way."""
    return address == "::1" or address.startswith("127.")


def names_this_host(host: str) -> bool:
    """Whether all nodes that have met at ``host`` are on this machine.

    They are where it is a loopback address, since each has reached it on its own machine. A name that /etc/hosts of
    this node maps to loopback may mean another address on the others, unless this machine has no network.
    """
    if host == "localhost" or is_loopback(host):
        return True
    address = resolved(host)
    return address is not None and is_loopback(address) and not _has_network()


def _has_network() -> bool:
    """Whether an interface besides loopback has an address."""
    names = {name for _, name in socket.if_nameindex()} - {LOOPBACK}
    try:
        inet6 = {line.split()[5] for line in _IPV6_ADDRESSES.read_text().splitlines()}
    except OSError:
        inet6 = set()
    return any(name in inet6 or _ipv4_of(name) for name in names)


def address_by_slurm(node: str) -> str | None:
    """The address at which Slurm itself reaches a node that it knows by this name; None where it does not tell."""
    try:
        command = ["scontrol", "show", "node", "-o", node]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL, check=True)
    except (OSError, subprocess.SubprocessError):  # not in this container, no such node, or no answer
        return None
    found = re.search(r"(?:^|\s)NodeAddr=(\S+)", done.stdout)
    return found[1] if found and resolved(found[1]) else None


def address_towards(host: str, port: int) -> str | None:
    """The address of this node from which it reaches another; None where the name cannot be resolved yet.

    Nothing is sent: connecting a datagram socket only looks up the route.
    """
    try:
        family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return probe.getsockname()[0]
    except OSError:
        return None


def _only_address() -> str | None:
    """The one IPv4 address of this node besides loopback, where there is no default route; None with several."""
    found = {address for _, name in socket.if_nameindex() if name != LOOPBACK and (address := _ipv4_of(name))}
    return found.pop() if len(found) == 1 else None


def interface_of(address: str | None) -> str | None:
    """Name of the network interface with this address; None if the system does not tell (it does on Linux)."""
    if not address:
        return None
    if ":" in address:
        return _interface_of_ipv6(address)
    return next((name for _, name in socket.if_nameindex() if _ipv4_of(name) == address), None)


def address_of(interface: str) -> str | None:
    """The IPv4 address of a network interface; None where it has none, or there is no such interface."""
    return _ipv4_of(interface)


def _ipv4_of(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])


def _interface_of_ipv6(address: str) -> str | None:
    address, _, zone = address.partition("%")
    if zone:
        return zone
    wanted = socket.inet_pton(socket.AF_INET6, address).hex()
    try:
        lines = [line.split() for line in _IPV6_ADDRESSES.read_text().splitlines()]
    except OSError:
        return None
    return next((words[5] for words in lines if words[0] == wanted), None)


def listen(address: str, port: int) -> int:
    """A listening socket on one address of this node.

    Returns:
        The descriptor.

    Raises:
        OSError: it cannot listen there.
    """
    family, kind, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(1024)
        return listener.detach()


def listen_where_reached(host: str, port: int) -> int:
    """A listening socket on the address of this node that ``host`` means for others.

    It is on all addresses where this node cannot know that one: its name is loopback in its own /etc/hosts, or others
    reach it by an address that is not its own (behind a translation of addresses).

    Returns:
        The descriptor.

    Raises:
        OSError: it cannot listen on that port.
    """
    address = address_towards(host, port)
    named = host != "localhost" and not is_loopback(host)
    everywhere = "::" if ":" in (address or host) else "0.0.0.0"
    try:
        return listen(everywhere if named and address is not None and is_loopback(address) else host, port)
    except OSError as e:
        if e.errno != errno.EADDRNOTAVAIL:
            raise
        return listen(everywhere, port)


def resolved(host: str) -> str | None:
    """The address of a name; None where it has none yet."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return None


def answers(host: str, port: int) -> bool:
    """Whether something listens there."""
    try:
        socket.create_connection((host, port), timeout=1.0).close()
    except OSError:
        return False
    return True
