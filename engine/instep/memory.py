"""The memory of this machine or container, and sizes as text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_UNLIMITED: Final = 2**60
"""Control groups of version 1 report about 2^63 without a limit."""


def usable_memory() -> int:
    """The bytes of memory of the machine or, if smaller, of this process's container."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = memory_limit(Path("/"))
    return total if limit is None else min(total, limit)


def memory_limit(root: Path) -> int | None:
    """The smallest memory limit of this process's control groups, version 2 or 1; `root` contains the files."""
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
    """The text of a system file; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def size(count: float) -> str:
    """A number of bytes as text: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
