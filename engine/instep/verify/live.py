"""The process that checks what a server records, at the lowest priority: `python -m instep.verify.live`.

The first line of its standard input is a JSON object with the fields of `Begin`. It writes a JSON object a line to
standard output: each is a status (see `throttle.Status`), or says with `error` why nothing can be checked. A status has
`wrong` where that is not as last told: the streams that the next process is to know. When its standard input ends,
which is also when the server dies, it checks what is committed by then and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from instep.verify.mismatches import StreamNumbers
    from instep.verify.throttle import Status

AGAIN: Final = 1
"""The exit status where the recording could not be read at the moment; a bug ends Python with the same."""
CANNOT: Final = 2
"""The exit status where nothing can be checked, and a new process could not either."""
_NICE: Final = 19


@dataclass(slots=True)
class Begin:
    """Where a process begins, from the statuses of the one before."""

    position: int = 0
    """Everything up to here was read."""
    waiting: int = 0
    """Of these frames, how many waited for a checkpoint."""
    wrong: list[list[int]] = field(default_factory=list)
    """Streams in which a mismatch was told, as `StreamNumbers.pairs`."""


def command(file: Path) -> list[str]:
    """The command line that checks a recording."""
    return [sys.executable, "-m", "instep.verify.live", str(file)]


def main(arguments: list[str]) -> int:
    """Follow a recording until standard input ends; the exit status."""
    run_in_the_background()
    file, begin = Path(arguments[0]), Begin(**json.loads(sys.stdin.buffer.readline()))
    from instep.recording.errors import RecordingError, UnavailableRecording, with_advice
    from instep.verify.conditions import recorded_threads
    from instep.verify.following import Follower, model_of
    from instep.verify.report import CannotVerify
    from instep.verify.throttle import follow

    stopped = Event()
    Thread(target=_wait_for_the_end, args=(stopped,), daemon=True).start()
    try:
        header, model = model_of(file, None)
        with recorded_threads(header):
            told = [(number, closing) for number, closing in begin.wrong]
            follower = Follower(file, model, begin.position, begin.waiting, told=told)
            follow(follower, partial(_tell, begin, follower.mismatches.streams), stopped, finishes=True)
    except UnavailableRecording as error:
        sys.stderr.write(f"{error}\n")
        return AGAIN
    except (RecordingError, CannotVerify) as error:
        _write({"error": with_advice(error)})
        return CANNOT
    return 0


def run_in_the_background() -> None:
    """Let every other process go first, where the system can."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's own; torch gets the number that the recording names
    os.nice(_NICE)
    if hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _tell(told: Begin, streams: StreamNumbers, status: Status) -> None:
    wrong = [list(pair) for pair in streams.pairs()]
    _write(status.as_json() | ({} if wrong == told.wrong else {"wrong": wrong}))
    told.wrong = wrong


def _write(fields: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(fields, allow_nan=False) + "\n")
    sys.stdout.flush()


def _wait_for_the_end(stopped: Event) -> None:
    while os.read(0, 4096):
        pass
    stopped.set()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
