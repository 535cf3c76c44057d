from __future__ import annotations

import importlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import instep_tools
from instep import interrupts
from instep.interrupts import Stopped
from instep.recording.cut import cut
from instep.recording.inspection import inspect
from tests.support.forger import Forger
from tests.support.interrupting import interrupted_at_every_moment
from tests.support.warm import WarmProcess, run_program
from tests.support.written import write_recording

SERVE = ("serve", "--demo", "--endpoint", "tcp://127.0.0.1:*", "--http", "off")
COPIED = """
import os, signal
from instep import __main__
from instep.server import serve

run = serve.run
def run_and_copy(*arguments, **options):
    status = run(*arguments, **options, on_ready=lambda _: os.kill(os.getpid(), signal.SIGTERM))
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    return status

serve.run = run_and_copy
__main__.main()
"""
"""`instep`, where signals come just after a server has ended in order."""

STOPPED = """
import os, pkgutil, sys
from instep import __main__

owner, name, number = sys.argv[1:4]
del sys.argv[1:4]
place = pkgutil.resolve_name(owner)
original = getattr(place, name)
def stopped(*arguments, **options):
    stops = []
    for _ in range(2):  # as `timeout` passes on what the whole process group gets
        try:
            os.kill(os.getpid(), int(number))
        except BaseException as stop:
            stops.append(stop)
    if stops:
        (stop,) = stops  # or the copy has stopped it again, in the middle of its cleaning up
        raise stop
    return original(*arguments, **options)

setattr(place, name, stopped)
__main__.main()
"""
"""`instep`, where the same signal comes twice as it calls a function."""
REPORTS = """
import sys, time
from instep import interrupts

interrupts.end_at_once()
interrupts.raise_stopped()
try:
    sys.stderr.write("ready")
    while True:
        time.sleep(0.1)  # a signal that comes just before a sleep is handled after it
except interrupts.Stopped:
    print("the report")
    print("a remark", file=sys.stderr)
"""
"""A program that ends with its report once a signal comes."""
IMPORTED = """
import os, signal

try:
    os.kill(os.getpid(), signal.SIGTERM)
except BaseException:
    raise ImportError("initialization failed")
is_complete = True
"""
"""A module during whose import a signal comes; it answers what is raised there as packages in C do."""


def stopped_as_it_calls(
    owner: str, name: str, number: signal.Signals, folder: Path, command: str
) -> subprocess.CompletedProcess[str]:
    """Run `instep` with a signal that comes as it calls a function."""
    (folder / "stopped.py").write_text(STOPPED)
    return run_program(str(folder / "stopped.py"), folder, owner, name, str(int(number)), *command.split())


def damage(recording: Path, copy: Path) -> None:
    """Copy a recording, and damage the copy behind its first frames."""
    Forger(recording, copy, fix_crc=False).change("outputs", 15, time_ns=7)


@pytest.fixture
def handler_kept() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.heavy
def test_serve_ends_quietly_whenever_it_is_interrupted(tmp_path: Path) -> None:
    """From its first line until long after it serves: 130 before it serves, 0 after, and never a traceback."""
    for ending in interrupted_at_every_moment("instep.__main__", SERVE, tmp_path, step_s=0.3, last_s=2.1):
        assert "Traceback" not in ending.stderr, ending
        assert ending.status == (0 if "stopped" in ending.stderr else 130), ending


@pytest.mark.heavy
def test_serve_ends_with_a_sentence_when_it_is_told_to_before_it_serves(tmp_path: Path) -> None:
    number = signal.SIGTERM
    for ending in interrupted_at_every_moment("instep.__main__", SERVE, tmp_path, 0.7, 2.1, number=number):
        assert "Traceback" not in ending.stderr, ending
        if "serving" in ending.stderr:
            assert "stopped" in ending.stderr, ending
            assert ending.status == 0, ending
        elif ending.delay_s:
            assert ending.stderr.endswith(f"instep was ended by {number.name}\n"), ending
            assert ending.status == 128 + number, ending


def test_a_hangup_ends_other_commands_with_a_sentence_and_serve_not_at_all(tmp_path: Path) -> None:
    for name, ends in (("serve", False), ("verify", True)):
        script = f"import sys\nsys.argv[1:] = ['{name}', 'x']\nimport os\nfrom instep import __main__, cli\n"
        script += "cli.main = lambda: os.kill(os.getpid(), 1)\n__main__.main()\n"
        done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == ((129, "instep was ended by SIGHUP\n") if ends else (0, ""))


@pytest.mark.heavy
def test_serve_interrupted_twice_ends_quietly_and_in_order_where_it_is_one_signal(tmp_path: Path) -> None:
    for number, again_s in ((signal.SIGINT, 0.01), (signal.SIGTERM, 0.02), (signal.SIGINT, 0.1), (signal.SIGINT, 0.6)):
        process = WarmProcess(SERVE, cwd=tmp_path)
        try:
            assert process.stderr is not None
            assert any("serving" in line for line in process.stderr)
            process.send_signal(number)
            time.sleep(again_s)
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
        assert "Traceback" not in said
        assert process.returncode in ((0, 130) if again_s > instep_tools.SAME_SIGNAL_S else (0,)), said


def test_serve_that_has_ended_is_not_ended_by_a_copy_of_its_signal(tmp_path: Path) -> None:
    program = tmp_path / "copied.py"
    program.write_text(COPIED)
    done = run_program(str(program), tmp_path, *SERVE)
    assert done.returncode == 0, done.stderr
    assert "stopped" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("number", "owner", "name", "command", "said", "promised"),
    [
        (signal.SIGINT, "instep.recording.inspection", "inspect", "recordings cut a.rec out.rec", "not cut", None),
        (signal.SIGTERM, "instep.recording.inspection", "inspect", "recordings cut a.rec out.rec", "not cut", None),
        (
            signal.SIGINT,
            "instep.recording.inspection",
            "inspect",
            "recordings cut a.rec b.rec --json",
            "not cut",
            "cut",
        ),
        (signal.SIGTERM, "instep.recording.table:FrameTable", "chunks", "export a.rec", "not exported", None),
        (
            signal.SIGINT,
            "instep.recording.table:FrameTable",
            "chunks",
            "export a.rec --json",
            "not exported",
            "exported",
        ),
        (signal.SIGTERM, "instep.verify.command", "recorded_model", "verify a.rec --json", "not checked", "verified"),
        (signal.SIGHUP, "instep.verify.command", "recorded_model", "verify a.rec b.rec", "a.rec: not checked", None),
    ],
)
def test_a_stopped_command_leaves_nothing_and_says_so(
    tmp_path: Path, number: signal.Signals, owner: str, name: str, command: str, said: str, promised: str | None
) -> None:
    write_recording(tmp_path)
    before = set(tmp_path.iterdir())
    (tmp_path / "stopped.py").write_text(STOPPED)
    done = run_program(str(tmp_path / "stopped.py"), tmp_path, owner, name, str(int(number)), *command.split())
    assert done.returncode == 128 + number, done.stderr
    assert done.stderr.startswith(f"{said}: stopped by {number.name}")
    assert done.stderr.count("\n") == 1
    assert set(tmp_path.iterdir()) - before == {tmp_path / "stopped.py"}
    if promised is not None:
        assert json.loads(done.stdout)[promised] is False
    else:
        assert done.stdout == ""


@pytest.mark.parametrize(
    ("owner", "name"),
    [("instep.recording.commands", "inspect"), ("instep.recording.repair", "insert")],
    ids=["as it reads", "as it writes"],
)
@pytest.mark.parametrize("options", ["", " --json"])
def test_a_stopped_repair_leaves_nothing_and_says_so(tmp_path: Path, owner: str, name: str, options: str) -> None:
    damage(write_recording(tmp_path).path, tmp_path / "damaged.rec")
    before = set(tmp_path.iterdir())
    command = f"recordings repair damaged.rec out.rec{options}"
    done = stopped_as_it_calls(owner, name, signal.SIGTERM, tmp_path, command)
    said = "not repaired: stopped by SIGTERM, and nothing was written"
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, f"{said}\n")
    assert set(tmp_path.iterdir()) - before == {tmp_path / "stopped.py"}
    if options:
        assert json.loads(done.stdout) == {"file": "damaged.rec", "repaired": False, "error": said}
    else:
        assert done.stdout == ""


@pytest.mark.parametrize(
    ("owner", "name", "left"),
    [
        ("instep.recording.cut", "insert", {".py", ".rec-lock", ".part", ".part-journal"}),
        ("instep.recording.inspection", "inspect", {".py", ".rec-lock", ".part"}),
    ],
    ids=["as it writes", "as it reads"],
)
def test_the_next_run_removes_what_a_killed_one_has_left(tmp_path: Path, owner: str, name: str, left: set[str]) -> None:
    write_recording(tmp_path)
    out, others = tmp_path / "out.rec", tmp_path / ".out.rec.2.0123abcd.part"
    others.touch()
    before = set(tmp_path.iterdir())
    done = stopped_as_it_calls(owner, name, signal.SIGKILL, tmp_path, "recordings cut a.rec out.rec")
    assert done.returncode == -signal.SIGKILL
    assert {each.suffix for each in set(tmp_path.iterdir()) - before} == left
    assert cut(tmp_path / "a.rec", out, None, None).frames
    assert set(tmp_path.iterdir()) == before | {out, tmp_path / "stopped.py"}


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGINT, ""),
        (signal.SIGTERM, "instep was ended by SIGTERM\n"),
        (signal.SIGHUP, "instep was ended by SIGHUP\n"),
    ],
)
@pytest.mark.parametrize(
    ("owner", "name", "command"),
    [
        ("instep.timetravel.state", "recorded_model", "replay-from a.rec 0 --seq 1"),
        ("instep.timetravel.state", "recorded_model", "recordings state a.rec 0"),
        ("instep.shadow.command", "load_version", "model shadow a.rec model"),
    ],
)
def test_a_command_that_cleans_up_says_which_signal_has_ended_it(
    tmp_path: Path, owner: str, name: str, command: str, number: signal.Signals, said: str
) -> None:
    write_recording(tmp_path)
    (tmp_path / "stopped.py").write_text(STOPPED)
    done = run_program(str(tmp_path / "stopped.py"), tmp_path, owner, name, str(int(number)), *command.split())
    assert (done.returncode, done.stderr) == (128 + number, said)


@pytest.mark.parametrize("command", ["recordings cut a.rec out.rec", "recordings repair damaged.rec out.rec"])
@pytest.mark.parametrize(("owner", "name"), [("os", "unlink"), ("instep.recording.commands", "say")])
def test_nothing_stops_a_command_whose_new_file_has_its_name(
    tmp_path: Path, owner: str, name: str, command: str
) -> None:
    """Not while the other files that it has made are removed, nor when the command says what it has done."""
    damage(write_recording(tmp_path).path, tmp_path / "damaged.rec")
    done = stopped_as_it_calls(owner, name, signal.SIGTERM, tmp_path, command)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("out.rec: ")
    assert inspect(tmp_path / "out.rec", lambda _: None).frames


def test_nothing_stops_a_repair_that_says_that_nothing_is_damaged(tmp_path: Path) -> None:
    write_recording(tmp_path)
    done = stopped_as_it_calls("instep.recording.commands", "say", signal.SIGTERM, tmp_path, "recordings repair a.rec")
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing to repair" in done.stdout


@pytest.mark.usefixtures("handler_kept")
def test_a_command_that_stops_no_more_passes_over_signals() -> None:
    interrupts.end_at_once()
    interrupts.raise_stopped()
    interrupts.stop_no_more()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.raise_signal(number)
    interrupts.raise_stopped()
    with pytest.raises(interrupts.Stopped):
        signal.raise_signal(signal.SIGTERM)


def test_a_line_ends_behind_what_the_terminal_echoes() -> None:
    script = "import os, signal\nfrom instep import interrupts\ninterrupts.end_at_once()\nos.kill(os.getpid(), 2)"
    terminal, program = pty.openpty()
    with os.fdopen(terminal, "rb", buffering=0) as screen:
        with os.fdopen(program, "wb") as stderr:
            assert subprocess.run([sys.executable, "-c", script], stderr=stderr, check=False).returncode == 130
            assert screen.read(10) == b"\r\n"


@pytest.mark.parametrize("to_file", [False, True])
def test_what_goes_to_a_terminal_that_has_closed_is_dropped(tmp_path: Path, to_file: bool) -> None:
    terminal, program = pty.openpty()
    with os.fdopen(terminal, "rb", buffering=0) as screen, open(tmp_path / "report", "wb") as file:
        with os.fdopen(program, "wb") as stderr:
            stdout = file if to_file else stderr
            process = subprocess.Popen([sys.executable, "-c", REPORTS], stdout=stdout, stderr=stderr)
        try:
            assert screen.read(5) == b"ready"
            screen.close()
            process.send_signal(signal.SIGHUP)
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
    assert (tmp_path / "report").read_text() == ("the report\n" if to_file else "")


@pytest.mark.usefixtures("handler_kept")
def test_only_its_own_handler_is_taken_back() -> None:
    def theirs(number: int, frame: object) -> None: ...

    signal.signal(signal.SIGINT, theirs)
    interrupts.raise_stopped()
    assert signal.getsignal(signal.SIGINT) is theirs
    interrupts.end_at_once()
    interrupts.raise_stopped()
    with pytest.raises(Stopped):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", interrupts.ENDINGS)
@pytest.mark.usefixtures("handler_kept")
def test_a_command_is_stopped_once_by_one_signal(number: signal.Signals) -> None:
    interrupts.end_at_once()
    interrupts.raise_stopped(same_signal_s=1e9)
    with pytest.raises(Stopped):
        signal.raise_signal(number)
    signal.raise_signal(number)
    interrupts.end_at_once()
    interrupts.raise_stopped(same_signal_s=0.0)
    for _ in range(2):
        with pytest.raises(Stopped):
            signal.raise_signal(number)


@pytest.mark.usefixtures("handler_kept")
def test_a_command_in_another_thread_changes_no_handler() -> None:
    interrupts.end_at_once()
    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(interrupts.raise_stopped).result()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("handler_kept")
def test_a_signal_that_comes_during_an_import_stops_the_command_once_that_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "is_imported.py").write_text(IMPORTED)
    monkeypatch.syspath_prepend(str(tmp_path))
    interrupts.end_at_once()
    interrupts.raise_stopped()

    def import_and_wait() -> None:
        importlib.import_module("is_imported")
        time.sleep(60)

    with pytest.raises(interrupts.Stopped):
        import_and_wait()
    assert sys.modules.pop("is_imported").is_complete


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("handler_kept")
def test_a_signal_that_is_ignored_stops_no_command(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)
    interrupts.end_at_once()
    interrupts.raise_stopped()
    signal.raise_signal(number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("handler_kept")
def test_once_the_work_is_done_nothing_is_interrupted(number: signal.Signals) -> None:
    interrupts.end_at_once()
    interrupts.raise_stopped()
    interrupts.change_nothing()
    signal.raise_signal(number)
