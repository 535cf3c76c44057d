"""Checks before every path, and headers of every answer."""

from __future__ import annotations

import base64
import hmac
import re
import time
from collections.abc import Mapping
from email.utils import formatdate
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from instep.config import HttpConfig
from instep.config.endpoint import is_loopback_host
from instep.frontends import CannotListen
from instep.frontends.http.answers import HttpError
from instep.security.quotas import TokenBucket
from instep_client.key_files import read_text
from instep_client.protocol.errors import InvalidInput

DEFAULT: Final = HttpConfig().endpoint
_METHODS: Final = ("GET", "HEAD")
HEALTH: Final = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")
"""Paths that need no token: whatever looks after processes has none."""
_LEAST_TOKEN: Final = 16
_TOKEN_LINE: Final = re.compile(rf"((?P<name>[A-Za-z0-9._-]+):\s+)?(?P<token>[!-~]{{{_LEAST_TOKEN},}})")
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
    """Make the error for an endpoint that cannot be bound, with advice."""
    return CannotListen(
        f"the admin server cannot listen at http.endpoint {endpoint}: {error.strerror}; choose another port (--http "
        "127.0.0.1:0 takes a free one), or none (--http off)"
    )


def read_tokens(config: HttpConfig) -> dict[str, str] | None:
    """The tokens that requests have to show, by name; None without a token file or without an admin server.

    Raises:
        InvalidInput: when the file does not hold usable tokens.
    """
    file = config.token_file
    if config.endpoint is None or file is None:
        return None
    lines = [line for line in map(str.strip, read_text(file)[0].splitlines()) if line]
    found = [_TOKEN_LINE.fullmatch(line) for line in lines]
    tokens = {line["name"] or "": line["token"] for line in found if line is not None}
    if not tokens or len(tokens) < len(lines):
        raise InvalidInput(
            f"http.token_file {file} does not hold tokens: lines `NAME: TOKEN` with distinct names, or a single TOKEN; "
            f"a token is at least {_LEAST_TOKEN} printable ASCII characters without spaces; make one with: "
            'python -c "import secrets; print(secrets.token_urlsafe())"'
        )
    return tokens


class Guard:
    """Answers forbidden requests with an error, and passes the others to an application.

    Args:
        app: the application.
        tokens: by name; requests have to show one of them. None if they need none.
        is_loopback: whether the server listens at a loopback address. Then the Host header must name one, or a page
            from elsewhere, whose name suddenly leads to this machine, could read everything (DNS rebinding).
        asks_others: whether the application asks other admin servers, which check tokens and bound the rate.
    """

    def __init__(
        self, app: ASGIApp, tokens: Mapping[str, str] | None, is_loopback: bool, *, asks_others: bool = False
    ) -> None:
        self.tokens = tokens
        self._app = app
        self._is_loopback = is_loopback
        self._rate = None if asks_others else TokenBucket()
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

        app, counted = self._app, scope["path"] not in HEALTH
        try:
            self._check(scope)
        except HttpError as error:
            app, counted = error.response(), False
        self._under_way += counted
        try:
            await app(scope, receive, send_safely)
        finally:
            self._under_way -= counted

    def _check(self, scope: Scope) -> None:
        headers, is_of_health = Headers(scope=scope), scope["path"] in HEALTH
        if self._under_way >= MOST_REQUESTS and not is_of_health:
            sentence = f"{MOST_REQUESTS} requests are being answered already: end one, and try again"
            raise HttpError(503, "TOO_MANY_CONNECTIONS", sentence)
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
        if is_of_health:
            return
        shown = _shown_token(headers.get("authorization", ""))
        # All are compared, so that the time tells nothing.
        equal = [_are_equal(shown, token) for token in (self.tokens or {}).values()]
        if self.tokens is not None and not any(equal):
            sentence = (
                "this needs a token of http.token_file: send `Authorization: Bearer TOKEN`, or the password TOKEN"
            )
            raise HttpError(401, "UNAUTHORIZED", sentence, {"www-authenticate": 'Basic realm="instep"'})
        if self._rate is not None and (wait_s := self._rate.take(1, REQUESTS_PER_S, BURST, time.monotonic())) > 0:
            sentence = f"more than {REQUESTS_PER_S:g} requests a second came: ask less often"
            raise HttpError(429, "TOO_MANY_REQUESTS", sentence, {"retry-after": str(int(wait_s) + 1)})


def _shown_token(authorization: str) -> str:
    """The token as programs show it, or as browsers do: as the password of a user of any name."""
    scheme, _, shown = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return shown.strip()
    try:
        return base64.b64decode(shown).decode().partition(":")[2] if scheme.lower() == "basic" else ""
    except ValueError:
        return ""


def _are_equal(shown: str, expected: str) -> bool:
    """Compare in a time that does not depend on where the texts differ."""
    return hmac.compare_digest(shown.encode(errors="replace"), expected.encode())
