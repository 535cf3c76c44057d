"""What the server tells the service manager that has started it: systemd's protocol, see sd_notify(3)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping

import structlog


class ServiceManager:
    """The manager at the other end of $NOTIFY_SOCKET; without that variable, everything here does nothing.

    Make it before the process forks: the watchdog is meant for the process whose id is in $WATCHDOG_PID.
    """

    def __init__(self, environ: Mapping[str, str], log: structlog.stdlib.BoundLogger) -> None:
        self._log = log
        self._is_lost = False
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address  # @ is systemd's for abstract ones
        self._ping_every_s = 0.0
        """Half of the time after which the manager takes the server to hang; 0 where it does not watch."""
        if self._address and environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            with contextlib.suppress(ValueError):
                self._ping_every_s = int(environ.get("WATCHDOG_USEC", "0")) / 2e6

    def serving(self, status: str) -> None:
        """The server takes connections; `systemctl status` shows the text.

        From here on the event loop pings the watchdog, for as long as it turns.
        """
        self._tell(f"READY=1\nSTATUS={status}")
        self._ping()

    def stopping(self) -> None:
        """The server drains."""
        self._tell("STOPPING=1\nSTATUS=draining")

    def _ping(self) -> None:
        if self._ping_every_s > 0:
            self._tell("WATCHDOG=1")
            asyncio.get_running_loop().call_later(self._ping_every_s, self._ping)

    def _tell(self, state: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
                manager.setblocking(False)
                manager.sendto(state.encode(), self._address)
        except OSError as error:
            if not self._is_lost:
                self._log.warning("service manager not reached", reason=f"NOTIFY_SOCKET: {error.strerror or error}")
            self._is_lost = True
