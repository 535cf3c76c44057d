"""Ports in a row, for several servers of one command."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack, suppress

FIRST, LAST = 10_000, 32_000
"""Below the ports that the kernel gives to connections and to servers at any port, which are taken at any time."""


def free_ports(count: int) -> int:
    """The first of some free ports in a row; other ones in every process."""
    for first in range(FIRST + os.getpid() % 1000 * 16, LAST):
        with suppress(OSError), ExitStack() as probes:
            for port in range(first, first + count):
                probes.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
    raise AssertionError("no ports are free")
