"""Commands of `instep`, and programs that use it, in processes of their own that need not import anything first.

One process imports what commands need and loads the compiled kernels, as `warmed.py` says. It has no thread of Python
and no socket, and torch has computed nothing in it. Each command is a fork of it, and else a process like any other,
with arguments, a folder, an environment and files of its own, to be killed and replaced by a new one. So a start costs
what the command itself does (0.3 s for a server of a small model), and not the import of torch (2 s).

Tests of starting, of imports and of the interpreter's options begin a fresh interpreter instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from multiprocessing import connection
from multiprocessing.context import ForkServerContext
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any

import instep.__main__
from instep.server.background import LINE_BYTES

_context: ForkServerContext = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__, "tests.support.warmed"])


class _Fork:
    """A process that begins with `begun`; `files` become its standard output, error and, where there are three, input.

    They are closed here.
    """

    def __init__(self, begun: _Begun, files: Sequence[int]) -> None:
        ready, to_ready = os.pipe()
        given = _Files([to_ready, *files])
        self._process = _context.Process(target=_run, args=(begun, given), name="instep", daemon=True)
        self._ending = threading.Lock()
        try:
            self._process.start()
        finally:
            for file in {to_ready, *files}:
                os.close(file)
        with os.fdopen(ready, "rb") as told:
            told.read(1)  # until then a fork ignores SIGINT; nothing comes from one that has ended already
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit status, or the number of the signal that killed it, negative; None while it runs."""
        with self._ending:  # the status can be read once only
            return self._process.exitcode

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
        main = instep.__main__.main if program is None else partial(_run_program, program)
        environment = dict(os.environ if env is None else env)
        super().__init__(_Begun(main, self.args, start_new_session, cwd or Path.cwd(), environment), theirs)

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; the exit status.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        connection.wait([self._process.sentinel], timeout)
        status = self.returncode
        if status is None:
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
    """A module with arguments, as a server runs it beside itself: `start_module` makes it."""

    def __init__(self, words: Sequence[str], files: Sequence[int], *streams: tuple[StreamReader, StreamWriter]) -> None:
        super().__init__(_Begun(partial(_run_module, words), list(words), new_session=True), files)
        (_, self.stdin), (self.stdout, self._unused) = streams

    async def wait(self) -> int:
        """Wait for its end; the exit status."""
        while (status := self.returncode) is None:
            await asyncio.sleep(0.01)
        self.stdin.close()
        self._unused.close()
        return status


async def start_module(words: Sequence[str]) -> WarmModule:
    """As the function of this name in `instep.server.background`, but a busy machine does not keep it from working."""
    await asyncio.to_thread(_has_imported)  # the loop serves meanwhile
    (stdin, its_stdin), (stdout, its_stdout) = socket.socketpair(), socket.socketpair()
    streams = [await asyncio.open_connection(sock=ours, limit=LINE_BYTES) for ours in (stdin, stdout)]
    output = its_stdout.detach()
    return WarmModule(words, [output, output, its_stdin.detach()], *streams)


@cache
def _has_imported() -> None:
    """Wait until the one process can fork."""
    process = _context.Process(target=int)
    process.start()
    process.join()


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


@dataclass(frozen=True)
class _Begun:
    main: Callable[[], object]
    words: list[str]
    new_session: bool
    cwd: Path = field(default_factory=Path.cwd)
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))


class _Files:
    """Descriptors of open files, which are given to the process when this is."""

    def __init__(self, files: Sequence[int]) -> None:
        self.files = files

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, tuple(DupFd(file) for file in self.files)


def _received(*files: Any) -> _Files:
    return _Files([file.detach() for file in files])


def _run(begun: _Begun, given: _Files) -> None:
    assert threading.active_count() == 1, "forked from a process with threads"
    ready, *files = given.files
    for number, file in zip((1, 2, 0), files, strict=False):
        os.dup2(file, number)
        os.close(file)
    if len(files) == 3:
        sys.stdin = os.fdopen(0)
    if begun.new_session:
        os.setsid()
    os.chdir(begun.cwd)
    os.environ.clear()
    os.environ.update(begun.environment)
    sys.argv = begun.words
    os.write(ready, b".")
    os.close(ready)
    begun.main()


def _run_program(program: str) -> None:
    if program.endswith(".py"):
        sys.path.insert(0, str(Path(program).parent.resolve()))
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def _run_module(words: Sequence[str]) -> None:
    sys.exit(importlib.import_module(words[0]).main(list(words[1:])))
