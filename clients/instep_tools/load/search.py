"""The largest number of streams that still meets a service level: doubling, then bisection."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import count
from math import isqrt
from typing import Final

from instep_client.protocol.errors import InstepError
from instep_tools.load.result import Measured, Verdict
from instep_tools.pacing import Stop
from instep_tools.problems import CommandProblem
from instep_tools.words import counted

RESOLUTION: Final = 1 / 32
"""The search ends when the answer is known to this part of itself."""
FAILURES_TO_BELIEVE: Final = 2
"""A size counts as too large when it failed this often: one hiccup of the machine decides nothing."""
ADVICE: Final = "use more --processes, a larger --block, or a lower --rate, or run it on another machine"
SENT_MOST: Final = 0.75
"""A load generator that sent this share of the frames due can send for half of the streams with a third of its time to
spare. (Short tries end with some frames due that it would have sent.)"""
NO_LESS_LATE: Final = 0.75
"""If half of the streams leave it this late, as a share of its lateness with all, their number is not the cause."""
BUSY: Final = "this machine is busy: run it while the machine is idle, with a lower --rate, or on another machine"

Try = Callable[[int, int], Awaitable[Measured]]
"""Serves that many streams, from that many processes."""


def next_size(good: int, bad: int, limit: int, most: int) -> int | None:
    """The next number of streams to try; None when the answer is known to within `RESOLUTION`.

    Args:
        good: the largest that met the level; 0 for none.
        bad: the smallest that did not; more than `limit` for none.
        limit: the largest that may be tried.
        most: the largest that is worth trying while none has met the level.
    """
    if good >= limit or (bad <= limit and bad - good <= max(1, int(good * RESOLUTION))):
        return None
    if bad > limit:
        return min(2 * good, limit)
    if good:
        # Where `most` had jumped far below `bad`, perhaps because of a stall, a step halves their ratio.
        return min(max(2 * good, isqrt(good * bad)), (good + bad) // 2)
    return max(1, min(bad // 2, most))


def tries(start: int, limit: int) -> tuple[int, int]:
    """The smallest and the largest number of tries that a search may take, unless the load generator is too slow."""

    def count_from(good: int, bad: int, streams: int | None) -> tuple[int, int]:
        if streams is None:
            return 0, 0
        met = count_from(streams, bad, next_size(streams, bad, limit, limit))
        missed = count_from(good, streams, next_size(good, streams, limit, limit))
        return (
            min(1 + met[0], FAILURES_TO_BELIEVE + missed[0]),
            FAILURES_TO_BELIEVE + max(met[1], missed[1]),  # a size that is met may fail once before
        )

    return count_from(0, limit + 1, start)


def advice(streams: int) -> str:
    """Advice for when the load generator could not keep up with this number of streams."""
    return BUSY if streams == 1 else ADVICE


@dataclass
class Search:
    """A search, and what it has found so far.

    A try in which the load generator was late says nothing about the server. It is repeated with twice the processes,
    up to one a core; where that does not help, no larger number of streams is tried. While no number has met the level,
    the next one is what the load generator could send, or half if that is less. A stall makes that far too little, so
    the one after it is not its double, but in the middle between both, by their ratio. The search ends when fewer
    streams do not make the load generator less late.
    """

    attempt: Try
    slo_ms: float
    processes: int
    stop: Stop
    trials: list[Measured] = field(default_factory=list)
    limited: bool = False
    """It ended at the most that the server has room for."""
    ended: str = ""
    """Why a larger number may be possible than the one that was found."""
    measured_itself: bool = False
    """That was the load generator."""

    @property
    def best(self) -> Measured | None:
        """The largest load that met the level."""
        met = [trial for trial in self.trials if trial.verdict(self.slo_ms) == "met"]
        return max(met, key=lambda trial: trial.plan.streams, default=None)

    @property
    def is_all_invalid(self) -> bool:
        """Whether no try says anything about the server."""
        return all(trial.verdict(self.slo_ms) == "invalid" for trial in self.trials)

    async def run(self, start: int, limit: int) -> None:
        """Double from `start` while the level is met (halve while it is not), then bisect, as `next_size` says.

        Raises:
            InstepError: when the server does not take the first try.
            CommandProblem: when not even the first try can be made.
        """
        good, bad = 0, limit + 1
        following: int | None = start
        while following is not None:
            streams = following
            verdict = await self._judge(streams)
            if verdict is None:
                return
            if verdict == "met":
                good = streams
            else:
                bad, self.measured_itself = streams, verdict == "invalid"
            if not good and self._is_late_anyway():
                self.ended = f"with {counted(bad, 'stream')} the load generator was as late as with more; {BUSY}"
                return
            following = next_size(good, bad, limit, self._could_send(streams) if verdict == "invalid" else limit)
        self.limited = good == limit
        if self.measured_itself:
            self.ended = f"with {counted(bad, 'stream')} the load generator could not keep up; {advice(bad)}"

    def _could_send(self, streams: int) -> int:
        """For how many streams this side could send when it tried so many; `streams` itself where it sent nothing."""
        share = max(trial.sent_share for trial in self.trials if trial.plan.streams == streams)
        return int(streams * share) or streams

    def _is_late_anyway(self) -> bool:
        """Whether the last two sizes, of which the second is at most half of the first, were invalid, and as late."""
        newest = self.trials[-1]
        before = next((trial for trial in self.trials[::-1] if trial.plan.streams != newest.plan.streams), None)
        if before is None:
            return False
        for trial in (before, newest):
            if trial.verdict(self.slo_ms) != "invalid" or trial.sent_share < SENT_MOST:
                return False
        return newest.own_p99_us > NO_LESS_LATE * before.own_p99_us

    async def _judge(self, streams: int) -> Verdict | None:
        """What a number of streams comes to; None when the search is over."""
        failures = 0
        for number in count(1):
            try:
                trial = await self.attempt(streams, min(self.processes, streams))
            except (InstepError, CommandProblem) as error:
                if not self.trials:
                    raise
                self.ended = f"the search ended there: {error}"
                return None
            if self.stop.requested:
                self.ended = "the search was stopped before its end"
                return None
            self.trials.append(trial)
            if trial.found.lost:
                self.ended = f"the search ended there: {trial.found.lost}"
                return None
            verdict = trial.verdict(self.slo_ms)
            failures += verdict == "not met"
            if verdict == "met" or failures == FAILURES_TO_BELIEVE:
                return verdict
            if verdict == "invalid":
                more = max(self.processes, min(2 * self.processes, os.cpu_count() or 1, streams))
                if more == self.processes and number > 1:
                    return verdict
                self.processes = more
        raise AssertionError
