"""Client, from one thread, from many, and at the edges of a process."""

from __future__ import annotations

import asyncio
import gc
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from instep_client import (
    AsyncClient,
    Client,
    ClientClosed,
    Code,
    ConnectionFailed,
    ConnectionRefused,
    FramesRefused,
    StreamRefused,
)
from instep_client.loop_thread import LoopThread
from instep_client.protocol.wire import Kind
from tests.support.fake_server import INFO, FakeServer, reference

X = np.arange(300, dtype=np.float32).reshape(100, 3)


class Looked(Exception):
    pass


class Inside:
    """An array that a client converts in its own thread, and that only looks around there."""

    loop: asyncio.AbstractEventLoop
    thread: threading.Thread

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        self.loop, self.thread = asyncio.get_running_loop(), threading.current_thread()
        raise Looked


def inside(client: Client) -> Inside:
    """The thread of a client, and its event loop."""
    found = Inside()
    with pytest.raises(Looked):
        client.open("never", found)
    return found


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running
    gc.collect()


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
        assert stream.close().tolist() == final.tolist()
        group = client.open_group(["b", "c"])
        assert (len(group), group.names) == (2, ("b", "c"))
        assert group.step(X[:2]).shape == (2, 2)
        assert group.step_timed(X[:1], rows=[1]).compute_us == 8
        assert group.next_seqs.tolist() == [1, 2]
        assert group.close().shape == (2, 2, 2)
    assert server.rules.names == {}


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


def test_one_thread_sends_while_another_reads(server: FakeServer) -> None:
    with Client(server.endpoint) as client:
        stream = client.open("a")
        read: list[list[float]] = []
        reader = threading.Thread(target=lambda: read.extend(y.tolist() for y in stream))
        reader.start()
        for x in X:
            stream.send(x)
        stream.finish()
        reader.join()
        assert read == reference(X)[0].tolist()


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
        with pytest.raises(KeyboardInterrupt) as interrupt:
            stream.step(X[0])
        assert [frame.name for frame in interrupt.traceback][1:] == ["call", "run"], "no frames of waiting"
        server.release()
        assert stream.step(X[1]).tolist() == reference(X[:2])[0][1].tolist()
        server.rules.holding = True
        with pytest.raises(KeyboardInterrupt):
            client.open("b")
        server.release()
        client.ping()  # the answer to the OPEN came before this one's
        client.ping()  # and the CLOSE went out before this one
        assert list(server.rules.names) == ["a"]


def test_an_interrupt_before_the_wait_has_begun_cancels_as_well(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(server.endpoint) as client:
        loop = inside(client).loop
        seen = threading.Event()

        def fault(header: list[Any], frames: list[bytes]) -> list[list[bytes]] | None:
            if header[0] == Kind.OPEN:
                seen.set()
            return None

        server.rules.fault = fault

        def interrupted(begin: Callable[..., object], *arguments: Any) -> None:
            monkeypatch.undo()
            loop.call_soon_threadsafe(begin, *arguments)
            assert seen.wait(10)
            raise KeyboardInterrupt

        server.rules.holding = True
        monkeypatch.setattr(loop, "call_soon_threadsafe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.open("b")
        server.release()
        client.ping()  # the answer to the OPEN came before this one's
        client.ping()  # and the CLOSE went out before this one
        assert list(server.rules.names) == []


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


def test_an_interrupt_just_before_an_output_is_taken_leaves_it_to_the_next_iteration(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = Future.result
    queued, begun, iterates_again = threading.Event(), threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        iterates_again.wait()

    def interrupted(future: Future[Any], timeout: float | None = None) -> None:
        loop.call_soon_threadsafe(hold)  # behind the beginning of the work, and before the work itself
        queued.set()
        begun.wait()
        monkeypatch.setattr(Future, "result", in_time)
        raise KeyboardInterrupt

    def in_time(future: Future[Any], timeout: float | None = None) -> Any:
        iterates_again.set()
        return result(future, 5.0)

    with Client(server.endpoint) as client:
        stream, loop = client.open("a"), inside(client).loop
        stream.send(X[0])
        client.ping()  # by now the output has come
        loop.call_soon_threadsafe(queued.wait)
        monkeypatch.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        np.testing.assert_array_equal(next(stream), reference(X[:1])[0][0])


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


def test_a_client_connects_once(server: FakeServer) -> None:
    client = Client(server.endpoint)
    with pytest.raises(ClientClosed, match="not connected"):
        client.ping()
    client.connect()
    with pytest.raises(ClientClosed, match="connected before"):
        client.connect()
    client.close()
    with pytest.raises(ClientClosed, match="connected before"):
        client.connect()
    Client(server.endpoint).close()


def test_nobody_there() -> None:
    with FakeServer() as server:
        endpoint = server.endpoint
    with pytest.raises(ConnectionRefused, match="nothing listens"):
        Client(endpoint).connect()
    with pytest.raises(ConnectionFailed, match="nobody answers"):
        Client(endpoint, timeout_s=0.1, wait=True).connect()


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
