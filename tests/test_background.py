"""A process that a server runs beside itself; the rest of it is tested with one (`tests/server`)."""

from __future__ import annotations

import subprocess
import sys

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
