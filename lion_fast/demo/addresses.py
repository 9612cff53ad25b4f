"""The address that the page's server listens on, checked before anything is loaded."""

import errno
import ipaddress
import socket
import threading
from typing import Any

from lion_fast.io.reading import shown

PORTS = range(7860, 7960)
"""Ports that are tried if none is given."""

_PATIENCE = 10.0  # seconds for the name server's answer


def find_address(host: str, port: int | None = None) -> tuple[str, int]:
    """Return the IP address and a free port to listen on.

    Args:
        host: IP address of this machine, with or without the brackets of IPv6, or a name of it.
        port: 1 to 65535; None for the first free one of `PORTS`.

    Raises:
        ValueError: the host is empty, unknown or not this machine's, or the port is not a port or is taken.
        TypeError: the port is no integer.
    """
    if port is not None and (not isinstance(port, int) or isinstance(port, bool)):
        raise TypeError(f"port: expected 1 to 65535, got {shown(port)}")
    if port is not None and not 1 <= port <= 65535:
        raise ValueError(f"port: expected 1 to 65535, got {port}")
    family, address = _resolve(host)
    for candidate in PORTS if port is None else (port,):
        try:
            _try(family, address, candidate)
            _try(socket.AF_INET, "127.0.0.1", candidate)  # Gradio asks for it to be free there, wherever it listens
            return address, candidate
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                continue
            if error.errno == errno.EACCES:
                raise ValueError(f"port: expected one that this user may listen on, got {candidate}") from error
            raise ValueError(
                f"host: expected an address of this machine, got {shown(host)} ({error.strerror})"
            ) from error
    taken = f"{PORTS[0]} to {PORTS[-1]}, which are all taken" if port is None else f"{port}, which is taken"
    raise ValueError(f"port: expected a free port, got {taken}")


def _try(family: socket.AddressFamily, address: str, port: int) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((address, port))
        probe.listen(1)


def _resolve(host: str) -> tuple[socket.AddressFamily, str]:
    name = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not name.strip():  # for the socket, it would mean every address
        raise ValueError(f"host: expected an address or a name of this machine, got {shown(host)}")
    found: list[Any] = []

    def look_up() -> None:
        try:
            found.extend(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            found.append(error)

    lookup = threading.Thread(target=look_up, daemon=True)  # it cannot be interrupted
    lookup.start()
    lookup.join(_PATIENCE)
    if not found or isinstance(found[0], Exception):
        reason = found[0].args[-1] if found else "no answer"
        raise ValueError(f"host: expected an address or a name of this machine, got {shown(host)} ({reason})")
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return _plain(host, family, address[0])


def _plain(host: str, family: socket.AddressFamily, address: str) -> tuple[socket.AddressFamily, str]:
    """Return an address that a page can have, IPv4 as such."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        family, found = socket.AF_INET, found.ipv4_mapped
    if found.is_multicast or str(found) == "255.255.255.255":
        raise ValueError(f"host: expected an address of this machine, got {shown(host)}, which is that of a group")
    if found.version == 6 and found.is_link_local:
        raise ValueError(
            f"host: expected an address that browsers can open, got {shown(host)}, which is link-local; :: listens on "
            "every address"
        )
    return family, str(found)
