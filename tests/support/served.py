"""`instep serve` as a process of its own, and what it logs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from instep.demo.child_server import ChildServer
from tests.support.warm import WarmProcess


class Served:
    """A server process whose log is JSON."""

    def __init__(self, process: WarmProcess) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []
        """What was read of its log so far."""

    def until(self, *events: str, **fields: object) -> dict[str, Any]:
        """Read the log up to the next line of one of these events with these fields, and return that line."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            assert line.startswith("{"), line
            self.lines.append(json.loads(line))
            if self.lines[-1]["event"] in events and fields.items() <= self.lines[-1].items():
                return self.lines[-1]
        raise AssertionError(f"it never logged {events}: {self.lines}")

    def end(self) -> list[dict[str, Any]]:
        """Wait for the end; the lines that were not read yet."""
        stdout, stderr = self.process.communicate(timeout=60)
        assert stdout == ""
        return [json.loads(line) for line in stderr.splitlines()]


@contextmanager
def serving(model: Path | None, *arguments: str, endpoint: str = "tcp://127.0.0.1:*", **how: Any) -> Iterator[Served]:
    """Run `instep serve` while the block runs; further arguments of it and of `WarmProcess`."""
    models = [] if model is None else [str(model)]
    command = ["serve", *models, "--endpoint", endpoint, "--http", "off", "--set", "log.format=json", *arguments]
    process = WarmProcess(command, **how)
    try:
        yield Served(process)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


class WarmServer(ChildServer):
    """As `ChildServer`, and as quick to start as `WarmProcess`."""

    def _begin(self) -> subprocess.Popen[str]:
        return cast("subprocess.Popen[str]", WarmProcess(self._arguments))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, trace)
        finally:
            assert self._process.stdout is not None
            assert self._process.stdout.read() == ""
            self._process.stdout.close()
