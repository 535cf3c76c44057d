"""How many files (and so connections) this process may open."""

from __future__ import annotations

import resource
import sys
from typing import Final

FILES_BESIDE_CONNECTIONS: Final = 100
"""A server opens one file for each connection, and at most about this many others."""


def allow_open_files(wanted: int) -> int:
    """Raise this process's soft limit of open files to `wanted`, as far as the hard limit allows.

    Returns:
        What is allowed now.
    """
    soft, hard = (sys.maxsize if limit == resource.RLIM_INFINITY else limit for limit in _limits())
    if soft >= min(wanted, hard):
        return soft
    allowed = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, _limits()[1]))
    return allowed


def _limits() -> tuple[int, int]:
    return resource.getrlimit(resource.RLIMIT_NOFILE)
