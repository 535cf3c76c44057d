"""Requests between nodes and the directory: numbers, time limits, and who is heard."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from instep.cluster.talk import Caller, Listener, NoAnswer, NodeRequest, Rejected
from instep.config import TransportConfig
from instep.security.keys import ServerKeys
from instep_client.key_files import read_client_keys
from tests.support.keys import KeyRing


class Echo:
    """Answers `echo` with what it got, refuses `no`, and says nothing to everything else."""

    def __init__(self, **transport: Any) -> None:
        config = TransportConfig(**{"endpoint": "tcp://127.0.0.1:0", **transport})
        self.listener = Listener(config, ServerKeys.read(config), frozenset({"status"}))
        self.heard: list[NodeRequest] = []
        self._ends = False

    def run(self) -> None:
        while not self._ends:
            for request in self.listener.requests(0.01):
                self.heard.append(request)
                if request.verb in ("echo", "status"):
                    self.listener.answer(request, request.arguments)
                elif request.verb == "no":
                    self.listener.refuse(request, "not now")
        self.listener.close()

    @contextmanager
    def running(self) -> Iterator[str]:
        thread = threading.Thread(target=self.run)
        thread.start()
        try:
            yield self.listener.endpoint
        finally:
            self._ends = True
            thread.join()


def calling(endpoint: str, **keys: Any) -> closing[Caller]:
    return closing(Caller(endpoint, read_client_keys(**keys) if keys else None))


def test_a_question_gets_its_own_answer_and_a_late_one_is_dropped() -> None:
    with Echo().running() as endpoint, calling(endpoint) as caller:
        caller.send("echo", "late", within_s=10)
        assert caller.ask("echo", 1, b"\0", [None, "x"], within_s=10) == [1, b"\0", [None, "x"]]
        with pytest.raises(Rejected, match="not now"):
            caller.ask("no", within_s=10)
        with pytest.raises(NoAnswer):
            caller.ask("silence", within_s=0.05)
        assert caller.ask("echo", 2, within_s=10) == [2]


def test_a_lost_connection_is_told_and_made_again_and_nothing_waits_for_it() -> None:
    echo = Echo()
    with calling(echo.listener.endpoint) as caller:
        with echo.running() as endpoint:
            assert caller.ask("echo", within_s=10) == []
        with pytest.raises(NoAnswer):
            caller.ask("lost", within_s=10)
        with pytest.raises(NoAnswer):
            caller.send("late", within_s=0.05)
        again = Echo(endpoint=endpoint)
        with again.running():
            assert caller.ask("echo", within_s=10) == []
    assert [each.verb for each in again.heard] == ["echo"]


@pytest.mark.parametrize(
    "parts",
    [[b""], [b"\xc1"], [b"\x00"], [b"\x91\x01"], [b"\x92\xa1a\xa1b"], [b"\x93\x01\x02\x03"], [b"\x90", b"\x90"]],
    ids=["empty", "invalid", "number", "no verb", "text for a number", "number for a verb", "two parts"],
)
def test_a_malformed_message_ends_nothing(parts: list[bytes]) -> None:
    with Echo().running() as endpoint, calling(endpoint) as caller:
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(endpoint)
            socket.send_multipart(parts)
            socket.send(msgpack.packb([1, "echo"]))
            assert msgpack.unpackb(socket.recv()) == [1, True, []]
        assert caller.ask("echo", within_s=10) == []


def test_only_nodes_are_heard_and_operators_where_they_may(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path, n1={"role": "node"}, ann={"role": "operator"}, mic={})
    echo = Echo(**ring.transport)
    with echo.running() as endpoint:
        with calling(endpoint, **ring.of_client("n1")) as node:
            assert node.ask("echo", within_s=10) == []
            with pytest.raises(Rejected):
                node.ask("status", within_s=10)
        with calling(endpoint, **ring.of_client("ann")) as operator:
            assert operator.ask("status", within_s=10) == []
            with pytest.raises(Rejected):
                operator.ask("echo", within_s=10)
        with calling(endpoint, **ring.of_client("mic")) as producer, pytest.raises(Rejected):
            producer.ask("status", within_s=10)
        with calling(endpoint) as stranger, pytest.raises(NoAnswer):
            stranger.ask("echo", within_s=0.3)
    assert [(each.principal, each.verb) for each in echo.heard] == [("n1", "echo"), ("ann", "status")]
