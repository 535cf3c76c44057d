"""What processes of a load test run in the place of `work`, in a module that imports no pytest."""

from __future__ import annotations

import signal
from typing import Any

from instep_tools.load.processes import work


def signalled(*arguments: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.raise_signal(number)
    work(*arguments)


def die(*anything: object) -> None:
    raise SystemExit(9)
