"""The memory that this machine or container has, and sizes in words."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

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


def size(count: float) -> str:
    """Bytes as text for people: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
