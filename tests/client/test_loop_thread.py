"""The thread of a Client: however it ends, nobody is left waiting, nor is the interpreter."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from instep_client import AsyncClient, Client, ClientClosed, ConnectionFailed
from instep_client.loop_thread import LoopThread
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
            with pytest.raises(ClientClosed, match="the client was closed"):
                verb()


def test_closing_again_does_not_change_how_it_is_closed(server: FakeServer) -> None:
    client = Client(server.endpoint)
    client.connect()
    client.open("a")
    within = inside(client)

    def close_twice() -> None:
        client.close(park=True)
        client.close()

    within.loop.call_soon_threadsafe(close_twice)
    within.thread.join(10)
    assert Kind.CLOSE not in server.rules.kinds
    assert list(server.rules.names) == ["a"]


def test_work_that_the_loop_gave_up_is_told_as_closed(server: FakeServer) -> None:
    begun = threading.Event()

    async def endless() -> None:
        begun.set()
        await asyncio.Event().wait()

    thread = LoopThread(AsyncClient(server.endpoint))
    thread.start()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(thread.run, endless())
        assert begun.wait(10)
        thread.stop()
        with pytest.raises(ClientClosed, match="the client was closed"):
            waiting.result()


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
            with pytest.raises(ConnectionFailed, match=r"thread failed .*a callback left.*; make a new client"):
                future.result()
    for verb in (client.ping, lambda: stream.step(X[1]), lambda: client.open("b")):
        with pytest.raises(ConnectionFailed, match="a callback left"):
            verb()
    client.close()
    thread.join(10)
    assert not thread.is_alive()
    assert "the client's thread failed" in caplog.messages


def test_work_that_begins_only_after_the_crash_is_told_of_it(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(server.endpoint)
    client.connect()
    stream, loop = client.open("a"), inside(client).loop
    call_soon, queued = loop.call_soon_threadsafe, threading.Event()

    def leave() -> None:
        queued.wait()
        raise SystemExit("a callback left")

    def queue(*arguments: Any) -> None:
        call_soon(*arguments)
        queued.set()  # the work is in the loop's queue, behind the crash

    call_soon(leave)
    monkeypatch.setattr(loop, "call_soon_threadsafe", queue)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, stream)
        with pytest.raises(ConnectionFailed, match="a callback left"):
            waiting.result()


def test_a_thread_that_crashed_still_closes_its_streams(server: FakeServer) -> None:
    client = Client(server.endpoint)
    client.connect()
    client.open("a")
    crash(client).join(10)
    assert server.rules.names == {}


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


def test_a_client_collected_in_its_own_thread_closes_itself(server: FakeServer) -> None:
    client = AsyncClient(server.endpoint)
    thread = LoopThread(client)
    thread.start()
    thread.run(client.connect())

    async def collect() -> threading.Thread:
        thread.stop()
        return threading.current_thread()

    ended = thread.run(collect())
    ended.join(10)
    assert not ended.is_alive()
    thread.stop()


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


def test_a_loop_that_cannot_even_be_ended_leaves_nobody_waiting(server: FakeServer) -> None:
    script = """
import asyncio, selectors, sys
from instep_client import Client, ConnectionFailed
client = Client(sys.argv[1])
client.connect()
stream = client.open("a")

def fail(selector, timeout=None):
    raise OSError("the selector is broken")

def break_it():
    selectors.DefaultSelector.select = fail

class Frame:  # an array that the client converts in its own thread
    def __array__(self, *_, **__):
        asyncio.get_running_loop().call_later(0.2, break_it)
        raise AssertionError

try:
    stream.step(Frame())
except AssertionError:
    pass
for verb in (lambda: next(stream), client.ping):
    try:
        verb()
    except ConnectionFailed as error:
        assert "the selector is broken" in str(error), error
    else:
        sys.exit(1)
client.close()
print("done")
"""
    # What it leaves open is warned of on stderr.
    assert run_script(script, server.endpoint).stdout == "done\n"


def test_without_room_for_an_event_loop_connecting_fails() -> None:
    script = """
import os, resource, sys
from instep_client import Client, ConnectionFailed
client = Client(sys.argv[1])
free = os.dup(0)
os.close(free)
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
for verb in (client.connect, client.ping):
    try:
        verb()
    except ConnectionFailed as error:
        assert "Too many open files" in str(error), error
    else:
        sys.exit(1)
client.close()
print("done")
"""
    assert run_script(script, "tcp://127.0.0.1:1").stdout == "done\n"


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
