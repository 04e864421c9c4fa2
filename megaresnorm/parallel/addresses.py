"""The address by which other nodes reach this one."""

import socket

ELSEWHERE = "192.0.2.1"  # an address that no host has (RFC 5737)


def local_address_of(host: str, port: int) -> str | None:
    """The address by which other nodes reach this one: the local end of its route to ``host``.

    Where /etc/hosts of this node maps the name to loopback, as Debian does with the node's own name, that route says
    nothing; then it is the address of the default route.

    Returns:
        None where the name cannot be resolved yet.
    """
    address = address_towards(host, port)
    named = host != "localhost" and not _is_loopback(host)
    return address_towards(ELSEWHERE, port) if named and address is not None and _is_loopback(address) else address


def _is_loopback(address: str) -> bool:
    return address == "::1" or address.startswith("127.")


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
