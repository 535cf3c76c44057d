"""One process that imports what commands need, and that forks itself for each of them: `warm.py` asks it to.

It has one thread, in which torch computes, too, and no socket of ZeroMQ. All processes of a test run share the one
whose address is in their environment. Over a connection to it come a request, a line of JSON with the files of the
process to be; back go two lines, the id of the fork once signals reach it and its exit status, negative for a signal. A
fork is killed when its connection is closed, and all are when the process ends that began this one.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import multiprocessing.util
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from subprocess import PIPE
from typing import Final, Literal, TypeAlias

Kind: TypeAlias = Literal["instep", "program", "main"]

ADDRESS: Final = "WARM_SERVER"
"""The variable of the environment with the path of the socket."""
_REQUEST_BYTES: Final = 2**16
_RECEIVE_S: Final = 10.0
"""How long a request may take to arrive."""
_STOP_S: Final = 10.0
_ROOT: Final = Path(__file__).parents[2]


@dataclass(frozen=True)
class Request:
    """A process that is to begin.

    Attributes:
        kind: what it runs: `instep`; a Python file or a module as `__main__`, whose name is the first word; or the
            `main` of a module of that name, with the other words.
        words: its `sys.argv`.
        new_session: whether signals to the test's process group pass it by.
    """

    kind: Kind
    words: list[str]
    cwd: str
    environment: dict[str, str]
    new_session: bool


def begin(request: Request, files: Sequence[int]) -> socket.socket:
    """Let a process begin with these files as its standard output, error and, where there are three, input."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(start())
    line = json.dumps(asdict(request)).encode() + b"\n"
    sent = socket.send_fds(connection, [line], files)
    connection.sendall(line[sent:])
    return connection


def start() -> str:
    """Start the one process, unless there is one; the path of its socket."""
    with _starting:
        if ADDRESS not in os.environ:
            path = os.path.join(tempfile.mkdtemp(prefix="warm-"), "socket")
            environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(path)
                listener.listen(100)
                command = [sys.executable, "-m", __name__, str(listener.fileno()), path]
                beside = subprocess.Popen(command, stdin=PIPE, cwd=_ROOT, env=environment, pass_fds=[listener.fileno()])
            os.environ[ADDRESS] = path
            atexit.register(_stop, beside, path)
        return os.environ[ADDRESS]


_starting: Final = threading.Lock()


def wait() -> None:
    """Return once the process can fork; by then all kernels are compiled, for whoever loads them next."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(start())
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)  # it has read that there is no request, and closes


def _stop(beside: subprocess.Popen[bytes], path: str) -> None:
    try:
        beside.communicate(timeout=_STOP_S)
    except subprocess.TimeoutExpired:
        beside.kill()
    shutil.rmtree(os.path.dirname(path), ignore_errors=True)


# ── In the process ─────────────────────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    """Serve until the standard input ends, and run in each fork what was asked for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C in the terminal is for the tests
    import_module("tests.support.warmed")
    path = Path(sys.argv[2])
    with socket.socket(fileno=int(sys.argv[1])) as listener:
        asked = _Server(listener).serve()
    if asked is None:
        shutil.rmtree(path.parent, ignore_errors=True)
    else:
        os._exit(_run(*asked))


class _Server:
    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._connections: dict[int, socket.socket] = {}
        """Those of the forks that have not ended, by their ids."""
        self._selector = selectors.DefaultSelector()
        self._ended, to_ended = socket.socketpair()
        self._to_ended = to_ended
        to_ended.setblocking(False)
        signal.set_wakeup_fd(to_ended.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self) -> tuple[Request, list[int], socket.socket] | None:
        """Serve until the standard input ends; in a fork, what it is to run, its files and its connection."""
        for file in (self._listener, self._ended, 0):
            self._selector.register(file, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.data is not None:
                    self._hung_up(key.data)
                elif key.fileobj is self._listener:
                    connection, _ = self._listener.accept()
                    try:
                        request, files = _received(connection)
                    except (OSError, TypeError, ValueError):  # whoever asked has ended meanwhile
                        connection.close()
                        continue
                    if not (pid := os.fork()):
                        self._forget()
                        return request, files, connection
                    for file in files:
                        os.close(file)
                    self._connections[pid] = connection
                    self._selector.register(connection, selectors.EVENT_READ, pid)
                elif key.fileobj is self._ended:
                    self._ended.recv(1024)
                    self._reap()
                else:
                    for pid in self._connections:
                        os.kill(pid, signal.SIGKILL)
                    return None

    def _hung_up(self, pid: int) -> None:
        """Nobody waits for a fork any more."""
        if pid in self._connections:
            self._selector.unregister(self._connections[pid])
            os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                connection = self._connections.pop(ended[0])
                with contextlib.suppress(KeyError):
                    self._selector.unregister(connection)
                with connection, contextlib.suppress(BrokenPipeError):
                    connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(ended[1]))

    def _forget(self) -> None:
        """Close in a fork whatever is not its own."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        for each in (self._ended, self._to_ended, *self._connections.values()):
            each.close()


def _received(connection: socket.socket) -> tuple[Request, list[int]]:
    connection.settimeout(_RECEIVE_S)
    line, files, _, _ = socket.recv_fds(connection, _REQUEST_BYTES, 4)
    try:
        while not line.endswith(b"\n"):
            if not (more := connection.recv(_REQUEST_BYTES)):
                raise ConnectionResetError
            line += more
        return Request(**json.loads(line)), files
    except (OSError, TypeError, ValueError):
        for file in files:
            os.close(file)
        raise


def _run(request: Request, files: list[int], connection: socket.socket) -> int:
    """Run what was asked for; its exit status."""
    assert threading.active_count() == 1, "forked from a process with threads"
    if len(files) == 2:
        files.append(os.open(os.devnull, os.O_RDONLY))
    for number, file in zip((1, 2, 0), files, strict=True):
        os.dup2(file, number)
        os.close(file)
    sys.stdin = os.fdopen(0, closefd=False)
    if request.new_session:
        os.setsid()
        if os.isatty(0):
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.chdir(request.cwd)
    os.environ.clear()
    os.environ.update(request.environment)
    sys.argv = request.words
    status: object = 0
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with connection:
            connection.sendall(b"%d\n" % os.getpid())
        _main(request)
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            sys.stderr.write(f"{status}\n")
    except BaseException:
        traceback.print_exc()
        status = 1
    multiprocessing.util._exit_function()  # type: ignore[attr-defined]  # ends daemonic processes
    threading._shutdown()  # type: ignore[attr-defined]
    for file_object in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            file_object.flush()
    return status if isinstance(status, int) else int(status is not None)


def _main(request: Request) -> None:
    name = request.words[0]
    if request.kind == "instep":
        import_module("instep.__main__").main()
    elif request.kind == "main":
        sys.exit(import_module(name).main())
    elif name.endswith(".py"):
        sys.path.insert(0, str(Path(name).parent.resolve()))
        runpy.run_path(name, run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
