"""What a page tells its reader to type, run as a reader would run it."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType

from typer.testing import CliRunner

from instep.program import app
from tests.support.warm import WarmProcess, run_instep, run_program

SCRIPTS = Path(sys.executable).parent
_DEFAULT = "tcp://127.0.0.1:5757"


def commands(text: str) -> list[list[str]]:
    """The commands of a block, one a line, without comments."""
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def run(command: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of this environment to its end; our own, and programs, find what they need imported."""
    if command[0] == "instep":
        return run_instep(command[1:], cwd)
    if command[0] == "python" and command[1].endswith(".py"):
        return run_program(command[1], cwd)
    words = [str(SCRIPTS / command[0]), *command[1:]]
    return subprocess.run(words, cwd=cwd, text=True, capture_output=True, timeout=100, check=False)


def assert_exists(words: Sequence[str]) -> None:
    """Assert that a command exists, with each of its options."""
    assert Path(words[0]).name == "instep"
    path = [word for word in words[1:4] if re.fullmatch("[a-z]+(-[a-z]+)*", word)]
    help_text = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*path, "--help"])
    assert help_text.exit_code == 0, path
    for option in (word for word in words if word.startswith("--")):
        assert option in help_text.stdout


class TypedServer:
    """`instep serve` as a page writes it, but on a port of its own, which stays the same when it is started again."""

    def __init__(self, command: Sequence[str], cwd: Path) -> None:
        assert command[0] == "instep"
        self._command, self._cwd = command[1:], cwd
        with closing(socket.create_server(("127.0.0.1", 0))) as probe:
            self.endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"

    def __enter__(self) -> TypedServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()

    def start(self) -> None:
        """Start it, and return once its log says what it serves."""
        environ = {**os.environ, "INSTEP_TRANSPORT__ENDPOINT": self.endpoint, "INSTEP_HTTP__ENDPOINT": "off"}
        self.process = WarmProcess(self._command, cwd=self._cwd, env=environ)
        assert self.process.stderr is not None
        said = ""
        while not re.search(r"serving\b.*" + re.escape(self.endpoint), said):
            line = self.process.stderr.readline()
            assert line, said
            said += line

    def stop(self, number: int) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        self.process.communicate(timeout=60)
        return self.process.wait()

    def script(self, code: str, name: str) -> list[str]:
        """The command that runs a page's program against this server."""
        assert _DEFAULT in code or "Client()" in code
        code = code.replace(_DEFAULT, self.endpoint).replace("Client()", f'Client("{self.endpoint}")')
        (self._cwd / name).write_text(code)
        return ["python", name]
