"""Whatever happens to clients, network, server and disk: every output is right, durable, and given once.

Each example lets two clients, a network, a server and its disk live through some dozens of steps, faults among them,
and then lets everything settle. `truth.py` says what must hold; the settings differ in what an answer survives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from instep.recording.schema import Durability
from tests.delivery.client import COPY, NAMES, ModelClient
from tests.delivery.lives import Is, Lane
from tests.delivery.machine import Faults, numbers, run
from tests.delivery.node import Sizes
from tests.delivery.world import World

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(400)]

STEPS = 60
EXAMPLES = 400

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
        "reset",
        "reset too early",
        "a RESET was undone",
        "forked",
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
        "woken",
        "FENCED",
        "NAME_IN_USE",
        "STATE_LOST",
        "UNKNOWN_STREAM",
    }


# ── Too rare for chance ────────────────────────────────────────────────────────────────────────────────────────────


def story(durability: Durability, names: Sequence[str]) -> tuple[World, ModelClient, list[Lane]]:
    """A world in which the first client has opened streams."""
    world = World(durability, Sizes(window=2, batch=1))
    client = world.clients[0]
    client.open([client.lanes[name] for name in names])
    world.all_goes_well()
    return world, client, [client.lanes[name] for name in names]


def test_a_stream_that_ends_while_its_resume_waits_is_not_taken_for_the_next_in_its_slot() -> None:
    """One of two streams that are resumed loses its state while the other is still computed."""
    world, client, (lost, slow) = story("memory", NAMES)
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
    client.open([client.lanes[COPY]])
    world.deliver_to_server(client.connection)
    world.settle()
    assert [lane.state for lane in client.lanes.values()] == [Is.NOTHING, Is.OPEN, Is.OPEN]


def test_a_pending_frame_is_not_acknowledged_by_a_takeover() -> None:
    """Its step fails: it is sent anew, and its output is still there when the reply is lost."""
    world, client, (lane,) = story("commit", NAMES[:1])
    client.send([lane], 1, anew=False, politely=True)
    world.deliver_to_server(client.connection)
    other = world.clients[1]
    other.take_over(other.lanes[lane.name])
    world.deliver_to_server(other.connection)
    world.fail_step(loses_state=False)
    world.work(1)
    world.all_goes_well()
    world.all_goes_well()
    other.send([other.lanes[lane.name]], 1, anew=False, politely=True)
    world.deliver_to_server(other.connection)
    world.work(1)
    other.reconnect()
    world.settle()
    assert (other.lanes[lane.name].have, lane.state) == (1, Is.REFUSED)
    assert "OUTPUTS_GONE" not in world.truth.seen


def test_a_state_that_is_read_may_be_that_after_a_later_reset() -> None:
    """Of several streams whose states are read together, one is reset while another still steps."""
    world, client, lanes = story("memory", NAMES)
    client.send(lanes[:1], 1, anew=False, politely=True)
    client.read_states(lanes)
    client.reset(lanes[1], next(world.truth.values))
    world.deliver_to_server(client.connection)
    world.settle()
    assert {"a state was read", "reset"} <= world.truth.seen


def test_a_stream_does_not_step_while_its_state_is_read() -> None:
    world, client, lanes = story("memory", NAMES)
    client.read_states(lanes)
    client.send(lanes[1:], 1, anew=False, politely=True)
    world.deliver_to_server(client.connection)
    world.settle()
    assert "a state was read" in world.truth.seen


def test_a_repeated_frame_is_answered_although_another_has_taken_its_place() -> None:
    world, client, lanes = story("commit", NAMES[:1])
    client.send(lanes, 1, anew=False, politely=True)
    world.deliver_to_server(client.connection)
    world.work(1)
    world.commit(is_told=True)
    client.send(lanes, 1, anew=False, politely=True)
    world.drop(client.connection, of_server=False)
    client.send(lanes, 2, anew=True, politely=True)  # the first is answered already, the second is new
    world.deliver_to_server(client.connection)
    world.deliver_to_client(client.connection)
    client.send(lanes, 1, anew=False, politely=True)
    world.deliver_to_server(client.connection)
    world.work(2)
    world.settle()
    assert lanes[0].have == 3


def test_a_stream_of_before_a_power_loss_is_not_taken_for_a_later_one_of_its_name() -> None:
    world, client, (lane,) = story("commit", NAMES[:1])
    client.send([lane], 1, anew=False, politely=True)
    world.all_goes_well()
    world.disk.sync()
    client.close(lane)
    world.all_goes_well()
    other = world.clients[1]
    other.open([other.lanes[lane.name]])
    world.all_goes_well()
    world.crash(power_lost=99)
    world.start()
    other.reconnect()
    world.settle()
    assert "DATA_LOSS" in world.truth.seen
