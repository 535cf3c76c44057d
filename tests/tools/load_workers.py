"""What processes of a load test run in the place of `work`, in a module that imports no pytest."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from instep_tools.load.processes import work


def signalled(*arguments: Any) -> Any:
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    return work(*arguments)


def die(*anything: object) -> None:
    os._exit(9)


def never_end(*anything: object) -> None:
    time.sleep(600)
