"""Streams of other clients by their names, and streams that a client leaves to others, with tasks and with threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from instep_client import AsyncClient, Client, StreamRefused
from instep_client.protocol.codes import Code
from tests.support.fake_server import RING_INFO, FakeServer, reference
from tests.support.session_link import X

OUTPUTS, STATE = reference(X[:5])
NEXT = reference(X[:6])[0][5].tolist()


@pytest.fixture
def endpoint() -> Iterator[str]:
    with FakeServer(RING_INFO) as server:
        yield server.endpoint
        assert not server.rules.streams


async def test_tasks(endpoint: str) -> None:
    async with AsyncClient(endpoint) as owner:
        stream = await owner.open("a")
        await stream.step(X[:5])
        async with AsyncClient(endpoint) as other:
            seq, seen = await other.read_state("a")
            snapshot = await other.snapshot("a")
            with pytest.raises(StreamRefused) as refused:
                await other.read_state("b")
        await owner.close(park=True)
    assert (seq, seen["h"].tolist()) == (5, STATE.tolist())
    assert (snapshot.name, snapshot.seq, snapshot.state["h"].tolist()) == ("a", 5, STATE.tolist())
    assert (snapshot.fingerprint, snapshot.model) == (RING_INFO.fingerprint, RING_INFO.model)
    assert (refused.value.code, refused.value.stream) == (Code.UNKNOWN_STREAM, "b")
    async with AsyncClient(endpoint) as client:
        again = await client.resume("a", 5, stream.epoch)
        assert (await again.step(X[5])).tolist() == NEXT


def test_threads(endpoint: str) -> None:
    with Client(endpoint) as client:
        stream = client.open("a")
        stream.step(X[:5])
        client.close(park=True)
    with Client(endpoint) as client:
        seq, state = client.read_state("a")
        assert (seq, state["h"].tolist()) == (5, STATE.tolist())
        assert client.snapshot("a").state["h"].tobytes() == state["h"].tobytes()
        assert client.resume("a", 5, stream.epoch).step(X[5]).tolist() == NEXT
