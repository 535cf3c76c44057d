"""How every comparison is measured: its ways in turn, round by round, after a warm-up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from instep.bench.result import Samples


@dataclass(frozen=True, slots=True)
class Run:
    """What all rows of one run have in common.

    Attributes:
        folder: for models and recordings; empty at first, and removed afterwards.
        rounds: that count.
        seconds: of each way in each round.
        scale: streams and frames of the large loads are divided by so much.
        advance: called after every round, the warm-up too.
    """

    folder: Path
    rounds: int = 7
    seconds: float = 1.5
    scale: int = 1
    advance: Callable[[], object] = lambda: None

    def scaled(self, number: int, least: int) -> int:
        """A size of a load, in this run."""
        return max(least, number // self.scale)


def in_turn(run: Run, ways: Mapping[str, Callable[[], float]]) -> Samples:
    """Measure every way once a round, forwards and backwards by turns; the first round is the warm-up.

    Args:
        run: how often.
        ways: by name; each measures once.

    Returns:
        What each of them returned in the rounds that count.
    """
    samples: Samples = {name: [] for name in ways}
    names = list(ways)
    for number in range(run.rounds + 1):
        for name in names if number % 2 else reversed(names):
            value = ways[name]()
            if number:
                samples[name].append(value)
        run.advance()
    return samples
