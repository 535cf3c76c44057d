"""A process that a server runs beside itself, at the lowest priority.

It writes a JSON object a line to standard output: each is a status, or says with `error` why nothing can be done. It
ends when its standard input does, which is also when the server dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from threading import Event, Thread
from typing import Any, Final

AGAIN: Final = 1
"""The exit status where the recording could not be read at the moment; a bug ends Python with the same."""
CANNOT: Final = 2
"""The exit status where nothing can be done, and a new process could not do it either."""
_NICE: Final = 19
_WORK_S: Final = 0.001
"""Of a slice. Every frame that is served meanwhile takes longer, since the two share caches."""
_REST_S: Final = 0.010
"""Between two slices."""
_SLICED_S: Final = 0.5
"""Work that takes longer than this is too much for slices: the rest of it is done without rests."""


def run_in_the_background() -> None:
    """Let every other process go first, where the system can."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's own; torch gets the number that the recording names
    os.nice(_NICE)
    if hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


@contextlib.contextmanager
def in_slices() -> Iterator[None]:
    """Work for a millisecond at a time, with rests between, for `_SLICED_S` at most; only in the main thread."""
    until = time.monotonic() + _SLICED_S

    def rest(*_: object) -> None:
        if time.monotonic() < until:
            time.sleep(_REST_S)

    signal.signal(signal.SIGALRM, rest)
    signal.setitimer(signal.ITIMER_REAL, _WORK_S, _WORK_S + _REST_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def end_of_input() -> Event:
    """An event that is set once standard input ends."""
    ended = Event()
    Thread(target=_wait_for_the_end, args=(ended,), daemon=True).start()
    return ended


def write(fields: Mapping[str, Any]) -> None:
    """Report to the server."""
    sys.stdout.write(json.dumps(fields, allow_nan=False) + "\n")
    sys.stdout.flush()


def _wait_for_the_end(ended: Event) -> None:
    while os.read(0, 4096):
        pass
    ended.set()
