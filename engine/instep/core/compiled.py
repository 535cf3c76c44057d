"""The compiler of the hot path: plain loops over arrays, compiled once a machine and cached.

numba caches compiled kernels next to the source or, where that is read-only, in the user's cache folder
(`NUMBA_CACHE_DIR` names another one). `NUMBA_DISABLE_JIT=1` runs every kernel as ordinary Python, for debuggers and
for measuring coverage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])

_njit: Final[Any] = numba.njit

_KERNELS: list[Any] = []


def kernel(function: F) -> F:
    """Compile a function over arrays. It releases the interpreter's lock and keeps IEEE arithmetic as written."""
    try:
        compiled = _njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no folder for the cache can be written: compile at each start
        compiled = _njit(nogil=True)(function)
    _KERNELS.append(compiled)
    typed: F = compiled
    return typed


def inlined(function: F) -> F:
    """A part of kernels, compiled into each of them: a call would pass all of `Tables` by value."""
    typed: F = _njit(nogil=True, inline="always")(function)
    return typed


def compiled_now() -> int:
    """How many kernels this process has compiled so far because no cache held them."""
    stats = [kernel.stats for kernel in _KERNELS if hasattr(kernel, "stats")]
    return sum(sum(each.cache_misses.values()) for each in stats)
