"""SIGINT, SIGTERM and SIGHUP: how commands end; `server/test_serve.py` and `test_reload.py` have those of a server."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from instep.interrupts import ENDINGS
from instep.models.folder import write_model
from tests.support.models import SMALL
from tests.support.warm import run_program
from tests.support.written import write_recording

SIGNALLED = """
import os, pkgutil, sys
from instep import __main__

owner, name, words, numbers = sys.argv[1:5]
del sys.argv[1:5]
place = pkgutil.resolve_name(owner)
original = getattr(place, name)
def signalled(*arguments, **options):
    if words in str(arguments):
        for number in numbers.split():
            os.kill(os.getpid(), int(number))
    return original(*arguments, **options)

setattr(place, name, signalled)
__main__.main()
"""
"""`instep`, where signals come just before it calls a function with an argument that contains some words."""
UNTIDY = """
import os, sys
from instep import interrupts

interrupts.end_at_once()
interrupts.raise_stopped()
try:
    os.kill(os.getpid(), int(sys.argv[1]))
finally:
    os.kill(os.getpid(), int(sys.argv[1]))
    print("cleaned up")
"""
"""A command that is told to end again while it cleans up."""


def signalled_in(
    place: str, name: str, words: str, number: signal.Signals, folder: Path, *command: str
) -> CompletedProcess[str]:
    (folder / "signalled.py").write_text(SIGNALLED)
    return run_program(str(folder / "signalled.py"), folder, place, name, words, str(int(number)), *command)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_that_does_not_serve_yet_ends_at_once(number: signal.Signals, tmp_path: Path) -> None:
    write_model(tmp_path / "model", SMALL)
    command = ("serve", "model", "--endpoint", "tcp://127.0.0.1:*", "--http", "off")
    done = signalled_in("instep.server.preparation", "build", "", number, tmp_path, *command)
    assert done.returncode == 128 + number
    assert "Traceback" not in done.stderr
    assert "ready" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize(
    ("place", "name", "words", "command"),
    [
        ("sqlite3", "connect", ".part", "recordings cut a.rec --output out.rec"),
        ("sqlite3", "connect", "a.rec", "verify a.rec --json"),
    ],
)
def test_a_stopped_command_leaves_nothing_and_says_so(
    number: signal.Signals, place: str, name: str, words: str, command: str, tmp_path: Path
) -> None:
    write_recording(tmp_path)
    before = set(tmp_path.iterdir())
    done = signalled_in(place, name, words, number, tmp_path, *command.split())
    assert done.returncode == 128 + number, done.stderr
    assert f"stopped by {number.name}" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "--json" not in command or f"stopped by {number.name}" in json.loads(done.stdout)["error"]
    assert set(tmp_path.iterdir()) - before == {tmp_path / "signalled.py"}


@pytest.mark.parametrize("number", ENDINGS)
def test_a_second_signal_ends_a_command_that_cleans_up(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "untidy.py").write_text(UNTIDY)
    done = run_program(str(tmp_path / "untidy.py"), tmp_path, str(int(number)))
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "")
