"""Client, from one thread and from many."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from instep_client import AsyncClient, Client, ClientClosed, Code, FramesRefused, StreamRefused
from tests.support.client_thread import inside
from tests.support.fake_server import INFO, FakeServer, reference

X = np.arange(300, dtype=np.float32).reshape(100, 3)


def test_every_verb(server: FakeServer) -> None:
    with Client(server.endpoint, "tester") as client:
        assert client.info == INFO
        assert client.ping() > 0
        assert client.stats()["streams_open"] == 0
        state = np.full((2, 2), 8, np.float32)
        stream = client.open("a", state)
        outputs, final = reference(X[:9], state)
        assert stream.name == "a"
        assert stream.step(X[0]).tolist() == outputs[0].tolist()
        assert stream.step_timed(X[1:5]).outputs.tolist() == outputs[1:5].tolist()
        for x in X[5:9]:
            stream.send(x)
        stream.finish()
        assert [y.tolist() for y in stream] == outputs[5:].tolist()
        assert stream.next_seq == 9
        assert stream.close()["h"].tolist() == final.tolist()
        group = client.open_group(["b", "c"])
        assert (len(group), group.names) == (2, ("b", "c"))
        assert group.step(X[:2]).shape == (2, 2)
        assert group.step_timed(X[:1], rows=[1]).compute_us == 8
        assert group.next_seqs.tolist() == [1, 2]
        assert group.close()["h"].shape == (2, 2, 2)
    assert server.rules.names == {}


def test_the_signatures_are_those_of_the_client_for_asyncio_but_for_what_is_returned() -> None:
    for name, returned in (("open", "Stream"), ("open_group", "Group"), ("restore", "Stream")):
        signature, model = inspect.signature(getattr(Client, name)), inspect.signature(getattr(AsyncClient, name))
        assert (signature.parameters, signature.return_annotation) == (model.parameters, returned)
    assert "reconnect_s:" in (inspect.getdoc(Client.__init__) or "")
    assert Client.open.__module__ == Client.__module__


def test_errors_reach_the_caller(server: FakeServer) -> None:
    with Client(server.endpoint) as client:
        stream = client.open("a")
        with pytest.raises(StreamRefused):
            client.open("a")
        stream.send([np.nan, 0, 0])
        stream.finish()
        with pytest.raises(FramesRefused) as caught:
            next(stream)
        assert caught.value.code is Code.NOT_FINITE
        assert list(stream) == []


def test_many_threads_share_a_client(server: FakeServer) -> None:
    with Client(server.endpoint) as client, ThreadPoolExecutor(8) as pool:

        def run(number: int) -> list[list[float]]:
            stream = client.open(f"s{number}")
            return [stream.step(x).tolist() for x in X[number:]]

        for number, outputs in enumerate(pool.map(run, range(8))):
            assert outputs == reference(X[number:])[0].tolist()


def test_finishing_wakes_the_thread_that_waits_for_outputs(server: FakeServer) -> None:
    with Client(server.endpoint) as client:
        stream, loop = client.open("a"), inside(client).loop
        others = len(asyncio.all_tasks(loop))
        reader = threading.Thread(target=lambda: list(stream), daemon=True)
        reader.start()
        while len(asyncio.all_tasks(loop)) == others:
            time.sleep(0.001)
        stream.finish()
        reader.join(5.0)
        assert not reader.is_alive()


def test_a_client_connects_once(server: FakeServer) -> None:
    client = Client(server.endpoint)
    with pytest.raises(ClientClosed):
        client.ping()
    client.connect()
    with pytest.raises(ClientClosed):
        client.connect()
    client.close()
    with pytest.raises(ClientClosed):
        client.connect()
    Client(server.endpoint).close()
