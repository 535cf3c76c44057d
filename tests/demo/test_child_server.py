from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from instep.demo.child_server import ChildServer
from instep.interrupts import Stopped

SERVES = """
import sys, time
print('{"endpoint": "tcp://127.0.0.1:1"}', file=sys.stderr, flush=True)
time.sleep(600)
"""
"""As much of a server as this needs."""


class SignalledWhileWaiting(subprocess.Popen[str]):
    """A second signal, to this process alone, comes while it waits for the child's end."""

    def wait(self, timeout: float | None = None) -> int:
        if timeout is not None:
            raise Stopped(signal.SIGTERM)
        return super().wait()


class Server(ChildServer):
    def _begin(self) -> subprocess.Popen[str]:
        return SignalledWhileWaiting([sys.executable, "-c", SERVES], stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("first", [None, Stopped(signal.SIGHUP)])
def test_a_signal_while_it_waits_for_the_end_leaves_no_server(tmp_path: Path, first: Stopped | None) -> None:
    server = Server(tmp_path)
    server.__enter__()
    try:
        with pytest.raises(Stopped, match="SIGTERM"):
            server.__exit__(None if first is None else Stopped, first, None)
        with pytest.raises(ProcessLookupError):
            os.kill(server.pid, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(server.pid, signal.SIGKILL)
