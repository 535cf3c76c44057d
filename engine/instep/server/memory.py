"""Memory: the need of a server, and the limit of the machine or container."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

from instep.config import Config
from instep.core.tables import STREAM

if TYPE_CHECKING:
    from instep.server.preparation import Prepared

_UNLIMITED: Final = 2**60
"""Control groups of version 1 say about 2^63 where there is no limit."""


def usable_memory() -> int:
    """Bytes that this process may use: of the machine, or of its container."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = memory_limit(Path("/"))
    return total if limit is None else min(total, limit)


def memory_limit(root: Path) -> int | None:
    """The smallest limit of this process's control groups, of version 2 or 1; files of the system are below `root`."""
    limits = []
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base, name = (
            ("sys/fs/cgroup/memory", "memory.limit_in_bytes") if controllers else ("sys/fs/cgroup", "memory.max")
        )
        group = root / base / path.lstrip("/")
        for place in (group, *group.parents):
            text = read_text(place / name)
            if text.isdigit() and int(text) < _UNLIMITED:
                limits.append(int(text))
            if place == root / base:
                break
    return min(limits, default=None)


def read_text(path: Path) -> str:
    """The text of a system file, or nothing if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def memory_at_start(config: Config) -> int:
    """Bytes that are written before any stream is opened: a record for each that there may be."""
    return config.engine.max_streams * STREAM.itemsize * len(config.model.folders)


def memory_when_full(config: Config, prepared: Sequence[Prepared]) -> int:
    """Bytes when all streams are open: states, the frame buffers, and replies that nobody has read yet."""
    return sum(_bytes_of(config, each) for each in prepared) + config.limits.max_buffered_bytes


def _bytes_of(config: Config, prepared: Prepared) -> int:
    network = prepared.network
    frame = 4 * (network.description.features + network.description.outputs) + 4
    return config.engine.max_streams * (network.state.row_bytes + config.limits.window_frames * frame)


def warn_of_memory(config: Config, prepared: Sequence[Prepared], log: structlog.stdlib.BoundLogger) -> None:
    """Say in the log that the limits allow more than there is."""
    needed, usable = memory_when_full(config, prepared), usable_memory()
    if needed > usable:
        log.warning(
            "more streams than memory", needed_bytes=needed, usable_bytes=usable, reason=exceeds(needed, usable)
        )


def exceeds(needed: int, usable: int) -> str:
    """That the limits allow more than there is."""
    return (
        f"the limits allow {size(needed)}, and {size(usable)} of memory may be used: the server is killed before it "
        "reaches them"
    )


def size(count: float) -> str:
    """Bytes for people: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
