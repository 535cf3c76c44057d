"""The process that checks a server's recordings, at the lowest priority: `python -m instep.replay.live_process`.

Each line of standard input is a JSON object: `{"follow": FILE, "position": P, "applied": N}` checks the rows after a
position, before which N frames were applied since the recording began (null: read N from the checkpoint); `{"leave":
FILE, "finish": BOOL}` stops checking it, with `finish` after all committed rows were checked. The process ends when its
standard input ends, which also happens when the server dies. Each line of standard output is the state of a recording.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from instep.replay.live_check import LiveCheck

_NICE: Final = 19
_WORK_S: Final = 0.001
"""The duration of a slice. Frames that are served during it take longer, because the two processes share caches."""
_REST_S: Final = 0.010
"""The pause between two slices."""
_SLICED_S: Final = 0.5
"""Work that takes longer than this in total continues without rests."""
_PAUSE_S: Final = 0.2
"""The pause between two looks at a recording."""
_RETRY_S: Final = 1.0
"""The pause after a look at a recording that could not be read."""
_UNREADABLE_S: Final = 10.0
"""A recording that cannot be read for longer than this is reported; a passing lock is not."""
_TELL_S: Final = 1.0


def run_in_the_background() -> None:
    """Give this process the lowest priority, if the system can."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's own; torch gets the number that the recording names
    os.nice(_NICE)
    if hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


@contextlib.contextmanager
def in_slices() -> Iterator[None]:
    """Work for a millisecond at a time, with rests, for up to `_SLICED_S`; only in the main thread."""
    until = time.monotonic() + _SLICED_S

    def rest(*_: object) -> None:
        if time.monotonic() < until:
            time.sleep(_REST_S)

    signal.signal(signal.SIGALRM, rest)
    signal.setitimer(signal.ITIMER_REAL, _WORK_S, _WORK_S + _REST_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class _Recording:
    def __init__(self, file: str, position: int, applied: int | None) -> None:
        self.file = file
        self.is_finishing = self.is_over = False
        self.due_s = 0.0
        self._begin = (position, applied)
        self._check: LiveCheck | None = None
        self._is_caught_up = False
        self._told_s = self._read_s = time.monotonic()
        self._told = 0

    def look(self) -> None:
        """Check some or all committed frames, and report."""
        from instep.recording.errors import RecordingError, UnavailableRecording, with_advice
        from instep.replay.live_check import LiveCheck
        from instep.replay.report import CannotVerify

        unreadable = ""
        try:
            if self._check is None:
                self._check = LiveCheck.of(Path(self.file), *self._begin)
            is_sliced = self._is_caught_up and not self.is_finishing
            with in_slices() if is_sliced else nullcontext():
                self._is_caught_up = self._check.look(1)
            self._read_s = time.monotonic()
            self.is_over = self.is_finishing and self._is_caught_up
            self.due_s = self._read_s + _PAUSE_S * self._is_caught_up
        except UnavailableRecording as error:
            self.due_s = time.monotonic() + _RETRY_S
            if time.monotonic() - self._read_s > _UNREADABLE_S:
                unreadable = str(error)
        except (RecordingError, CannotVerify) as error:
            self.is_over = True
            _write({"file": self.file, "error": with_advice(error)})
            return
        now_s = time.monotonic()
        if self._check is not None and (
            self.is_over or now_s - self._told_s >= _TELL_S or len(self._check.mismatches) > self._told
        ):
            self._told_s = now_s
            self._tell(self._check, unreadable)

    def _tell(self, check: LiveCheck, unreadable: str) -> None:
        new = check.mismatches[self._told :]
        self._told = len(check.mismatches)
        unread_s = time.monotonic() - self._read_s if unreadable else 0.0
        # One in a line: values of a large output are many, and the server reads no line of any length.
        for at in range(max(1, len(new))):
            status = {
                "file": self.file,
                "frames": check.frames,
                "skipped": check.skipped,
                "trimmed": check.has_trimmed,
                "lag_s": round(check.lag_s + unread_s, 3),
                "position": check.position or 0,
                "applied": check.applied,
                "mismatches": [wrong.as_json() for wrong in new[at : at + 1]],
                "mismatches_total": check.mismatches_total,
                "unreadable": unreadable,
                "left": self.is_over and at + 1 >= len(new),
            }
            _write(status)


def main() -> int:
    """Check recordings until standard input ends; returns the exit status."""
    requests, recordings = queue.SimpleQueue[dict[str, Any] | None](), dict[str, _Recording]()
    Thread(target=_read, args=(requests,), daemon=True).start()
    from instep.models.numerics import one_thread

    with one_thread():
        while True:
            due_s = min((each.due_s for each in recordings.values()), default=math.inf)
            timeout_s = None if due_s == math.inf else max(0.0, due_s - time.monotonic())
            with contextlib.suppress(queue.Empty):
                while True:
                    request = requests.get(timeout=timeout_s)
                    if request is None:
                        return 0
                    _obey(request, recordings)
                    timeout_s = 0.0
            for file, each in list(recordings.items()):
                if each.due_s <= time.monotonic():
                    each.look()
                    if each.is_over:
                        del recordings[file]


def _obey(request: dict[str, Any], recordings: dict[str, _Recording]) -> None:
    if (file := request.get("follow")) is not None:
        recordings[file] = _Recording(file, request["position"], request["applied"])
    elif not request["finish"]:
        recordings.pop(request["leave"], None)
    elif (each := recordings.get(request["leave"])) is not None:
        each.is_finishing, each.due_s = True, 0.0


def _read(requests: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    for line in sys.stdin.buffer:
        requests.put(json.loads(line))
    requests.put(None)


def _write(fields: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(fields, allow_nan=False) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    run_in_the_background()
    sys.exit(main())
