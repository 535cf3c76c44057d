"""The server that a command brings along."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from instep.demo.child_server import ChildServer

PROGRAM = """#!{python}
import ctypes, json, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
number = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(number))  # PR_GET_PDEATHSIG
print(json.dumps({{"endpoint": number.value}}), file=sys.stderr)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux does it")
def test_the_kernel_ends_it_when_the_command_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with ChildServer(tmp_path) as server:
        assert server.endpoint == str(signal.SIGTERM.value)
