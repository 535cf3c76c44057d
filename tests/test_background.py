"""A process that a server runs beside itself; the rest of it is tested with one (`tests/server`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from instep.server.background import Background
from tests.support.beside import until
from tests.support.models import SMALL
from tests.support.running import running

COUNT = """
import resource, time
from instep.background import in_slices

def rests(seconds: float) -> int:
    before, until = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw, time.thread_time() + seconds
    while time.thread_time() < until:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before

with in_slices():
    sliced, hurried = rests(0.03), rests(0.2)
print(sliced, hurried, rests(0.03))
"""


def test_work_in_slices_rests_between_them() -> None:
    result = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    sliced, hurried, whole = map(int, result.stdout.split())
    assert sliced >= 10, "a rest for each of 30 ms, but for those that a busy machine took"
    assert hurried <= 60, "none after half a second, which has room for 45 of these 200 ms"
    assert whole <= 2, "no rests afterwards"


async def test_processes_beside_a_server_let_all_others_go_first_and_end_with_it(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"recording": {"file": tmp_path / "r.instep"}, "verify": {"live": True}}

    def is_idle(pid: int | None) -> bool:
        if pid is None:
            return False
        return (os.sched_getscheduler(pid), os.getpriority(os.PRIO_PROCESS, pid)) == (os.SCHED_IDLE, 19)

    async with running(SMALL, background=Background(), **sections) as server:
        checker = server.default.verification
        assert checker is not None
        await until(lambda: is_idle(checker.pid))
        pid = checker.pid
    assert pid is not None
    assert not psutil.pid_exists(pid)
