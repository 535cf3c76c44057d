"""Endpoints that a client may connect to."""

from __future__ import annotations

import re
from typing import Final

from instep_client.protocol.errors import InvalidInput

_TCP: Final = re.compile(r"tcp://(?P<host>[^\s/*]+):(?P<port>\d{1,5})")
_ADDRESS: Final = re.compile(r"[^\s:/*]+:\d{1,5}")
EXAMPLES: Final = "tcp://127.0.0.1:5757 or ipc:///path"


def checked_endpoint(endpoint: str) -> str:
    """The endpoint, when it is `tcp://HOST:PORT` or `ipc://PATH`.

    Raises:
        InvalidInput: saying what to write instead.
    """
    if isinstance(endpoint, str):
        match = _TCP.fullmatch(endpoint)
        if match is not None and 1 <= int(match["port"]) <= 65_535:
            return endpoint
        if re.fullmatch(r"ipc://\S.*", endpoint):
            return endpoint
        address = endpoint.partition("://")[2] or endpoint
        if _ADDRESS.fullmatch(address) and not endpoint.startswith("tcp://"):
            raise InvalidInput(f"{endpoint!r} is not an endpoint: write tcp://{address}")
    raise InvalidInput(f"{endpoint!r} is not an endpoint: write {EXAMPLES}")
