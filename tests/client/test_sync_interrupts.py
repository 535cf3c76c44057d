"""Client, when Ctrl-C ends a call: nothing is lost, and nothing is left behind."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from instep_client import Client
from instep_client.protocol.wire import Kind
from tests.support.fake_server import FakeServer, reference
from tests.support.session_link import X


def test_ctrl_c_leaves_a_client_that_can_be_used_and_closed(server: FakeServer) -> None:
    main = threading.main_thread().ident
    assert main is not None

    def fault(header: list[Any], frames: list[bytes]) -> list[list[bytes]] | None:
        if header[0] in (Kind.OPEN, Kind.STEP) and server.rules.holding:
            signal.pthread_kill(main, signal.SIGINT)
        return None

    with Client(server.endpoint) as client:
        stream = client.open("a")
        server.rules.holding = True
        server.rules.fault = fault
        with pytest.raises(KeyboardInterrupt):
            stream.step(X[0])
        server.release()
        assert stream.step(X[1]).tolist() == reference(X[:2])[0][1].tolist()
        server.rules.holding = True
        with pytest.raises(KeyboardInterrupt):
            client.open("b")
        server.release()
        client.ping()  # the answer to the OPEN came before this one's
        client.ping()  # and the CLOSE went out before this one
        assert list(server.rules.names) == ["a"]


def test_an_interrupt_as_an_output_arrives_loses_none(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    result = Future.result

    def interrupted(future: Future[Any], timeout: float | None = None) -> None:
        result(future, timeout)  # it has come
        monkeypatch.undo()
        raise KeyboardInterrupt

    with Client(server.endpoint) as client:
        stream = client.open("a")
        for x in X[:3]:
            stream.send(x)
        stream.finish()
        outputs = [next(stream)]
        for _ in range(2):  # the second one is the end
            monkeypatch.setattr(Future, "result", interrupted)
            with pytest.raises(KeyboardInterrupt):
                next(stream)
            outputs += stream
    np.testing.assert_array_equal(outputs, reference(X[:3])[0])
