"""What `instep serve` tells systemd, at the other end of a socket such as systemd gives to services."""

from __future__ import annotations

import os
import select
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
from structlog.testing import capture_logs

from instep.models.folder import write_model
from instep.server.serve import ServiceManager
from tests.support.models import SMALL
from tests.support.served import serving


@contextmanager
def manager(address: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(address)
        listening.settimeout(60)
        yield listening


def told(listening: socket.socket, first: str) -> str:
    """The next message that begins with this line."""
    while True:
        message = listening.recv(4096).decode()
        if message.partition("\n")[0] == first:
            return message


def test_it_says_when_it_serves_that_it_lives_and_when_it_drains(tmp_path: Path) -> None:
    write_model(tmp_path / "model", SMALL)
    with manager(str(tmp_path / "notify")) as listening:
        environ = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
        with serving(tmp_path / "model", env=environ) as served:
            endpoint = served.until("serving")["endpoint"]
            ready = listening.recv(4096).decode()
            assert ready == f"READY=1\nSTATUS=serving {SMALL.name} at {endpoint}"
            for _ in range(3):
                assert listening.recv(4096) == b"WATCHDOG=1"
            served.process.send_signal(signal.SIGSTOP)  # as a loop that is stuck
            late = 0
            while select.select([listening], [], [], 0.5)[0]:  # what was on its way
                assert listening.recv(4096) == b"WATCHDOG=1"
                late += 1
            assert late < 3
            served.process.send_signal(signal.SIGCONT)
            served.process.terminate()
            assert told(listening, "STOPPING=1")
            assert served.end()[-1]["event"] == "stopped"
            assert served.process.returncode == 0


async def test_a_manager_that_is_not_there_is_named_once_and_changes_nothing(tmp_path: Path) -> None:
    with capture_logs() as lines:
        lost = ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "none")}, structlog.stdlib.get_logger())
        lost.serving("s")
        lost.stopping()
        ServiceManager({}, structlog.stdlib.get_logger()).serving("s")
    assert [(line["event"], line["reason"]) for line in lines] == [
        ("service manager not reached", "NOTIFY_SOCKET: No such file or directory")
    ]
