"""A server in a process of its own, for commands that bring their own producers."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

_STOP_TIMEOUT_S = 60.0
_OWN_END_S = 3.0
"""How long a child that may have been told to end has for that."""


class ChildFailed(Exception):
    """The server did not start, or did not end well; the message holds its output."""


class ChildServer:
    """`instep serve` as a child process, from start to clean end.

    Args:
        model: the model folder to serve.
        arguments: further arguments of `instep serve`.
        administered: whether it serves its dashboard at the default address, where that is free.

    Raises:
        ChildFailed: on entering, when the server does not come up; on leaving, when it ends with another status than 0.
    """

    def __init__(self, model: Path, arguments: Sequence[str] = (), *, administered: bool = False) -> None:
        self._command = [
            *(sys.executable, "-m", "instep", "serve", str(model)),
            *("--endpoint", "tcp://127.0.0.1:*", "--set", "log.format=json"),
            *(() if administered else ("--http", "off")),
            *arguments,
        ]
        self.endpoint = ""
        self.started: dict[str, Any] = {}
        """The values in the lines that the server logged until it was ready, by name."""

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def __enter__(self) -> ChildServer:
        self._process = subprocess.Popen(self._command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        assert self._process.stderr is not None
        said = ""
        for line in self._process.stderr:
            said += line
            if line.startswith("{"):
                self.started |= json.loads(line)
            if "endpoint" in self.started:
                self.endpoint = str(self.started["endpoint"])
                return self
        self._process.communicate()
        raise ChildFailed(f"the server did not start: {' '.join(self.started.get('reasons', [said.strip()]))}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if (
            kind is KeyboardInterrupt
        ):  # typed at a terminal it has reached the child, too, and a second one would force it
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_OWN_END_S)
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            said = self._process.communicate(timeout=_STOP_TIMEOUT_S)[1]
        except subprocess.TimeoutExpired:
            self._process.kill()
            said = self._process.communicate()[1]
        if self._process.returncode != 0 and kind is None:
            raise ChildFailed(f"the server ended with status {self._process.returncode}: {said.strip()}")
