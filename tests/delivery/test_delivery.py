"""Whatever happens to clients, network, server and disk: every output is right, durable, and given once.

Each example lets two clients, a network, a server and its disk live through some dozens of steps, faults among them,
and then lets everything settle. `truth.py` says what must hold; the settings differ in what an answer survives.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.delivery.machine import Faults, numbers, run

pytestmark = pytest.mark.long

STEPS = 60
EXAMPLES = 800
REACHED = Counter[str]()
"""What the examples of all settings have reached."""

SETTINGS = {
    "memory": Faults("memory"),
    "commit": Faults("commit"),
    "commit, and power is lost": Faults("commit", loses_power=True),
    "fsync, and power is lost": Faults("fsync", loses_power=True),
}


@pytest.mark.parametrize("faults", SETTINGS.values(), ids=list(SETTINGS))
def test_every_output_is_that_of_all_frames_before_it(faults: Faults) -> None:
    lived = 0

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(numbers(STEPS))
    def lives(example: list[int]) -> None:
        nonlocal lived
        world = run(faults, example)
        REACHED.update(world.truth.seen)
        lived += 1

    lives()
    assert lived >= EXAMPLES


def test_the_examples_reach_what_they_are_for() -> None:
    """Runs after those above: a rule that no example ever needs is not tested."""
    if not REACHED:
        pytest.skip("the examples were not run")
    assert set(REACHED) >= {
        "resumed after frames",
        "a fenced owner sends",
        "given outputs were lost",
        "closed",
        "damage was refused",
        "dropped",
        "killed",
        "power lost",
        "the disk was full",
        "DATA_LOSS",
        "EXPIRED",
        "FENCED",
        "NAME_IN_USE",
        "STATE_LOST",
        "UNKNOWN_STREAM",
    }
