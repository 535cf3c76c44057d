"""The thread of a Client: however it ends, nobody is left waiting, nor is the interpreter."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from instep_client import Client, ClientClosed, ConnectionFailed
from instep_client.protocol.wire import Kind
from tests.support.client_thread import inside
from tests.support.fake_server import FakeServer
from tests.support.session_link import X


def test_closing_wakes_the_threads_that_wait(server: FakeServer) -> None:
    with Client(server.endpoint) as client, ThreadPoolExecutor(2) as pool:
        stream = client.open("a")
        server.rules.holding = True
        waiting = [pool.submit(stream.step, X[0]), pool.submit(next, stream)]
        while not server.rules.held:
            client.ping()
        client.close()
        for future in waiting:
            with pytest.raises(ClientClosed):
                future.result()
        client.close()
        for verb in (client.ping, lambda: stream.step(X[0])):
            with pytest.raises(ClientClosed):
                verb()


def crash(client: Client) -> threading.Thread:
    """Have the thread of a client fail: that thread."""

    def leave() -> None:
        raise SystemExit("a callback left")

    within = inside(client)
    within.loop.call_soon_threadsafe(leave)
    return within.thread


def test_a_thread_that_crashed_leaves_nobody_waiting(server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    client = Client(server.endpoint)
    client.connect()
    with ThreadPoolExecutor(2) as pool:
        stream = client.open("a")
        server.rules.holding = True
        waiting = [pool.submit(stream.step, X[0]), pool.submit(next, stream)]
        while not server.rules.held:
            client.ping()
        thread = crash(client)
        for future in waiting:
            with pytest.raises(ConnectionFailed):
                future.result()
    for verb in (client.ping, lambda: stream.step(X[1]), lambda: client.open("b")):
        with pytest.raises(ConnectionFailed):
            verb()
    client.close()
    thread.join(10)
    assert not thread.is_alive()
    assert "the client's thread failed" in caplog.messages


def test_a_client_that_nobody_holds_closes_itself(server: FakeServer) -> None:
    client = Client(server.endpoint)
    client.connect()
    stream = client.open("a")
    thread = inside(client).thread
    gone = weakref.ref(client)
    del client
    gc.collect()
    assert stream.step(X[0]).tolist() == [3, 4]  # a stream holds its client
    del stream
    gc.collect()
    assert gone() is None
    thread.join(10)
    assert not thread.is_alive()
    assert server.rules.names == {}


def run_script(script: str, endpoint: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script, endpoint], capture_output=True, text=True, timeout=60, check=False
    )


def test_an_open_client_does_not_hold_up_the_interpreters_exit(server: FakeServer) -> None:
    script = """
import sys
from instep_client import Client
client = Client(sys.argv[1])
client.connect()
stream = client.open("a")
stream.step([1, 2, 3])
"""
    done = run_script(script, server.endpoint)
    assert (done.returncode, done.stderr) == (0, "")
    assert Kind.CLOSE in server.rules.kinds


def test_a_forked_client_says_so_and_the_parents_works_on(server: FakeServer) -> None:
    script = """
import os, sys
from instep_client import Client, ClientClosed
client = Client(sys.argv[1])
client.connect()
stream = client.open("a")
child = os.fork()
if child == 0:
    try:
        stream.step([1, 2, 3])
    except ClientClosed as error:
        assert "forked" in str(error)
        client.close()
        sys.exit(7)
    sys.exit(1)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 7, status
assert stream.step([1, 2, 3]).tolist() == [6, 7]
client.close()
"""
    done = run_script(script, server.endpoint)
    assert (done.returncode, done.stderr) == (0, "")
