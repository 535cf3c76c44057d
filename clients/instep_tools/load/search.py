"""The largest number of streams that still meets a service level: doubling, then bisection."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import count
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
BUSY: Final = "this machine is busy: run it while the machine is idle, with a lower --rate, or on another machine"

Try = Callable[[int, int], Awaitable[Measured]]
"""Serves that many streams, from that many processes."""


def advice(streams: int) -> str:
    """Advice for when the load generator could not keep up with this number of streams."""
    return BUSY if streams == 1 else ADVICE


@dataclass
class Search:
    """A search, and what it has found so far.

    A try in which the load generator was late says nothing about the server. It is repeated with twice the processes,
    up to one a core; where that does not help, no larger number of streams is tried.
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

    async def run(self, start: int, limit: int) -> None:
        """Double from `start` while the level is met (halve while it is not), then bisect to within `RESOLUTION`.

        Raises:
            InstepError: when the server does not take the first try.
            CommandProblem: when not even the first try can be made.
        """
        good, bad, streams = 0, limit + 1, start
        while good < limit and (bad > limit or bad - good > max(1, int(good * RESOLUTION))):
            verdict = await self._judge(streams)
            if verdict is None:
                return
            if verdict == "met":
                good = streams
            else:
                bad, self.measured_itself = streams, verdict == "invalid"
            if bad > limit:
                streams = min(2 * good, limit)
            elif good:
                streams = (good + bad) // 2
            else:
                streams = max(1, bad // 2)
        self.limited = good == limit
        if self.measured_itself:
            self.ended = f"with {counted(bad, 'stream')} the load generator could not keep up; {advice(bad)}"

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
