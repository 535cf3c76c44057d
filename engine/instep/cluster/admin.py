"""The admin server of all shards: it asks the admin server of each shard over a Unix socket, and answers for all.

Those check tokens and bound the rate of requests, as the admin server of a server on its own does.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncGenerator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import structlog
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from instep.config import HttpConfig
from instep.config.endpoint import is_loopback_host
from instep.frontends import CannotListen
from instep.frontends.http.admin import address, bind, close_server, make_server
from instep.frontends.http.answers import HttpError, json_answer
from instep.frontends.http.app import PATHS, error_handlers
from instep.frontends.http.metrics import CONTENT_TYPE, Families
from instep.frontends.http.security import HEALTH, Guard
from instep.server.checks import CannotServe

_ANSWER_S: Final = 5.0
"""A shard that takes longer to answer is reported as one that does not answer."""
_SILENT: Final = "it does not answer"
_PASSED_ON: Final = (b"authorization", b"last-event-id")
"""Headers of requests."""
_ALSO: Final = ("www-authenticate", "retry-after")
"""Headers of refusals."""


async def serve_admin(config: HttpConfig, sockets: Path, log: structlog.stdlib.BoundLogger) -> int:
    """Answer requests until SIGTERM or SIGINT.

    Args:
        config: where to listen.
        sockets: the folder with the Unix socket of each shard, named by its number. A shard whose file nobody listens
            at is shown as one that does not answer.
        log: the log of all.

    Returns:
        0, the exit status.

    Raises:
        CannotServe: when it cannot listen.
    """
    try:
        listener = bind(config, log)
    except CannotListen as error:
        raise CannotServe(str(error)) from None
    if listener is None:
        return 0
    host, url = address(listener)
    server = make_server(Guard(make_app(sockets, log), None, is_loopback_host(host), asks_others=True))
    await server.startup(sockets=[listener])
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    log.info("admin server", http=url)
    await ended.wait()
    await close_server(server, listener)
    return 0


def make_app(sockets: Path, log: structlog.stdlib.BoundLogger) -> ASGIApp:
    """The application for every path, of all shards and, at `/shards/K/`, of each."""

    def numbers() -> list[int]:
        return sorted(int(each.name) for each in sockets.iterdir())

    async def ask_all(request: Request) -> list[tuple[int, int, bytes]]:
        """The number of each shard, its status and its body; 0 and nothing if it does not answer."""

        async def ask(number: int) -> tuple[int, int, bytes]:
            with suppress(OSError, EOFError):
                async with asyncio.timeout(_ANSWER_S):
                    answer = _ask(sockets / str(number), "GET", request.url.path, request)
                    (status, headers), *parts = [part async for part in answer]
                    body = b"".join(parts)
                    if status in (401, 429):  # what one of them refuses, all do
                        error = json.loads(body)["error"]
                        also = {name: headers[name] for name in _ALSO if name in headers}
                        raise HttpError(status, error["code"], error["message"], also)
                    if len(body) == int(headers["content-length"]):
                        return number, status, body
            return number, 0, b""

        return await asyncio.gather(*map(ask, numbers()))

    async def health(request: Request) -> Response:
        answers = await ask_all(request)
        problems = [
            f"shard {number}: {json.loads(body)['error']['message'] if body else _SILENT}"
            for number, status, body in answers
            if status != 200
        ]
        if problems:
            raise HttpError(503, "NOT_READY", "; ".join(problems))
        return json_answer({"shards": [{"shard": number} | json.loads(body) for number, _, body in answers]})

    async def stats(request: Request) -> Response:
        answers = [(number, json.loads(body or "{}")) for number, _, body in await ask_all(request)]
        return json_answer({"shards": [{"shard": number, "ready": False} | answer for number, answer in answers]})

    async def metrics(request: Request) -> Response:
        up = GaugeMetricFamily("instep_shard_up", "1 while it answers.", labels=["shard"])
        families: dict[str, Metric] = {up.name: up}
        for number, _, body in await ask_all(request):
            up.add_metric([str(number)], bool(body))
            for own in text_string_to_metric_families(body.decode()):
                family = families.setdefault(own.name, Metric(own.name, own.documentation, own.type))
                family.samples += [each._replace(labels={"shard": str(number), **each.labels}) for each in own.samples]
        return Response(generate_latest(Families(families.values())), headers={"content-type": CONTENT_TYPE})

    async def page(request: Request) -> Response:
        return RedirectResponse(f"shards/{min(numbers(), default=0)}/")

    async def of_one(request: Request) -> Response:
        number, query = request.path_params["shard"], request.scope["query_string"].decode()
        if number not in numbers():
            raise HttpError(404, "NOT_FOUND", f"there is no shard {number} here: /api/stats lists all")
        target = f"/{quote(request.path_params['path'])}?{query}"
        answer = _ask(sockets / str(number), request.method, target, request)
        try:
            async with asyncio.timeout(_ANSWER_S):
                status, headers = await anext(answer)
        except (OSError, EOFError):
            raise HttpError(503, "NOT_READY", f"shard {number}: {_SILENT}") from None
        return StreamingResponse(answer, status, headers)

    routes = [
        *(Route(path, health) for path in HEALTH),
        Route("/metrics", metrics),
        Route("/api/stats", stats),
        Route("/", page),
        Route("/shards/{shard:int}/{path:path}", of_one),
    ]
    there = ("/", "/healthz", "/readyz", "/metrics", "/api/stats", *(f"/shards/0{path}" for path in PATHS))
    return Starlette(routes=routes, exception_handlers=error_handlers(there, log))


async def _ask(socket: Path, method: str, target: str, request: Request) -> AsyncGenerator[Any]:
    """Yield the status and the headers of an answer, and then its body in parts.

    Raises:
        OSError, EOFError: when the shard does not answer.
    """
    reader, writer = await asyncio.open_unix_connection(socket)
    with closing(writer):
        passed_on = b"".join(b"%s: %s\r\n" % each for each in request.headers.raw if each[0] in _PASSED_ON)
        writer.write(f"{method} {target} HTTP/1.0\r\nHost: localhost\r\n".encode() + passed_on + b"\r\n")
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        left_out = ("connection:", "date:")  # those of this connection
        yield int(status.split()[1]), dict(each.split(": ", 1) for each in lines if not each.startswith(left_out))
        while part := await reader.read(65_536):
            yield part
