"""The paths of the admin server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from difflib import get_close_matches
from typing import Any, Final

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from instep.frontends.http import WatchedServer
from instep.frontends.http.answers import STATIC, HttpError, bad_request, json_answer, to_json
from instep.frontends.http.events import Events
from instep.frontends.http.metrics import CONTENT_TYPE, exposition
from instep.frontends.http.status import ServerStatus
from instep.frontends.http.streams import Inspector

PATHS: Final = ("/", "/healthz", "/readyz", "/metrics", "/api/stats", "/api/history", "/api/streams", "/api/events")
_OTHER_NAMES: Final = ("/v2/health/live", "/v2/health/ready")
"""Further paths that are suggested in place of a wrong one."""


def make_app(
    server: WatchedServer, status: ServerStatus, inspector: Inspector, events: Events, log: structlog.stdlib.BoundLogger
) -> ASGIApp:
    """The application for every path. Unexpected exceptions are logged and answered with INTERNAL."""
    files = StaticFiles(directory=STATIC)

    async def alive(request: Request) -> Response:
        return json_answer({"alive": True})

    async def ready(request: Request) -> Response:
        problems = status.problems()
        if problems:
            raise HttpError(503, "NOT_READY", "; ".join(problems))
        said = {"outdated": server.outdated, "late": status.late()}
        return json_answer({"ready": True} | {name: what for name, what in said.items() if what})

    async def stats(request: Request) -> Response:
        return Response(status.stats(), media_type="application/json")

    async def history(request: Request) -> Response:
        service = inspector.service(request.query_params.get("model", ""))
        columns = []
        for name, values in service.history.columns().items():
            columns.append(b"%s:%s" % (to_json(name), to_json([float(f"{value:.13g}") for value in values])))
            await asyncio.sleep(0)
        answer = b'{"model":%s,"columns":{%s}}' % (to_json(service.name), b",".join(columns))
        return Response(answer, media_type="application/json")

    async def metrics(request: Request) -> Response:
        parts = []
        for part in exposition(server.services, server.used()):
            parts.append(part)
            await asyncio.sleep(0)
        return Response(b"".join(parts), headers={"content-type": CONTENT_TYPE})

    async def streams(request: Request) -> Response:
        return json_answer(await inspector.page(request.query_params))

    async def stream(request: Request) -> Response:
        service, name = inspector.service(request.query_params.get("model", "")), request.path_params["name"]
        record = inspector.record(service, name)
        if record is None:
            raise HttpError(404, "UNKNOWN_STREAM", f"{service.name!r} has no stream {name!r:.200}")
        return json_answer(record)

    async def listen(request: Request) -> Response:
        return events.listen(request)

    async def page(request: Request) -> Response:
        return await files.get_response(request.path_params.get("file", "index.html"), request.scope)

    handlers = error_handlers(PATHS, log)
    routes = [
        _route("/healthz", alive),
        _route("/v2/health/live", alive),
        _route("/readyz", ready),
        _route("/v2/health/ready", ready),
        _route("/api/stats", stats),
        _route("/metrics", metrics),
        _route("/api/history", history, "model"),
        _route("/api/streams", streams, "model", "prefix", "state", "limit", "cursor"),
        Route("/api/streams/", handlers[HTTPException]),  # no stream has an empty name
        _route("/api/streams/{name:path}", stream, "model"),
        _route("/api/events", listen, "model", "stream"),
        _route("/", page),
        _route("/static/{file:path}", page),
    ]
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False  # a wrong path gets a sentence
    return app


def error_handlers(paths: Sequence[str], log: structlog.stdlib.BoundLogger) -> dict[Any, Any]:
    """The answers to exceptions: HttpError, a path that is not one of these, and bugs, which are logged."""

    async def refused(request: Request, error: Any) -> Response:
        assert isinstance(error, HttpError)
        return error.response()

    async def no_such_path(request: Request, error: Any = None) -> Response:
        path = request.url.path[:80]
        close = [each for each in paths if each.endswith(path)] or get_close_matches(path, (*paths, *_OTHER_NAMES), n=1)
        meant = f"did you mean {close[0]}?" if close else f"there are {', '.join(paths)}"
        return HttpError(404, "NOT_FOUND", f"there is no path {path!r}: {meant}").response()

    async def bug(request: Request, error: Exception) -> Response:
        log.error("bug in the admin server", path=request.url.path, exc_info=error)
        return HttpError(500, "INTERNAL", "a bug in the admin server; its log says more").response()

    return {HttpError: refused, HTTPException: no_such_path, Exception: bug}


def _route(path: str, answer: Callable[[Request], Awaitable[Response]], *parameters: str) -> Route:
    """A path that accepts these query parameters and no others."""

    async def checked(request: Request) -> Response:
        for name in request.query_params:
            if name not in parameters:
                raise bad_request(f"{request.url.path:.80} has no parameter {name!r:.40}", name, parameters)
        return await answer(request)

    return Route(path, checked)
