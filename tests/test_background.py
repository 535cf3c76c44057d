"""A process that a server runs beside itself; the rest of it is tested with one (`tests/server`)."""

from __future__ import annotations

import subprocess
import sys

COUNT = """
import resource, time
from instep.background import in_slices

def rests() -> int:
    before, until = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw, time.thread_time() + 0.03
    while time.thread_time() < until:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before

with in_slices():
    sliced = rests()
print(sliced, rests())
"""


def test_work_in_slices_rests_between_them() -> None:
    result = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    sliced, whole = map(int, result.stdout.split())
    assert sliced >= 10, "a rest for each of 30 ms, but for those that a busy machine took"
    assert whole <= 2, "no rests afterwards"
