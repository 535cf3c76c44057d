"""How the server logs: lines for people or for machines, on standard error."""

from __future__ import annotations

import logging
import sys

import structlog

from instep.config import LogConfig

_FIRST = ("timestamp", "level", "event")


def _what_and_when_first(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    return {key: event[key] for key in _FIRST} | dict(event)


def make_log(config: LogConfig) -> structlog.stdlib.BoundLogger:
    """A logger of its own; nothing global is changed."""
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if config.format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), sort_keys=False)
    )
    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        structlog.PrintLogger(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, config.level.upper())),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _what_and_when_first,
            renderer,
        ],
    )
    return logger
