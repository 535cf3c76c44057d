"""The frames whose outputs a follower has found to be wrong: one for each stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, Final

import numpy as np

from instep.verify.checkers import Task
from instep.verify.replay import replay_stepped
from instep.verify.report import Divergence

MOST_PAIRS: Final = 2**16
"""Streams of which the next process is told: a status of more would be longer than the server reads."""


@dataclass(frozen=True, slots=True)
class WrongOutput:
    """A frame whose recorded output is not the one that was computed again."""

    stream: str
    number: int
    """Of the opening, in the recording."""
    seq: int
    expected: list[float]
    """The output as computed again; empty where the frame itself is out of order."""
    got: list[float]
    """The recorded output."""
    sentence: str
    """The first difference, in words."""

    def as_json(self) -> dict[str, Any]:
        """Plain values; values that are not finite become strings."""
        finite = [[each if isfinite(each) else str(each) for each in values] for values in (self.expected, self.got)]
        return asdict(self) | dict(zip(("expected", "got"), finite, strict=True))


class StreamNumbers:
    """Numbers of streams. One that has closed is forgotten once nothing before its end can be read again.

    Args:
        pairs: each number, and the position at which its stream closed; 0 while it is open.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]] = ()) -> None:
        self._closings = {number: position for number, position in pairs if position}
        self._numbers = {number for number, _ in pairs}

    def __contains__(self, number: int) -> bool:
        return number in self._numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def pairs(self) -> list[tuple[int, int]]:
        """As in the arguments, by number; of more than `MOST_PAIRS` those that opened last."""
        return [(number, self._closings.get(number, 0)) for number in sorted(self._numbers)[-MOST_PAIRS:]]

    def add(self, number: int) -> bool:
        """Whether it was not there before."""
        is_new = number not in self._numbers
        self._numbers.add(number)
        return is_new

    def close(self, number: int, position: int) -> None:
        """A stream has closed, whether its number is here or not."""
        if number in self._numbers:
            self._closings[number] = position

    def forget(self, position: int) -> None:
        """Nothing up to a position is read again."""
        for number in [number for number, closing in self._closings.items() if closing <= position]:
            del self._closings[number]
            self._numbers.remove(number)

    def keep(self, numbers: set[int]) -> None:
        """Nothing is read again of other streams than these."""
        self._numbers &= numbers
        self._closings = {number: position for number, position in self._closings.items() if number in numbers}


class Mismatches:
    """Counts the streams that are wrong, and keeps the values of the first ones.

    Args:
        told: streams that were told of before, as `StreamNumbers.pairs`; they do not count again.
        most_kept: of how many mismatches the values are kept.

    Attributes:
        kept: the first ones.
        total: how many there are.
        streams: those that a mismatch was found in.
    """

    def __init__(self, told: Sequence[tuple[int, int]], most_kept: int) -> None:
        self.kept: list[WrongOutput] = []
        self.total = 0
        self._most_kept = most_kept
        self.streams = StreamNumbers(told)

    def add(self, wrong: WrongOutput) -> None:
        """A frame is wrong; it counts unless another one of its stream was."""
        if self.streams.add(wrong.number):
            self.total += 1
            if len(self.kept) < self._most_kept:
                self.kept.append(wrong)


def wrong_output(task: Task, row: int, divergence: Divergence) -> WrongOutput:
    """The frame of a task's row that was found to be wrong, with its output as computed again."""
    check, frames = task.checks[row], divergence.frame - task.checks[row].first_seq + 1
    span = next(task.chunk.only(np.array([row])).spans())
    state, alone = task.initial_states()[[row]], np.ones(frames, np.int64)
    y, _ = replay_stepped(task.checkers.network, span.x[:frames], state, alone)
    expected, got = y[-1, 0].tolist(), span.y[frames - 1, 0].tolist()
    return WrongOutput(check.info.name, check.info.stream, divergence.frame, expected, got, divergence.sentence())
