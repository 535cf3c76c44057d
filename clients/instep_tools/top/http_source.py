"""Snapshots over HTTP: /api/stats and /api/streams of the server's HTTP endpoint."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlencode, urlsplit

from instep_client.endpoint import DEFAULT_HTTP_PORT
from instep_client.protocol.errors import ConnectionFailed, InstepError, InvalidInput
from instep_tools.connect import PATIENCE_S
from instep_tools.top.snapshot import ModelTotals, Numbers, ObservedModel, ObservedStream, Snapshot, StreamQuery, select

MOST_BYTES: Final = 64 * 2**20
"""Of one answer."""
_ZEROMQ: Final = b"\xff"
"""How a ZeroMQ endpoint begins, without being asked; it would then wait for ever."""


class HttpProblem(InstepError):
    """The server answers over HTTP, and not with what was asked for; a sentence on why."""


class HttpSource:
    """One connection for each request, without proxies and redirects: the token goes to the named server only.

    Args:
        endpoint: http:// or https://, with a host, perhaps a port, and a path where a proxy serves it under one.
        token: what the server asks for where it can be reached from other machines.

    Raises:
        InvalidInput: the endpoint is not a URL of that form.
    """

    def __init__(self, endpoint: str, token: str | None = None) -> None:
        self.endpoint = checked_url(endpoint)
        url = urlsplit(self.endpoint)
        self._host, self._path = url.hostname or "", url.path
        self._is_secure = url.scheme == "https"
        self._port = url.port or (443 if self._is_secure else 80)
        self._headers = f"Host: {url.netloc}\r\nAccept: application/json\r\n"
        if token:
            self._headers += f"Authorization: Bearer {token}\r\n"

    async def read(self, query: StreamQuery) -> Snapshot:
        """Ask the server.

        Raises:
            ConnectionFailed: nobody answers.
            HttpProblem: it has no such model, wants a token, or is no instep server.
        """
        stats = await self._get("/api/stats")
        try:
            model = _chosen(stats["models"], query.model)
            asked = {
                "model": model["name"],
                "contains": query.contains,
                "state": query.state,
                "sort": "-" * query.descending + query.sort,
                "limit": str(query.limit),
            }
            listed = await self._get("/api/streams?" + urlencode({name: text for name, text in asked.items() if text}))
            return _snapshot(stats, query, model, listed)
        except (KeyError, TypeError, ValueError) as error:
            raise HttpProblem(f"{self.endpoint} does not answer as an instep server ({error!r:.60})") from None

    async def close(self) -> None:
        """Do nothing: no connection is kept."""

    async def _get(self, path: str) -> Any:
        try:
            async with asyncio.timeout(PATIENCE_S):
                answer = await self._exchange(f"GET {self._path}{path} HTTP/1.0\r\n{self._headers}\r\n")
        except TimeoutError:
            raise ConnectionFailed(f"nobody answers at {self.endpoint} within {PATIENCE_S:g} s") from None
        except (OSError, UnicodeError) as error:  # the latter of a host whose name cannot be one
            raise ConnectionFailed(f"nobody answers at {self.endpoint}: {_reason(error)}") from None
        head, _, body = answer.partition(b"\r\n\r\n")
        status = re.match(rb"HTTP/1\.\d (\d{3})", head)
        if status is None:
            what = "is a ZeroMQ endpoint" if answer.startswith(_ZEROMQ) else "does not speak HTTP"
            host = f"[{self._host}]" if ":" in self._host else self._host
            raise HttpProblem(
                f"{self.endpoint} {what}: write tcp://{host}:{self._port} if that is the server's port for ZeroMQ, or "
                f"its port for HTTP, http://{host}:{DEFAULT_HTTP_PORT} by default"
            )
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            found = None
        if status[1] == b"200" and found is not None:
            return found
        if status[1] == b"401":
            wants = "takes another token" if "Authorization" in self._headers else "wants a token"
            raise HttpProblem(f"{self.endpoint} {wants}: name the file that holds it with --token-file")
        raise HttpProblem(f"{self.endpoint} answers {status[1].decode()}: {_sentence(found) or 'not an instep server'}")

    async def _exchange(self, request: str) -> bytes:
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._is_secure or None)
        try:
            writer.write(request.encode())
            answer = bytearray()
            while not answer.startswith(_ZEROMQ) and (part := await reader.read(2**16)):
                answer += part
                if len(answer) > MOST_BYTES:
                    raise ConnectionFailed(f"{self.endpoint} does not end its answer")
            return bytes(answer)
        finally:
            writer.close()


def checked_url(endpoint: str) -> str:
    """The URL, when it is `http://HOST:PORT` or `https://HOST`.

    Raises:
        InvalidInput: saying what to write instead.
    """
    try:
        url = urlsplit(endpoint)
        if url.scheme in ("http", "https") and url.hostname and url.port != 0 and not (url.query or url.username):
            return endpoint.rstrip("/")
    except ValueError:
        pass
    raise InvalidInput(f"{endpoint!r} is not an endpoint: write http://HOST:PORT")


def _reason(error: Exception) -> str:
    """Why there is no connection, without numbers and addresses: asyncio has them, uvloop has not."""
    if number := re.search(r"\[Errno (\d+)\]", str(error)):
        return os.strerror(int(number[1]))
    return getattr(error, "strerror", None) or str(error)


def _chosen(models: list[dict[str, Any]], name: str) -> dict[str, Any]:
    for model in models:
        if name in ("", model["name"]):
            return model
    raise HttpProblem(f"there is no model {name!r}; the server has {', '.join(model['name'] for model in models)}")


def _sentence(found: Any) -> str:
    error = found.get("error") if isinstance(found, dict) else None
    return str(error.get("message", "")) if isinstance(error, dict) else ""


def _snapshot(
    stats: Mapping[str, Any], query: StreamQuery, model: Mapping[str, Any], listed: Mapping[str, Any]
) -> Snapshot:
    streams = [
        ObservedStream(**_some(each, "name", "state", "rate", "seq", "pending", "idle_s", "expires_in_s"))
        for each in listed["streams"]
    ]
    return Snapshot(
        time_s=stats["time_s"],  # it may be some tenths of a second old: the server answers everybody with one object
        query=query,
        models=[_totals(each["name"], each["numbers"]) for each in stats["models"]],
        model=ObservedModel(
            **_some(model, "name", "fingerprint", "features", "outputs", "device", "exactness", "arithmetic"),
            **_some(model, "max_streams", "durability"),
            numbers=Numbers(
                {name: math.nan if value is None else float(value) for name, value in model["numbers"].items()}
            ),
        ),
        streams=select(streams, query)[0],  # those that are equal come in another order
        matched=listed["matched"],
    )


def _some(record: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: record[name] for name in names}


def _totals(name: str, numbers: Mapping[str, float]) -> ModelTotals:
    streams = numbers["streams_open"] + numbers["streams_hibernated"]
    return ModelTotals(name, int(streams), int(numbers["connections"]), int(numbers["frames_total"]))
