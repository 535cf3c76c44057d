"""Whatever happens to clients, network, server and disk: every output is right, durable, and given once.

Each example lets two clients, a network, a server and its disk live through some dozens of steps, faults among them,
and then lets everything settle. `truth.py` says what must hold; the settings differ in what an answer survives.
"""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.delivery.client import Is, Lane
from tests.delivery.machine import Faults, numbers, run
from tests.delivery.node import Sizes
from tests.delivery.world import World

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.xdist_group("delivery"),
    pytest.mark.timeout(400),
]  # what the examples reach is counted in one process

STEPS = 60
EXAMPLES = 1000

SETTINGS = {
    "memory": Faults("memory"),
    "commit": Faults("commit"),
    "commit, and power is lost": Faults("commit", loses_power=True),
    "fsync, and power is lost": Faults("fsync", loses_power=True),
}


@cache
def reached(setting: str) -> Counter[str]:
    """Live through the examples of one setting; how often they came to what."""
    seen = Counter[str]()
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
        seen.update(run(SETTINGS[setting], example).truth.seen)
        lived += 1

    lives()
    assert lived >= EXAMPLES
    return seen


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_output_is_that_of_all_frames_before_it(setting: str) -> None:
    assert reached(setting)


def test_the_examples_reach_what_they_are_for() -> None:
    """A rule that no example ever needs is not tested."""
    everything = set[str]().union(*(reached(setting) for setting in SETTINGS))
    assert everything >= {
        "resumed after frames",
        "a fenced owner sends",
        "given outputs were lost",
        "closed",
        "closed too early",
        "hibernated",
        "a state was read",
        "damage was refused",
        "dropped",
        "several STEPs at once",
        "killed",
        "power lost",
        "the disk was full",
        "DATA_LOSS",
        "EXPIRED",
        "HIBERNATED",
        "FENCED",
        "NAME_IN_USE",
        "STATE_LOST",
        "UNKNOWN_STREAM",
    }


def test_a_stream_that_ends_while_its_resume_waits_is_not_taken_for_the_next_in_its_slot() -> None:
    """Too rare for chance: one of two streams that are resumed loses its state while the other is still computed."""
    world = World("memory", Sizes(window=2, batch=1))
    client = world.clients[0]
    client.open(list(client.lanes.values()))
    world.all_goes_well()
    lost, slow = client.lanes.values()
    client.send([lost], 1, anew=False, politely=True)
    client.send([slow], 2, anew=False, politely=True)
    world.deliver_to_server(client.connection)
    world.commit(is_told=True)
    client.reconnect()
    world.deliver_to_server(client.connection)
    world.fail_step(loses_state=True)
    for _ in range(3):
        world.work(1)
        world.commit(is_told=True)
    client.lanes["c"] = Lane("c")
    client.open([client.lanes["c"]])
    world.deliver_to_server(client.connection)
    world.settle()
    assert [lane.state for lane in client.lanes.values()] == [Is.NOTHING, Is.OPEN, Is.OPEN]
