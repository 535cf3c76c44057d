"""Answers: JSON, errors that are one sentence each, and the files of the page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, Final

from starlette.responses import Response

from instep_tools.words import finite

STATIC: Final = Path(__file__).with_name("static")


class HttpError(Exception):
    """The answer to a request that fails: a status, a code for programs, and a sentence for people."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers

    def response(self) -> Response:
        """The error as an answer."""
        return json_answer({"error": {"code": self.code, "message": str(self)}}, self.status, self.headers)


def bad_request(problem: str, wrong: str, known: Sequence[str]) -> HttpError:
    """The error for a value in the query that is not among the known ones."""
    return HttpError(400, "BAD_REQUEST", f"{problem}: {meant(wrong, known)}")


def meant(wrong: str, known: Sequence[str]) -> str:
    """The known value that a wrong one resembles, or the first 20."""
    if close := get_close_matches(wrong[:120], known, n=1):
        return f"did you mean {close[0]!r}?"
    return f"there is {', '.join(map(repr, islice(known, 20))) or 'none'}"


def json_answer(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in JSON."""
    return Response(to_json(value), status, headers, "application/json")


def to_json(value: Any) -> bytes:
    """Compact UTF-8; numbers that are not finite become null, because JSON cannot represent them."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode(errors="replace")
