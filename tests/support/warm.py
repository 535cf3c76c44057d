"""Commands of `instep`, and programs that use it, in processes of their own that need not import anything first.

Each is a fork of one process that has imported what commands need (`warm_server.py`), and else a process like any
other, with arguments, a folder, an environment and files of its own, to be killed and replaced by a new one. So a start
costs what the command itself does (0.3 s for a server of a small model), and not the import of torch (2 s).

Tests of starting, of imports and of the interpreter's options begin a fresh interpreter instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import threading
from asyncio import StreamReader, StreamWriter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from multiprocessing import connection
from pathlib import Path
from typing import IO, cast

from instep.server.live_verification import LINE_BYTES
from tests.support.warm_server import Kind, Request, begin


class _Fork:
    """A process that is a fork of the warm one; `files` are closed here."""

    def __init__(self, request: Request, files: Sequence[int]) -> None:
        try:
            self._connection = begin(request, files)
        finally:
            for file in set(files):
                os.close(file)
        self._told = self._connection.makefile("rb", buffering=0)
        self._ending = threading.Lock()
        self._status: int | None = None
        self.pid = int(self._told.readline())

    @property
    def returncode(self) -> int | None:
        """Its exit status, or the number of the signal that killed it, negative; None while it runs."""
        with self._ending:
            if self._status is None and self._has_ended_within(0.0):
                self._status = int(self._told.readline())
            return self._status

    def _has_ended_within(self, timeout: float | None) -> bool:
        return self._status is not None or bool(connection.wait([self._connection], timeout))

    def __del__(self) -> None:
        if hasattr(self, "_told"):
            self._told.close()
            self._connection.close()  # which ends the process, if it still runs

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it ends at this moment
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class WarmProcess(_Fork):
    """`instep` with these arguments, to be used like `subprocess.Popen` with text in its pipes.

    Args:
        arguments: of the command.
        program: a Python file or a module that is run instead of `instep`.
        cwd: where it runs; None for the test's folder.
        env: its whole environment; None for the test's.
        output: a file for all that it prints, or an open terminal, which is its standard input, too; None for the pipes
            `stdout` and `stderr`.
        start_new_session: whether signals to the test's process group pass it by.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        program: str | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        output: Path | int | None = None,
        start_new_session: bool = False,
    ) -> None:
        self.args = [program or "instep", *arguments]
        self.stdout: IO[str] | None = None
        self.stderr: IO[str] | None = None
        if isinstance(output, int):
            theirs = [os.dup(output) for _ in range(3)]
        elif output is not None:
            theirs = [os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)] * 2
        else:
            (out, to_out), (err, to_err) = os.pipe(), os.pipe()
            self.stdout, self.stderr, theirs = os.fdopen(out), os.fdopen(err), [to_out, to_err]
        super().__init__(
            _request("instep" if program is None else "program", self.args, start_new_session, cwd, env), theirs
        )

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; the exit status.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        if not self._has_ended_within(timeout) or (status := self.returncode) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return status

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it still writes until its end; nothing for a pipe that was set to None.

        Raises:
            subprocess.TimeoutExpired: it still runs; to be killed then.
        """
        threads = ThreadPoolExecutor(2)
        try:
            reading = [threads.submit(file.read) if file else None for file in (self.stdout, self.stderr)]
            self.wait(timeout)
            stdout, stderr = (each.result(timeout) if each else "" for each in reading)
        finally:
            threads.shutdown(wait=False)
        for file in (self.stdout, self.stderr):
            if file:
                file.close()
        self.stdout = self.stderr = None
        return stdout, stderr

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)


class WarmModule(_Fork):
    """A module that a server runs beside itself: `start_checker` makes it."""

    def __init__(self, module: str, files: Sequence[int], *streams: tuple[StreamReader, StreamWriter]) -> None:
        super().__init__(_request("main", [module], new_session=True), files)
        (_, self.stdin), (self.stdout, self._unused) = streams

    async def wait(self) -> int:
        """Wait for its end; the exit status."""
        while (status := self.returncode) is None:
            await asyncio.sleep(0.01)
        self.stdin.close()
        self._unused.close()
        return status


async def start_checker() -> asyncio.subprocess.Process:
    """As the function of this name that a server uses, but a busy machine does not keep the process from working."""
    await asyncio.to_thread(_has_imported)  # the loop serves meanwhile
    (stdin, its_stdin), (stdout, its_stdout) = socket.socketpair(), socket.socketpair()
    streams = [await asyncio.open_connection(sock=ours, limit=LINE_BYTES) for ours in (stdin, stdout)]
    output = its_stdout.detach()
    return cast(
        asyncio.subprocess.Process,
        WarmModule("instep.replay.live_process", [output, output, its_stdin.detach()], *streams),
    )


@cache
def _has_imported() -> None:
    """Wait until the one process can fork."""
    run_instep(["--version"])


def run_instep(arguments: Sequence[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `instep` with these arguments to its end."""
    return _run_to_its_end(WarmProcess(arguments, cwd=cwd))


def run_program(program: str, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a Python file or a module to its end, which finds torch and `instep` imported."""
    return _run_to_its_end(WarmProcess(arguments, program=program, cwd=cwd))


def _run_to_its_end(process: WarmProcess) -> subprocess.CompletedProcess[str]:
    try:
        stdout, stderr = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def _request(
    kind: Kind,
    words: Sequence[str],
    new_session: bool,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Request:
    variables = os.environ if environment is None else environment
    return Request(kind, [*words], str(cwd or Path.cwd()), {**variables}, new_session)
