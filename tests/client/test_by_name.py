"""What either client does with streams of others by their names, and with its own when it leaves them to others."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from instep_client import AsyncClient, Client, StreamRefused
from instep_client.protocol.codes import Code
from tests.support.fake_server import FakeServer, reference
from tests.support.ring_server import RING_INFO, RingServer
from tests.support.session_link import X


@pytest.fixture
def ring() -> RingServer:
    return RingServer()


@pytest.fixture
def endpoint(ring: RingServer) -> Iterator[str]:
    with FakeServer(RING_INFO, ring.handle) as server:
        yield server.endpoint


async def test_a_stream_of_another_client_is_looked_at_and_saved(endpoint: str, ring: RingServer) -> None:
    _, state = reference(X[:5])
    async with AsyncClient(endpoint) as owner, AsyncClient(endpoint) as other:
        stream = await owner.open("a")
        await stream.step(X[:5])
        seq, seen = await other.read_state("a")
        assert (seq, seen["h"].tolist()) == (5, state.tolist())
        snapshot = await other.snapshot("a")
        assert (snapshot.name, snapshot.seq, snapshot.state["h"].tolist()) == ("a", 5, state.tolist())
        assert (snapshot.fingerprint, snapshot.model) == (RING_INFO.fingerprint, RING_INFO.model)
        assert (await stream.step(X[5])).tolist() == reference(X[:6])[0][5].tolist()
        with pytest.raises(StreamRefused) as refused:
            await other.read_state("b")
        assert (refused.value.code, refused.value.stream) == (Code.UNKNOWN_STREAM, "b")
    assert not ring.streams


async def test_a_client_may_leave_its_streams_to_others(endpoint: str) -> None:
    async with AsyncClient(endpoint) as client:
        stream = await client.open("a")
        await stream.step(X[:5])
        await client.close(park=True)
    async with AsyncClient(endpoint) as client:
        again = await client.resume("a", 5, stream.epoch)
        assert (await again.step(X[5])).tolist() == reference(X[:6])[0][5].tolist()


def test_so_it_is_with_threads(endpoint: str, ring: RingServer) -> None:
    with Client(endpoint) as client:
        stream = client.open("a")
        stream.step(X[:5])
        client.close(park=True)
    with Client(endpoint) as client:
        seq, state = client.read_state("a")
        assert (seq, state["h"].tolist()) == (5, reference(X[:5])[1].tolist())
        assert client.snapshot("a").state["h"].tobytes() == state["h"].tobytes()
        again = client.resume("a", 5, stream.epoch)
        np.testing.assert_array_equal(again.step(X[5]), reference(X[:6])[0][5])
    assert not ring.streams
