"""Endpoints that a client may connect to, and whether anything listens there."""

from __future__ import annotations

import asyncio
import re
import socket
from typing import Any, Final

from instep_client.protocol.errors import ConnectionFailed, InvalidInput

_TCP: Final = re.compile(r"tcp://(?P<host>[^\s/*]+):(?P<port>\*|[0-9]{1,5})")
_HTTP: Final = re.compile(r"https?://(?P<host>[^\s/:][^\s/]*?)(:[0-9]*)?(/.*)?")
_ADDRESS: Final = re.compile(r"[^\s:/*]+:[0-9]{1,5}")
EXAMPLES: Final = "tcp://127.0.0.1:5757 or ipc:///path"
DEFAULT_PORT: Final = 5757
"""The default port of the ZeroMQ endpoint."""
DEFAULT_HTTP_PORT: Final = 5780


def checked_endpoint(endpoint: str) -> str:
    """The endpoint, when it is `tcp://HOST:PORT` or `ipc://PATH`.

    Raises:
        InvalidInput: with the expected form.
    """
    if isinstance(endpoint, str):
        match = _TCP.fullmatch(endpoint)
        if match is not None and match["port"] != "*" and 1 <= int(match["port"]) <= 65_535:
            return endpoint
        if match is not None:
            raise InvalidInput(
                f"{endpoint!r} is not an endpoint: write the port that the server has, 1 to 65535; a server with "
                "port 0 logs the port that it took"
            )
        if re.fullmatch(r"ipc://\S.*", endpoint):
            return endpoint
        if (http := _HTTP.fullmatch(endpoint)) is not None:
            raise InvalidInput(
                f"{endpoint!r} is an endpoint of HTTP, for browsers and metrics: write that of ZeroMQ, "
                f"tcp://{http['host']}:{DEFAULT_PORT} unless the server has another port"
            )
        address = endpoint.partition("://")[2] or endpoint
        if _ADDRESS.fullmatch(address) and not endpoint.startswith("tcp://"):
            raise InvalidInput(f"{endpoint!r} is not an endpoint: write tcp://{address}")
    raise InvalidInput(f"{endpoint!r} is not an endpoint: write {EXAMPLES}")


async def nothing_listens(endpoint: str) -> bool:
    """Whether the operating system says that connections to an endpoint are refused, or that its file is missing.

    ZeroMQ does not tell: it tries again for ever. What can only be seen by waiting, as a host that drops packets, is
    not waited for here for longer than the system takes.

    Raises:
        ConnectionFailed: if the host name is unknown.
    """
    loop = asyncio.get_running_loop()
    addresses: list[tuple[int, Any]]
    if endpoint.startswith("ipc://"):
        path = endpoint.removeprefix("ipc://")
        addresses = [(socket.AF_UNIX, f"\0{path[1:]}" if path.startswith("@") else path)]
    else:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        try:
            found = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            if ";" not in host and getattr(error, "errno", None) == socket.EAI_NONAME:
                raise ConnectionFailed(
                    f"the host name in {endpoint} is not known on this machine: correct the endpoint"
                ) from None
            return False  # ZeroMQ may know more forms, as `eth0;host:port`, and some failures pass
        addresses = [(family, address) for family, _, _, _, address in found]
    is_refused = False
    for family, address in addresses:
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setblocking(False)
                await loop.sock_connect(probe, address)
                return False
        except (ConnectionRefusedError, FileNotFoundError):
            is_refused = True
        except OSError:  # an address family that this machine does not have
            continue
    return is_refused
