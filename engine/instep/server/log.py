"""How the server logs: lines for people or for machines, on standard error."""

from __future__ import annotations

import logging
import sys

import structlog

from instep.config import LogConfig


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
            renderer,
        ],
    )
    return logger
