"""The ROUTER socket: where it is bound, and what becomes of messages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from instep.config import TransportConfig
from instep.frontends import CannotListen
from instep.frontends.zmq.inbox import Inbox
from instep.frontends.zmq.router import Router, Sent
from instep.frontends.zmq.table import PeerTable


@contextmanager
def bound(endpoint: str = "tcp://127.0.0.1:*") -> Iterator[Router]:
    try:
        router = Router(TransportConfig(endpoint=endpoint))
    except CannotListen:
        if "[" in endpoint:
            pytest.skip("no IPv6 on this machine")
        raise
    try:
        yield router
    finally:
        router.close()


@contextmanager
def dealer(endpoint: str) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(endpoint)
        yield socket


def receive(router: Router) -> tuple[bytes, list[bytes]]:
    """The next message."""
    while (message := router.receive(Inbox(PeerTable(0)))) is None:
        pass
    return message


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:*", "tcp://127.0.0.1:0", "tcp://localhost:*", "tcp://[::1]:*"])
def test_any_loopback_endpoint_can_be_bound_and_is_told_as_written(endpoint: str) -> None:
    with bound(endpoint) as router:
        host = "127.0.0.1" if "localhost" in endpoint else endpoint[6:-2]
        assert router.endpoint.startswith(f"tcp://{host}:")


def test_a_path_at_which_another_process_listens_is_not_taken_away(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path / 'socket'}"
    with bound(endpoint):
        with pytest.raises(CannotListen, match="Address already in use"):
            Router(TransportConfig(endpoint=endpoint))
    assert (tmp_path / "socket").is_socket()
    with bound(endpoint):
        pass


def test_a_peer_that_is_not_there_is_gone() -> None:
    with bound() as router:
        assert router.send(b"\0nobody", [b"x"]) is Sent.GONE
        assert router.receive(Inbox(PeerTable(0))) is None


def test_a_message_is_received_and_answered() -> None:
    with bound() as router, dealer(router.endpoint) as peer:
        peer.send_multipart([b"header", b"", b"x"])
        routing_id, frames = receive(router)
        assert frames == [b"header", b"", b"x"]
        assert router.send(routing_id, [b"answer", memoryview(b"y")]) is Sent.HANDED_OVER
        assert peer.recv_multipart() == [b"answer", b"y"]
