"""The admin server of all shards: it asks the admin server of each shard over a Unix socket, and answers for all."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import closing, suppress
from html import escape
from pathlib import Path
from typing import Any, Final, TypeAlias

import structlog
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from instep.config import HttpConfig
from instep.config.endpoint import is_loopback_host
from instep.frontends import CannotListen
from instep.frontends.http.admin import address, bind, close_server, make_server
from instep.frontends.http.answers import STATIC, HttpError, json_answer
from instep.frontends.http.app import PATHS, error_handlers
from instep.frontends.http.metrics import CONTENT_TYPE
from instep.frontends.http.security import HEALTH, Guard, read_tokens
from instep.server.checks import CannotServe
from instep_client.protocol.errors import InvalidInput

_ANSWER_S: Final = 5.0
"""A shard that takes longer to answer is reported as one that does not answer."""
_SILENT: Final = "it does not answer"
_UP: Final = b"# HELP instep_shard_up 1 while it answers.\n# TYPE instep_shard_up gauge\ninstep_shard_up %d\n"
_FAMILY: Final = re.compile(rb"(# HELP .*\n# TYPE .*\n)((?:\w.*\n)*)")
_PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="2"><title>instep</title>
<link rel="icon" href="static/icon.svg" type="image/svg+xml"><link rel="stylesheet" href="static/style.css"></head>
<body><main><div class="panel"><table><thead><tr><th>Shard</th><th>Endpoint</th><th>State</th><th>Streams</th>
<th>Connections</th><th>Frames waiting</th><th>Frames, total</th></tr></thead><tbody>%s</tbody></table></div></main>
</body></html>
"""


Numbers: TypeAlias = Callable[[], Collection[int]]


async def serve_admin(config: HttpConfig, numbers: Numbers, sockets: Path, log: structlog.stdlib.BoundLogger) -> int:
    """Answer requests until SIGTERM or SIGINT; SIGHUP reads the tokens again.

    Args:
        config: the endpoint and the file of tokens.
        numbers: gives the numbers of the shards to be shown.
        sockets: the folder with the Unix socket of each shard, named by its number.
        log: the log of all.

    Returns:
        0, the exit status.

    Raises:
        CannotServe: when it cannot listen.
    """
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    try:
        if (listener := bind(config, log)) is None:
            return 0
        host, url = address(listener)
        guard = Guard(make_app(numbers, sockets, log), read_tokens(config), is_loopback_host(host))
    except (CannotListen, InvalidInput) as error:
        raise CannotServe(str(error)) from None
    server = make_server(guard)

    def reload() -> None:
        try:
            tokens = read_tokens(config)
        except InvalidInput as error:
            log.error("not reloaded", reason=str(error))
            return
        if tokens is not None:
            log.info("tokens reloaded", tokens=len(tokens))
        if tokens != guard.tokens:
            guard.tokens = tokens
            for connection in list(server.server_state.connections):
                connection.transport.abort()  # it may have shown a token that was withdrawn

    await server.startup(sockets=[listener])
    for number, call in ((signal.SIGINT, ended.set), (signal.SIGTERM, ended.set), (signal.SIGHUP, reload)):
        loop.add_signal_handler(number, call)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    log.info("admin server", http=url)
    await ended.wait()
    await close_server(server, listener)
    return 0


def make_app(numbers: Numbers, sockets: Path, log: structlog.stdlib.BoundLogger) -> ASGIApp:
    """The application for every path, of all shards and, at `/shards/K/`, of each."""

    async def ask_all(target: str) -> list[tuple[int, int, bytes]]:
        """The number of each shard, its status and its body; 0 and {} if it does not answer."""

        async def ask(number: int) -> tuple[int, int, bytes]:
            with suppress(OSError, EOFError):
                async with asyncio.timeout(_ANSWER_S):
                    answer = _ask(sockets / str(number), target.encode())
                    (status, headers), *parts = [part async for part in answer]
                    if len(body := b"".join(parts)) == int(headers["content-length"]):
                        return number, status, body
            return number, 0, b"{}"

        return await asyncio.gather(*map(ask, numbers()))

    async def health(request: Request) -> Response:
        answers = await ask_all(request.url.path)
        problems = [
            f"shard {number}: {json.loads(body)['error']['message'] if status else _SILENT}"
            for number, status, body in answers
            if status != 200
        ]
        if problems:
            raise HttpError(503, "NOT_READY", "; ".join(problems))
        return json_answer({"shards": [{"shard": number} | json.loads(body) for number, _, body in answers]})

    async def all_stats() -> list[dict[str, Any]]:
        return [{"shard": each, "ready": False} | json.loads(body) for each, _, body in await ask_all("/api/stats")]

    async def stats(request: Request) -> Response:
        return json_answer({"shards": await all_stats()})

    async def page(request: Request) -> Response:
        return HTMLResponse(_PAGE % "".join(map(_row, await all_stats())))

    async def metrics(request: Request) -> Response:
        families: dict[bytes, bytes] = {}
        for number, status, body in await ask_all("/metrics"):
            for head, samples in _FAMILY.findall(_UP % bool(status) + body):
                labelled = re.sub(rb"(?m)^(\w+)\{", rb'\1{shard="%d",' % number, samples)
                labelled = re.sub(rb"(?m)^(\w+) ", rb'\1{shard="%d"} ' % number, labelled)
                families[head] = families.get(head, b"") + labelled
        return Response(b"".join(head + samples for head, samples in families.items()), media_type=CONTENT_TYPE)

    async def of_one(request: Request) -> Response:
        number, scope = request.path_params["shard"], request.scope
        if number not in numbers():
            raise HttpError(404, "NOT_FOUND", f"there is no shard {number} here: / lists all")
        target = b"/" + scope["raw_path"].split(b"/", 3)[3] + b"?" + scope["query_string"]
        answer = _ask(sockets / str(number), target, request.method, request.headers.get("last-event-id", ""))
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
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    there = ("/", "/healthz", "/readyz", "/metrics", "/api/stats", *(f"/shards/0{path}" for path in PATHS))
    return Starlette(routes=routes, exception_handlers=error_handlers(there, log))


async def _ask(path: Path, target: bytes, method: str = "GET", last_event: str = "") -> AsyncGenerator[Any]:
    """Yield the status and the headers of an answer, and then its body in parts.

    Raises:
        OSError, EOFError: when the shard does not answer.
    """
    reader, writer = await asyncio.open_unix_connection(path)
    with closing(writer):
        also = f"Last-Event-ID: {last_event}\r\n" if last_event.isdecimal() else ""
        writer.write(b"%s %s HTTP/1.0\r\nHost: localhost\r\n%s\r\n" % (method.encode(), target, also.encode()))
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        left_out = ("connection:", "date:")  # those of this connection
        yield int(status.split()[1]), dict(each.split(": ", 1) for each in lines if not each.startswith(left_out))
        while part := await reader.read(65_536):
            yield part


def _row(stats: dict[str, Any]) -> str:
    number, models = stats["shard"], stats.get("models", [])
    state = "ready" if stats["ready"] else "not ready" if models else "no answer"
    names = ("streams_open", "connections", "frames_pending", "frames_total")
    numbers = [f"{sum(each['numbers'][name] for each in models):,.0f}" for name in names]
    cells = [f'<a href="shards/{number}/">{number}</a>', escape(stats.get("endpoint", "")), state, *numbers]
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
