"""Endpoints: which are valid, and which only this machine can reach."""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Final

_LABEL: Final = "[A-Za-z0-9_-]{1,63}"  # Python's resolver raises UnicodeError for others
_HOST: Final = rf"{_LABEL}(?:\.{_LABEL})*\.?|\[[0-9A-Fa-f:.]+\]"
_TCP: Final = re.compile(rf"tcp://(?P<host>\*|{_HOST}):(?P<port>\*|[0-9]{{1,5}})")
_HTTP: Final = re.compile(rf"(?P<host>{_HOST}):(?P<port>[0-9]{{1,5}})")
_MAX_IPC_PATH_BYTES: Final = 107  # sockaddr_un


def checked_endpoint(endpoint: str) -> str:
    """Return a valid endpoint, `tcp://HOST:PORT` or `ipc://PATH`.

    Port 0 becomes `*`, ZeroMQ's sign for any free port.

    Raises:
        ValueError: with the expected form.
    """
    path = endpoint.removeprefix("ipc://")
    if path != endpoint:
        if not 1 <= len(path.encode()) <= _MAX_IPC_PATH_BYTES:
            raise ValueError(f"the path after ipc:// must be 1 to {_MAX_IPC_PATH_BYTES} bytes long")
        return endpoint
    match = _TCP.fullmatch(endpoint)
    if match is not None and match["port"] == "*":
        return endpoint
    if match is None or int(match["port"]) > 65_535:
        raise ValueError(
            f"{endpoint!r} is not an endpoint: write tcp://127.0.0.1:5757 (port 1 to 65535, or 0 for any) or ipc:///path"
        )
    return endpoint if int(match["port"]) else f"tcp://{match['host']}:*"


def is_loopback(endpoint: str) -> bool:
    """Whether only this machine can reach a checked endpoint."""
    match = _TCP.fullmatch(endpoint)
    if match is None:
        return endpoint.startswith("ipc://")
    return is_loopback_host(match["host"].strip("[]"))


def checked_http_endpoint(endpoint: object) -> object:
    """Return the admin server's endpoint, `HOST:PORT`, or None for `off`, which YAML reads as False.

    Raises:
        ValueError: with the expected form.
    """
    if endpoint is False or endpoint == "off":
        return None
    if isinstance(endpoint, str):
        match = _HTTP.fullmatch(endpoint)
        if match is None or int(match["port"]) > 65_535:
            raise ValueError(
                f"{endpoint!r} is not an endpoint: write 127.0.0.1:5780 (port 0 for any), [::1]:5780, or off"
            )
    return endpoint


def host_and_port(endpoint: str) -> tuple[str, int]:
    """Split an admin server's endpoint; an IPv6 address loses its brackets."""
    host, _, port = endpoint.rpartition(":")
    return host.strip("[]"), int(port)


def is_loopback_host(host: str) -> bool:
    """Whether only this machine can reach a host: a name, or an address without brackets."""
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name or an interface; where it leads is not known here
        return False
