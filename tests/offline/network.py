"""Lets a test process talk to itself and to nobody else.

An audit hook refuses every Python-level connection and name lookup that would leave the machine. Nothing is replaced
in the socket module, so libraries see an ordinary ConnectionError. What was refused is also appended to the file that
FINETUNE_TESTS_REFUSED names, because many libraries swallow the error and a silent attempt is a fault too.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from typing import Any

RECORD = "FINETUNE_TESTS_REFUSED"

_CONNECTS = {"socket.connect", "socket.sendto", "socket.sendmsg"}
_LOOKUPS = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}


class NetworkRefused(ConnectionError):
    """A test tried to leave this machine."""


def _is_local(host: object) -> bool:
    if isinstance(host, bytes):
        host = host.decode("ascii", "replace")
    if not isinstance(host, str) or host in ("", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host.split("%")[0]).is_loopback
    except ValueError:
        return False


def _leaves(event: str, arguments: tuple[Any, ...]) -> object | None:
    """The host that an audit event wants to reach, when that is another machine."""
    if event in _LOOKUPS:
        host = arguments[0]
        if isinstance(host, str) and host in ("0.0.0.0", "::"):
            return None  # an address to listen on
    elif event in _CONNECTS:
        address = arguments[1]
        if not isinstance(address, tuple):
            return None  # a Unix socket, or an already connected one
        host = address[0]
    else:
        return None
    return None if _is_local(host) else host


def block() -> None:
    """Refuse the network to this process for the rest of its life."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not event.startswith("socket."):
            return
        host = _leaves(event, arguments)
        if host is None:
            return
        record = os.environ.get(RECORD)
        if record:
            with open(record, "a", encoding="utf-8") as stream:
                stream.write(f"{event} {host!r} by {' '.join(sys.orig_argv)[:200]}\n")
        raise NetworkRefused(f"tests have no network: {event} to {host!r}")

    sys.addaudithook(hook)
