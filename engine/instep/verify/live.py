"""The process that checks what a server records, at the lowest priority: `python -m instep.verify.live`.

The first line of its standard input is a JSON object with the fields of `Begin`. Its statuses are those of
`throttle.Status`, and have `wrong` where that is not as last told: the streams that the next process is to know. When
its standard input ends, it checks what is committed by then and ends.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from instep.background import AGAIN, CANNOT, end_of_input, in_slices, run_in_the_background, write

if TYPE_CHECKING:
    from instep.verify.mismatches import StreamNumbers
    from instep.verify.throttle import Status


@dataclass(slots=True)
class Begin:
    """Where a process begins, from the statuses of the one before."""

    position: int = 0
    """Everything up to here was read."""
    waiting: int = 0
    """Of these frames, how many waited for a checkpoint."""
    applied: int | None = None
    """How many frames were applied up to there since the recording began; None where it is a checkpoint's."""
    wrong: list[list[int]] = field(default_factory=list)
    """Streams in which a mismatch was told, as `StreamNumbers.pairs`."""


def command(file: Path) -> list[str]:
    """The module and arguments of a process that checks a recording."""
    return ["instep.verify.live", str(file)]


def main(arguments: list[str]) -> int:
    """Follow a recording until standard input ends; the exit status."""
    file, begin = Path(arguments[0]), Begin(**json.loads(sys.stdin.buffer.readline()))
    from instep.models.numerics import one_thread
    from instep.recording.errors import RecordingError, UnavailableRecording, with_advice
    from instep.verify.following import Follower, model_of
    from instep.verify.report import CannotVerify
    from instep.verify.throttle import follow

    stopped = end_of_input()
    try:
        told = [(number, closing) for number, closing in begin.wrong]
        follower = Follower(file, model_of(file, None), begin.position, begin.waiting, begin.applied, told=told)
        with one_thread():
            tell = partial(_tell, begin, follower.mismatches.streams)
            follow(follower, tell, stopped, finishes=True, slices=in_slices)
    except UnavailableRecording as error:
        sys.stderr.write(f"{error}\n")
        return AGAIN
    except (RecordingError, CannotVerify) as error:
        write({"error": with_advice(error)})
        return CANNOT
    return 0


def _tell(told: Begin, streams: StreamNumbers, status: Status) -> None:
    wrong = [list(pair) for pair in streams.pairs()]
    write(status.as_json() | ({} if wrong == told.wrong else {"wrong": wrong}))
    told.wrong = wrong


if __name__ == "__main__":
    run_in_the_background()
    sys.exit(main(sys.argv[1:]))
