"""Checks before every path, and headers of every answer."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Final

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from instep.config import HttpConfig
from instep.config.endpoint import is_loopback_host
from instep.frontends import CannotListen
from instep.frontends.http.answers import HttpError

DEFAULT: Final = HttpConfig().endpoint
_METHODS: Final = ("GET", "HEAD")
_HEALTH: Final = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")
"""Paths that need no token: whatever looks after processes has none."""
_PAGE: Final = "/"
_LEAST_TOKEN: Final = 16
_MOST_TOKEN_BYTES: Final = 4096
MOST_REQUESTS: Final = 64
"""Requests under way at a time, those for health not counted."""
KEPT_FOR_HEALTH: Final = 8
"""Connections beyond those."""
REQUESTS_PER_S: Final = 50.0
BURST: Final = 200.0
"""All clients share this rate. Requests that are refused are not counted, so that nobody without the token can use it
up; neither are health checks, because a supervisor must always get an answer."""
_HOST: Final = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?")
_HEADERS: Final = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


def cannot_listen(endpoint: str, error: OSError) -> CannotListen:
    """Why an endpoint cannot be bound, and what to do."""
    return CannotListen(
        f"the admin server cannot listen at http.endpoint {endpoint}: {error.strerror}; choose another port (--http "
        "127.0.0.1:0 takes a free one), or none (--http off)"
    )


def read_token(config: HttpConfig) -> str | None:
    """The token that requests have to show; None without a token file or without an admin server.

    Raises:
        CannotListen: when the file does not hold a usable token.
    """
    file = config.token_file
    if config.endpoint is None or file is None:
        return None
    advice = 'make one with: python -c "import secrets; print(secrets.token_urlsafe())"'
    try:
        with file.open("rb") as stream:
            content = stream.read(_MOST_TOKEN_BYTES + 1)
        token = content.decode("ascii").strip()
    except OSError as error:
        raise CannotListen(f"http.token_file {file} cannot be read: {error.strerror}; {advice}") from None
    except UnicodeDecodeError:
        token = ""
    if not re.fullmatch(rf"[!-~]{{{_LEAST_TOKEN},{_MOST_TOKEN_BYTES}}}", token):
        raise CannotListen(
            f"http.token_file {file} does not hold a token: one line of at least {_LEAST_TOKEN} printable ASCII "
            f"characters without spaces; {advice}"
        )
    return token


class Guard:
    """Answers what may not pass with an error, and lets the rest pass.

    Args:
        app: what is behind it.
        token: what requests have to show; None where they need not.
        is_loopback: whether the server listens at a loopback address. Then the Host header must name one, or a page
            from elsewhere, whose name suddenly leads to this machine, could read everything (DNS rebinding).
        port: where the server listens; browsers share cookies between the ports of a host.
    """

    def __init__(self, app: ASGIApp, token: str | None, is_loopback: bool, port: int) -> None:
        self._app = app
        self._token = token
        self._is_loopback = is_loopback
        self._cookie = f"instep_{port}"
        self._rate = RateLimit(time.monotonic)
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers["date"] = formatdate(usegmt=True)
                headers.setdefault("cache-control", "no-cache" if scope["path"].startswith("/static/") else "no-store")
            await send(message)

        try:
            answer = self._check(scope)
        except HttpError as error:
            is_read = scope["path"] == _PAGE and "text/html" in Headers(scope=scope).get("accept", "")
            answer = error.page() if is_read else error.response()
        counted = answer is None and scope["path"] not in _HEALTH
        self._under_way += counted
        try:
            await (answer or self._app)(scope, receive, send_safely)
        finally:
            self._under_way -= counted

    def _check(self, scope: Scope) -> Response | None:
        """An answer to a request that must not pass.

        Raises:
            HttpError: another one.
        """
        if scope["path"] in _HEALTH:
            return self._check_request(scope)
        if self._under_way >= MOST_REQUESTS:
            sentence = f"{MOST_REQUESTS} requests are being answered already: end one, and try again"
            raise HttpError(503, "TOO_MANY_CONNECTIONS", sentence)
        answer = self._check_request(scope)
        if (wait_s := self._rate.take()) > 0:
            sentence = f"more than {REQUESTS_PER_S:g} requests a second came: ask less often"
            raise HttpError(429, "TOO_MANY_REQUESTS", sentence, {"retry-after": str(int(wait_s) + 1)})
        return answer

    def _check_request(self, scope: Scope) -> Response | None:
        headers, path = Headers(scope=scope), scope["path"]
        if scope["method"] not in _METHODS:
            sentence = f"the admin server changes nothing: use GET or HEAD, not {scope['method']:.20}"
            raise HttpError(405, "METHOD_NOT_ALLOWED", sentence, {"allow": ", ".join(_METHODS), "connection": "close"})
        if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
            sentence = "a request has no body here: leave it out"
            raise HttpError(413, "BODY_NOT_ALLOWED", sentence, {"connection": "close"})
        if self._is_loopback:
            host = _HOST.fullmatch(headers.get("host", ""))
            if host is None or not is_loopback_host(host["host"].strip("[]")):
                sentence = "the Host header does not name this machine: use http://localhost or the address itself"
                raise HttpError(421, "WRONG_HOST", sentence)
        is_other_site = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if is_other_site and headers.get("sec-fetch-mode") != "navigate":  # what a link leads to, no page can read
            raise HttpError(403, "OTHER_SITE", "pages of other sites get no answers: open the address itself")
        return self._check_token(headers, path, scope)

    def _check_token(self, headers: Headers, path: str, scope: Scope) -> Response | None:
        if self._token is None or path in _HEALTH:
            return None
        if path == _PAGE and (shown := QueryParams(scope["query_string"]).get("token")) is not None:
            if not _are_equal(shown, self._token):
                raise _unauthorized("the token is wrong")
            # Lax, so that a link on a page of another site leads to this one; no such page can read what comes.
            cookie = f"{self._cookie}={_cookie_of(self._token)}; HttpOnly; SameSite=Lax; Path=/"
            return Response(status_code=303, headers={"location": _PAGE, "set-cookie": cookie})
        scheme, _, shown = headers.get("authorization", "").partition(" ")
        if shown:
            if scheme.lower() != "bearer" or not _are_equal(shown.strip(), self._token):
                raise _unauthorized("the token is wrong")
            return None
        if not _are_equal(_cookie_named(self._cookie, headers.get("cookie", "")), _cookie_of(self._token)):
            raise _unauthorized("this needs the token in http.token_file")
        return None


def _are_equal(shown: str, expected: str) -> bool:
    """Compared in a time that does not depend on where they differ."""
    return hmac.compare_digest(shown.encode(errors="replace"), expected.encode())


def _cookie_of(token: str) -> str:
    """The content of the cookie. Browsers send it to other servers of this host too, so it hides the token."""
    return hmac.new(token.encode(), b"instep cookie", hashlib.sha256).hexdigest()


def _cookie_named(name: str, header: str) -> str:
    """The value of a cookie, empty where there is none.

    `http.cookies` gives up at what another server of this host has put there, and takes half a second for 16 KiB
    of backslashes, in which no stream would be answered.
    """
    pairs = (pair.partition("=") for pair in header.split(";"))
    return next((value.strip() for key, _, value in pairs if key.strip() == name), "")


def _unauthorized(reason: str) -> HttpError:
    sentence = f"{reason}: send `Authorization: Bearer TOKEN`, or open /?token=TOKEN once in a browser"
    return HttpError(401, "UNAUTHORIZED", sentence, {"www-authenticate": "Bearer"})


class RateLimit:
    """A token bucket."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._left, self._counted_s = BURST, clock()

    def take(self) -> float:
        """Count a request; 0, or the seconds after which there is room for one."""
        now_s = self._clock()
        self._left = min(BURST, self._left + (now_s - self._counted_s) * REQUESTS_PER_S)
        self._counted_s = now_s
        if self._left < 1:
            return (1 - self._left) / REQUESTS_PER_S
        self._left -= 1
        return 0.0
