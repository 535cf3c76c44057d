"""Finds the largest number of streams that still meets a service level, by doubling and bisection."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

from instep_client.protocol.errors import InstepError
from instep_tools.load.result import ADVICE, LoadResult, Verdict
from instep_tools.pacing import Stop
from instep_tools.problems import CommandProblem
from instep_tools.words import counted, three_digits

RESOLUTION: Final = 1 / 32
"""The search ends when the answer is known to this fraction of itself."""
FAILURES_TO_BELIEVE: Final = 2
"""The number of failures after which a size counts as too large, because a single one may be a hiccup."""

Try = Callable[[int, int], Awaitable[LoadResult]]
"""Measures a number of streams from a number of processes."""


def next_size(good: int, bad: int, limit: int) -> int | None:
    """The next number of streams to try; None once the answer is known to the precision `RESOLUTION`.

    Args:
        good: the largest number that met the level; 0 for none.
        bad: the smallest number that did not; more than `limit` for none.
        limit: the largest number that may be tried.
    """
    if good >= limit or (bad <= limit and bad - good <= max(1, int(good * RESOLUTION))):
        return None
    if bad > limit:
        return min(2 * good, limit)
    return (good + bad) // 2 if good else bad // 2


@dataclass
class Search:
    """A search and its tries.

    A try in which the load generator was too slow says nothing about the server. It is repeated with twice the
    processes, up to one for each core; if that does not help, no larger number of streams is tried.
    """

    attempt: Try
    slo_ms: float
    processes: int
    stop: Stop
    trials: list[LoadResult] = field(default_factory=list)
    limited: bool = False
    """Whether the server cannot hold more streams."""
    ended: str = ""
    """The reason why a number larger than the best one may be possible."""
    measured_itself: bool = False
    """Whether `ended` names the load generator."""

    @property
    def best(self) -> LoadResult | None:
        """The largest load that met the level."""
        met = [trial for trial in self.trials if trial.verdict(self.slo_ms) == "met"]
        return max(met, key=lambda trial: trial.plan.streams, default=None)

    async def run(self, start: int, limit: int) -> None:
        """Double from `start` while the level is met (halve while it is not), then bisect with `next_size`.

        Raises:
            InstepError: the server refuses the first try.
            CommandProblem: not even the first try can be made.
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
            following = next_size(good, bad, limit)
        self.limited = good == limit
        if self.measured_itself:
            self.ended = f"with {counted(bad, 'stream')} the load generator could not keep up; {ADVICE}"

    async def _judge(self, streams: int) -> Verdict | None:
        failures = 0
        while True:
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
            failures += 1
            if verdict == "invalid":
                more = max(self.processes, min(2 * self.processes, os.cpu_count() or 1, streams))
                failures = failures if more == self.processes else 0
                self.processes = more
            if verdict == "met" or failures == FAILURES_TO_BELIEVE:
                return verdict

    def sentence(self) -> str:
        """A sentence about the result."""
        best = self.best
        if best is not None:
            least = "at least " if self.ended else ""
            level = f"in real time at {best.plan.rate_hz:g} Hz within p99 of {self.slo_ms:g} ms"
            found = f"{least}{counted(best.plan.streams, 'stream')} {level} (p99 {three_digits(best.p99_ms)} ms)"
        elif missed := [trial.plan.streams for trial in self.trials if trial.verdict(self.slo_ms) == "not met"]:
            found = f"not even {counted(min(missed), 'stream')} stayed within {self.slo_ms:g} ms at p99"
        elif self.trials:
            found = "the load generator was too slow to find out what the server can do"
        else:
            found = "nothing was measured"
        why = self.ended or ("that is all the server has room for" if self.limited else "")
        return f"{found}; {why}" if why else found

    def as_json(self) -> dict[str, Any]:
        """All tries as JSON values."""
        best = self.best
        return {
            "slo_ms": self.slo_ms,
            "streams": 0 if best is None else best.plan.streams,
            "limited_by_server": self.limited,
            "ended": self.ended or None,
            "best": None if best is None else best.as_json(),
            "trials": [
                trial.as_json()
                | {"verdict": trial.verdict(self.slo_ms), "p99_less_own_ms": trial.without_own_ms(self.slo_ms)}
                for trial in self.trials
            ],
        }
