"""The process that forks commands for tests: they are ended as others are, and none is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import psutil
import pytest

from instep.models.folder import write_model
from tests.support import warm_server
from tests.support.models import SMALL
from tests.support.warm import WarmProcess, run_instep, run_program


def test_arguments_folder_environment_and_status_are_those_that_were_given(tmp_path: Path) -> None:
    write_model(tmp_path / "m", SMALL)
    fine = run_instep(["model", "check", "m"], tmp_path)
    assert (fine.returncode, fine.stderr) == (0, "")
    assert fine.stdout.startswith(f"{SMALL.name}: ")
    wrong = run_instep(["model", "check", "gone"], tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "gone" in wrong.stderr
    command = ["serve", "m", "--endpoint", "tcp://127.0.0.1:*", "--http", "off"]
    for sent, status in ((signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)):
        process = WarmProcess(command, cwd=tmp_path, env={**os.environ, "INSTEP_LOG__FORMAT": "json"})
        assert process.stderr is not None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        assert any('"event": "serving"' in line for line in iter(process.stderr.readline, ""))
        process.send_signal(sent)
        process.communicate(timeout=60)
        assert process.returncode == status
        process.send_signal(sent)  # to nobody


def test_a_program_runs_in_its_folder_and_a_signal_reaches_it_however_early(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("import sys\nprint(__name__, sys.argv)\n")
    (tmp_path / "program.py").write_text("import beside, time\nprint(__name__, flush=True)\ntime.sleep(100)\n")
    for _ in range(10):
        process = WarmProcess([], program="program.py", cwd=tmp_path)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=50)
        assert (process.returncode, "KeyboardInterrupt" in stderr) == (1, True), stdout + stderr
    done = run_program("beside.py", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "__main__ ['beside.py']\n", "")


ASK: Final = """
import sys, time
from tests.support.warm import WarmProcess
process = WarmProcess([], program="sleep.py")
print(process.pid, flush=True)
time.sleep(100)
"""


@pytest.mark.long
def test_all_that_was_forked_ends_with_the_tests_however_they_end(tmp_path: Path) -> None:
    (tmp_path / "sleep.py").write_text("import time\ntime.sleep(100)\n")
    environment = {name: value for name, value in os.environ.items() if name != warm_server.ADDRESS}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", ASK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment) as tests:
        assert tests.stdout is not None
        fork = psutil.Process(int(tests.stdout.readline()))
        tests.kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        fork.wait(60)
    for _ in range(6000):
        if not list(tmp_path.glob("warm-*")):
            break
        time.sleep(0.01)
    else:
        pytest.fail("the folder of the socket is left")
