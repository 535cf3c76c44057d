"""How many cores this process may use, which may be fewer than there are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

MEMBERSHIP: Final = Path("/proc/self/cgroup")
GROUPS: Final = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores that this process may run on, and has the time of: its affinity, and its share where groups are limited.

    A share is that of a control group of version 2, as containers and systemd set it, rounded down; 1 at least.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *_shares()]))


def _shares() -> list[int]:
    """Whole cores that this process's group and those around it may use, where there is a limit."""
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        return []
    shares = []
    for group in [GROUPS / line.removeprefix("0::/") for line in lines if line.startswith("0::/")]:
        for place in (group, *group.parents):
            try:
                quota_us, period_us = (place / "cpu.max").read_text().split()
            except OSError:
                continue
            if quota_us != "max":
                shares.append(int(quota_us) // int(period_us))
    return shares
