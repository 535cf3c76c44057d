"""What processes of a load test run in the place of `work`, in a module that imports no pytest."""

from __future__ import annotations

import signal
import time
from ctypes import c_uint64
from multiprocessing.connection import Connection
from typing import Any

from instep_tools.load.processes import READY, work


def signalled(*arguments: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.raise_signal(number)
    work(*arguments)


def die(*anything: object) -> None:
    raise SystemExit(9)


def never_end(part: Any, target: Any, pipe: Connection[Any, Any], answered: c_uint64) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    pipe.send(READY)
    pipe.recv()
    answered.value = 1
    time.sleep(600)
