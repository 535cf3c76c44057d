"""SIGHUP: the configuration is read again, and whatever can change while the server runs does."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import structlog

from instep.config import Config, ConfigError, ModelConfig
from instep.server.log import Threshold
from instep.server.server import Server

CHANGEABLE: Final = (
    "model.on_reload",
    "model.allow_other_sizes",
    "limits.max_idle_s",
    "limits.park_s",
    "limits.max_parked_streams",
    "limits.hibernate_after_s",
    "recording.warn_free_bytes",
    "shutdown.drain_timeout_s",
    "log.level",
    "log.summary_s",
)
"""Every other key is used once, at the start: to allocate memory, to bind the socket, to open the recording."""
MODELS: Final = ("model.folder",)
"""They change, too, but it takes a while: see `Loader.reload`."""

_KEPT_BYTES: Final = 2**20


class Kept:
    """The values that the newest reload has put in place, where they outlive a server that a signal kills.

    They are in memory that every process forked after this was made shares with the others.
    """

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 1 + 2 * _KEPT_BYTES)
        """Which half counts, and two halves: a process that dies while it writes one leaves the other."""

    def keep(self, config: Config) -> None:
        """Remember what can change of a configuration, the models among it."""
        half, values = 1 - self._shared[0], [_changeable(config), config.model.model_dump(mode="json")]
        self._half(half)[:] = json.dumps(values).encode().ljust(_KEPT_BYTES)
        self._shared[0] = half

    def laid_over(self, config: Config) -> Config:
        """A configuration with the values that were kept, if any were."""
        text = bytes(self._half(self._shared[0])).strip(b"\0")
        if not text:
            return config
        values, models = json.loads(text)
        return _with_values(config, values).model_copy(update={"model": ModelConfig.model_validate(models)})

    def _half(self, half: int) -> memoryview:
        return memoryview(self._shared)[1:][half * _KEPT_BYTES :][:_KEPT_BYTES]


def reload(
    server: Server,
    reread: Callable[[], Config],
    threshold: Threshold,
    log: structlog.stdlib.BoundLogger,
    kept: Kept,
) -> None:
    """Read the configuration again and use what can change of it; a broken one changes nothing.

    The log says what has changed, at whatever level, and which changes of models are under way: whether they succeed is
    said later. `reread` raises ConfigError; `kept` gets the new values.
    """
    running, level = server.config, threshold.level
    threshold.level = "info"  # whoever sent the signal is told what came of it
    try:
        wanted = reread()
        models = {"model": server.loader.config}
        under_way = [text for path, text in differences(running.model_copy(update=models), wanted) if path in MODELS]
        server.configure(_with_values(running, _changeable(wanted)))
        server.loader.reload(wanted.model, lambda: kept.keep(server.config))
        kept.keep(wanted)
        level = wanted.log.level
        changed = dict(differences(running, wanted))
        also = {"under_way": under_way} if under_way else {}
        log.info("reloaded", changed=[changed[path] for path in changed if path in CHANGEABLE], **also)
        server.unread = ""
        if left := [path for path in changed if path not in (*CHANGEABLE, *MODELS)]:
            server.unread = f"{', '.join(left)} changed, and {'are' if left[1:] else 'is'} read at the start only"
            log.warning("restart needed", keys=left, reason="these have changed, and are read at the start only")
    except ConfigError as error:
        server.unread = "; ".join(map(str, error.problems))
        for problem in error.problems:
            log.error("not reloaded", reason=str(problem))
    finally:
        threshold.level = level


def differences(one: Config, other: Config) -> Iterator[tuple[str, str]]:
    """The keys whose values differ, each with a text that says how."""
    for (path, before), (_, after) in zip(_values(one), _values(other), strict=True):
        if before != after:
            yield path, f"{path}: {_in_words(before)} → {_in_words(after)}"


def _in_words(value: Any) -> str:
    """Several folders as they are written in a configuration."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {each}' for name, each in value.items())}}}"
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def _with_values(config: Config, values: Mapping[str, Any]) -> Config:
    for path, value in values.items():
        name, key = path.split(".")
        config = config.model_copy(update={name: getattr(config, name).model_copy(update={key: value})})
    return config


def _changeable(config: Config) -> dict[str, Any]:
    return {path: value for path, value in _values(config) if path in CHANGEABLE}


def _values(config: Config) -> Iterator[tuple[str, Any]]:
    return ((f"{name}.{key}", value) for name, section in config for key, value in section)
