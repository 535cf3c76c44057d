"""SIGHUP: the configuration is read again, and whatever can change while the server runs does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import structlog

from instep.config import Config, ConfigError
from instep.server.log import Threshold
from instep.server.server import Server

CHANGEABLE: Final = (
    "limits.max_idle_s",
    "limits.first_frame_s",
    "limits.park_s",
    "limits.max_parked_streams",
    "limits.parked_make_room",
    "limits.hibernate_after_s",
    "limits.max_hibernated_streams",
    "limits.max_buffered_bytes",
    "limits.unreachable_after_s",
    "recording.warn_free_bytes",
    "shutdown.drain_timeout_s",
    "log.level",
    "log.summary_s",
)
"""Every other key is used once, at the start: to allocate memory, to bind the socket, to open the recording."""


def reload(
    server: Server, reread: Callable[[], Config], threshold: Threshold, log: structlog.stdlib.BoundLogger
) -> None:
    """Read the configuration again and use what can change of it; a broken one changes nothing.

    Args:
        server: which serves.
        reread: reads the configuration; raises ConfigError.
        threshold: the level of the log.
        log: where it says what has changed, at whatever level.
    """
    running, level = server.config, threshold.level
    threshold.level = "info"  # whoever sent the signal is told what came of it
    try:
        wanted = reread()
        changed = {path: (before, after) for path, before, after in _differences(running, wanted)}
        server.configure(with_changes(running, wanted))
        level = wanted.log.level
        log.info(
            "reloaded",
            changed=[f"{path}: {before} → {after}" for path, (before, after) in changed.items() if path in CHANGEABLE],
        )
        if left := [path for path in changed if path not in CHANGEABLE]:
            log.warning("restart needed", keys=left, reason="these have changed, and are read at the start only")
    except ConfigError as error:
        for problem in error.problems:
            log.error("not reloaded", reason=str(problem))
    finally:
        threshold.level = level


def with_changes(running: Config, wanted: Config) -> Config:
    """The running configuration with the wanted values of the keys that can change."""
    for path in CHANGEABLE:
        name, key = path.split(".")
        section = getattr(running, name).model_copy(update={key: getattr(getattr(wanted, name), key)})
        running = running.model_copy(update={name: section})
    return running


def _differences(one: Config, other: Config) -> Iterator[tuple[str, Any, Any]]:
    for name, section in one:
        for key, value in section:
            found = getattr(getattr(other, name), key)
            if found != value:
                yield f"{name}.{key}", value, found
