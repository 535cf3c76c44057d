"""The server's log, for people or for programs, on standard error or in a file."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from pathlib import Path
from typing import Any, Final

import structlog

from instep.config import LogConfig

_LEVELS: Final = ("debug", "info", "warning", "error")
_FIRST: Final = ("timestamp", "level", "event")
_COLOURS: Final = {"debug": "\x1b[2m", "info": "\x1b[32m", "warning": "\x1b[33m", "error": "\x1b[31m"}
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class Threshold:
    """Drops lines below a level, which may change while the server runs."""

    def __init__(self, level: str) -> None:
        self.level = level

    def __call__(self, logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        """A processor of structlog."""
        if _LEVELS.index(method) < _LEVELS.index(self.level):
            raise structlog.DropEvent
        return event


def make_log(
    config: LogConfig, threshold: Threshold | None = None, audit: structlog.typing.Processor | None = None
) -> structlog.stdlib.BoundLogger:
    """Make a logger without changing global state.

    A `threshold` replaces the level in `config`; the `audit` sees lines of every level.

    Raises:
        OSError: when the file cannot be written.
    """
    colours = config.file is None and sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    time_format, renderer = (
        ("iso", structlog.processors.JSONRenderer())
        if config.format == "json"
        else ("%Y-%m-%dT%H:%M:%SZ", _LinesForPeople(coloured=colours))
    )
    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        _StandardError() if config.file is None else _LogFile(config.file),
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        processors=[
            *([] if audit is None else [audit]),
            threshold or Threshold(config.level),
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt=time_format, utc=True),
            structlog.processors.format_exc_info,
            _what_and_when_first,
            renderer,
        ],
    ).bind()  # else each line, also one that is left out, would make a logger first
    return logger


class _StandardError:
    """Writes lines, and drops them after an error such as a full disk, a broken pipe or a closed terminal."""

    def msg(self, line: str) -> None:
        try:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()
        except OSError as error:
            if error.errno in (errno.EIO, errno.EPIPE):  # nobody will read it; the rest would fail again at the exit
                sys.stderr = open(os.devnull, "w")  # noqa: SIM115

    debug = info = warning = error = msg


class _LogFile:
    """Appends lines to a file, which it opens for each line, and drops them after an error."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.open("a").close()  # one that cannot be written is told now

    def msg(self, line: str) -> None:
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{line}\n")

    debug = info = warning = error = msg


def _what_and_when_first(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    return {key: event[key] for key in _FIRST} | dict(event)


class _LinesForPeople:
    """`2026-01-31T12:00:00Z info serving endpoint=tcp://127.0.0.1:5757`."""

    def __init__(self, *, coloured: bool) -> None:
        self._coloured = coloured

    def __call__(self, logger: object, method: str, event: structlog.typing.EventDict) -> str:
        values = dict(event)
        when, level, what = (values.pop(key) for key in _FIRST)
        traceback = values.pop("exception", None)
        colour, dim, plain = (_COLOURS[level], _DIM, _PLAIN) if self._coloured else ("", "", "")
        words = [f"{dim}{key}={plain}{_in_words(value)}" for key, value in values.items()]
        line = " ".join([f"{dim}{when}{plain}", f"{colour}{level}{plain}", what, *words])
        return line if traceback is None else f"{line}\n{traceback}"


def _in_words(value: Any) -> str:
    if isinstance(value, list | tuple):
        words = list(map(str, value))
        if len(words) > 4 and all(isinstance(each, int) for each in value):
            words[2:-1] = ["…"]
        value = (", " if any(" " in word for word in words) else ",").join(words) or None
    text = "none" if value is None else str(value)
    return f'"{text}"' if " " in text and '"' not in text else text
