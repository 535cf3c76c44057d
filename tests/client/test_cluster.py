"""The table of a cluster's shards, as a client knows it."""

import numpy as np
import pytest

from instep_client.cluster import ShardMap
from instep_client.protocol.errors import MalformedMessage
from instep_client.protocol.wire import ShardTable

A, B, C = (f"tcp://10.0.0.{number}:5757" for number in (1, 2, 3))


def table(*rows: tuple[int, str]) -> ShardTable:
    return ShardTable(np.array([term for term, _ in rows], np.uint64), tuple(endpoint for _, endpoint in rows))


def test_only_servers_of_a_term_that_is_not_lower_are_followed() -> None:
    shards = ShardMap(2)
    shards.take(table((3, A), (5, B)))
    shards.take(table((2, C), (6, C)))
    assert (shards.terms, shards.endpoints) == ([3, 6], [A, C])
    shards.take(table((3, B), (6, C)))
    assert (shards.terms, shards.endpoints) == ([3, 6], [B, C])
    assert not shards.learn(1, 5, B)
    assert shards.learn(1, 7, A)
    shards.take(table((3, B), (6, C)))
    assert (shards.terms, shards.endpoints) == ([3, 7], [B, A])


def test_a_shard_that_nobody_serves_is_left_and_its_place_remembered() -> None:
    shards = ShardMap(1)
    shards.take(table((1, A)))
    shards.take(table((2, "")))
    assert (shards.terms, shards.endpoints) == ([2], [A])
    assert not shards.learn(0, 1, A)
    shards.take(table((2, B)))
    assert shards.endpoints == [B]


@pytest.mark.parametrize(
    ("asked", "found"),
    [("tcp://h:1", "tcp://h:5758"), ("tcp://[::1]:1", "tcp://[::1]:5758"), ("ipc:///s", "tcp://127.0.0.1:5758")],
)
def test_the_host_that_was_asked_has_servers_of_any_host(asked: str, found: str) -> None:
    shards = ShardMap(1)
    shards.take(table((0, "tcp://*:5758")), asked)
    assert shards.endpoints == [found]


def test_tables_that_cannot_be_followed() -> None:
    with pytest.raises(MalformedMessage):
        ShardMap(2).take(table((1, A)))
    with pytest.raises(MalformedMessage):
        ShardMap(1).take(table((1, "http://nowhere")))
