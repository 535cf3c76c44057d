"""A server in another process, for commands that bring their own producers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from instep.interrupts import end_with_parent

_STOP_TIMEOUT_S: Final = 60.0
_LINES_KEPT: Final = 1000
"""The number of log lines kept, for the message about a failed server."""


class ChildFailed(Exception):
    """The server did not start, or ended with an error; the message contains its output."""


class ChildServer:
    """`instep serve` as a child process, from start to clean end.

    Args:
        model: the model folder to serve.
        arguments: further arguments of `instep serve`.
        administered: whether it serves its page at the default address, if that is free.

    Raises:
        ChildFailed: on entering, if the server does not start; on leaving, if its exit status is not 0.
    """

    def __init__(self, model: Path, arguments: Sequence[str] = (), *, administered: bool = False) -> None:
        self._arguments = [
            *("serve", str(model)),
            *("--endpoint", "tcp://127.0.0.1:*", "--set", "log.format=json"),
            *(() if administered else ("--http", "off")),
            *arguments,
        ]
        self.endpoint = ""
        self.started: dict[str, Any] = {}
        """Values by name from the lines that the server logged until it was ready."""
        self._logged: deque[str] = deque(maxlen=_LINES_KEPT)

    @property
    def pid(self) -> int:
        """The process id of the server."""
        return self._process.pid

    def __enter__(self) -> Self:
        self._process = self._begin()
        assert self._process.stderr is not None
        try:
            for line in self._process.stderr:
                self._logged.append(line)
                if line.startswith("{"):
                    self.started |= json.loads(line)
                if "endpoint" in self.started:
                    break
        except BaseException:  # a signal has come
            self._process.kill()
            self._process.communicate()
            raise
        if "endpoint" not in self.started:
            self._process.communicate()
            raise ChildFailed(f"the server did not start: {' '.join(self.started.get('reasons', [self._said()]))}")
        self.endpoint = str(self.started["endpoint"])
        # A pipe that nobody reads fills up, and then the server's loop waits there for ever.
        self._reader = threading.Thread(target=self._logged.extend, args=(self._process.stderr,), daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        assert self._process.stderr is not None
        self._process.stderr.close()
        if self._process.returncode != 0 and kind is None:
            raise ChildFailed(f"the server ended with status {self._process.returncode}: {self._said()}")

    def _begin(self) -> subprocess.Popen[str]:
        # In a session of its own, so that Ctrl-C in the terminal does not reach it, too, and force its end.
        return subprocess.Popen(
            [sys.executable, "-m", "instep", *self._arguments],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            preexec_fn=partial(end_with_parent, os.getpid()),
        )

    def _said(self) -> str:
        return "".join(self._logged).strip()
