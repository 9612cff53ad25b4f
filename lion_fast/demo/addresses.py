"""The address that the page's server listens on, checked before anything is loaded."""

import errno
import socket
import threading
from typing import Any

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
    """
    if port is not None and not 1 <= port <= 65535:
        raise ValueError(f"port: expected 1 to 65535, got {port}")
    family, address = _resolve(host)
    for candidate in PORTS if port is None else (port,):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, candidate))
                probe.listen(1)
                return address, candidate
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                if error.errno == errno.EACCES:
                    raise ValueError(f"port: expected one that this user may listen on, got {candidate}") from error
                raise ValueError(
                    f"host: expected an address of this machine, got {host!r} ({error.strerror})"
                ) from error
    taken = f"{PORTS[0]} to {PORTS[-1]}, which are all taken" if port is None else f"{port}, which is taken"
    raise ValueError(f"port: expected a free port, got {taken}")


def _resolve(host: str) -> tuple[socket.AddressFamily, str]:
    name = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not name.strip():  # for the socket, it would mean every address
        raise ValueError(f"host: expected an address or a name of this machine, got {host!r}")
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
        raise ValueError(f"host: expected an address or a name of this machine, got {host!r} ({reason})")
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return family, address[0]
