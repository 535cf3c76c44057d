"""The compiler of the hot path: plain loops over arrays, compiled once a machine and cached.

numba caches compiled kernels next to the source or, where that is read-only, in the user's cache folder
(`NUMBA_CACHE_DIR` names another one). `NUMBA_DISABLE_JIT=1` runs every kernel as ordinary Python, for debuggers and
for measuring coverage.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])

_njit: Final[Any] = numba.njit

_KERNELS: list[Any] = []


def kernel(function: F) -> F:
    """Compile a function over arrays. It releases the interpreter's lock and keeps IEEE arithmetic as written.

    Kernels make no arrays and return none. So they count no references to arrays (numba's `_nrt`), which took two
    thirds of the time of `admit`: each use of a column of `Tables` counted one up and down.
    """
    try:
        compiled = _njit(cache=True, nogil=True, _nrt=False)(function)
    except RuntimeError:  # no folder for the cache can be written: compile at each start
        compiled = _njit(nogil=True, _nrt=False)(function)
    _KERNELS.append(compiled)
    typed: F = compiled
    return typed


def inlined(function: F) -> F:
    """A part of kernels, compiled into each of them: a call would pass all of `Tables` by value."""
    typed: F = _njit(nogil=True, inline="always")(function)
    return typed


def are_cached() -> bool:
    """Whether the cache holds every kernel, as far as its files tell; else the first calls compile for some seconds."""
    return all(_is_cached(kernel) for kernel in _KERNELS if hasattr(kernel, "stats"))


def _is_cached(kernel: Any) -> bool:
    folder = kernel.stats.cache_path
    module = Path(kernel.py_func.__code__.co_filename).stem
    pattern = f"{module}.{kernel.py_func.__qualname__}-*.nbi"
    return folder is not None and any(Path(folder).glob(pattern))
