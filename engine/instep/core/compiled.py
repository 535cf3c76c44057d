"""Compiles the hot path: plain loops over arrays, compiled once on each machine and cached.

Compiled kernels are cached next to the source or, if that is read-only, in ~/.cache/instep (`NUMBA_CACHE_DIR` names
another folder). `NUMBA_DISABLE_JIT=1` runs every kernel as ordinary Python, for debuggers and for measuring coverage.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import numba

from instep_client.protocol import codes

F = TypeVar("F", bound=Callable[..., Any])

_njit: Final[Any] = numba.njit
_config: Final[Any] = numba.config

_KERNELS: list[Any] = []


def _cache_folder() -> str:
    """Return the cache folder for these sources, or an empty string if no folder can be written.

    numba recompiles a kernel when its own file has changed, but not when code that it inlines from another file has. So
    each state of the sources has its own folder.
    """
    here = Path(__file__).parent
    sources = [*sorted(here.glob("*.py")), Path(codes.__file__)]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    for folder in (Path(_config.CACHE_DIR or here / "__pycache__"), Path(os.path.expanduser("~/.cache/instep"))):
        try:
            (folder / f"kernels-{digest}").mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        return str(folder / f"kernels-{digest}")
    return ""


CACHE_FOLDER: Final = _cache_folder()
"""The cache folder; empty if no folder can be written."""


def kernel(function: F) -> F:
    """Compile a function over arrays. It releases the interpreter's lock and keeps IEEE arithmetic as written.

    Kernels neither create nor return arrays, so numba's reference counting (`_nrt`) is off; it took two thirds of the
    time of `admit`.
    """
    usual, _config.CACHE_DIR = _config.CACHE_DIR, CACHE_FOLDER  # read by the decorator
    try:
        compiled = _njit(cache=True, nogil=True, _nrt=False)(function)
    except RuntimeError:  # no folder for the cache can be written: compile at each start
        compiled = _njit(nogil=True, _nrt=False)(function)
    finally:
        _config.CACHE_DIR = usual
    _KERNELS.append(compiled)
    typed: F = compiled
    return typed


def inlined(function: F) -> F:
    """Compile a function into each kernel that calls it, because a call would pass all of `Tables` by value."""
    typed: F = _njit(nogil=True, inline="always")(function)
    return typed


def are_cached(package: str) -> bool:
    """Whether every kernel of a package is cached, judging by the files; if not, first calls compile."""
    kernels = (kernel for kernel in _KERNELS if kernel.__module__.startswith(package) and hasattr(kernel, "stats"))
    return all(map(_is_cached, kernels))


def _is_cached(kernel: Any) -> bool:
    folder = kernel.stats.cache_path
    module = Path(kernel.py_func.__code__.co_filename).stem
    pattern = f"{module}.{kernel.py_func.__qualname__}-*.nbi"
    return folder is not None and any(Path(folder).glob(pattern))
