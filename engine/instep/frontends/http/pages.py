"""The files of the page, which are part of the package; they are in memory, so no request leads to another file."""

from __future__ import annotations

import hashlib
import mimetypes
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from instep.frontends.http.answers import HttpError

STATIC: Final = Path(__file__).with_name("static")


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str
    etag: str


class Pages:
    """Every file below a folder; `/` is its index.html."""

    def __init__(self, folder: Path = STATIC) -> None:
        self._files = {
            f"/static/{path.relative_to(folder).as_posix()}": _read(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.startswith(".")
        }
        if (index := self._files.get("/static/index.html")) is not None:
            self._files["/"] = index

    def answer(self, request: Request) -> Response:
        """The file, or that the browser has it already."""
        file = self._files.get(request.url.path)
        if file is None:
            raise HttpError(404, "NOT_FOUND", f"there is no file {request.url.path[:80]!r}: the page is at /")
        headers = {"etag": file.etag, "cache-control": "no-cache"}  # it is asked for, and sent if it has changed
        if request.headers.get("if-none-match") == file.etag:
            return Response(status_code=304, headers=headers)
        return Response(file.content, headers=headers, media_type=file.media_type)


def _read(path: Path) -> _File:
    content = path.read_bytes()
    media_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return _File(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:16]}"')
