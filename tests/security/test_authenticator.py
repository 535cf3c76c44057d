"""A server with keys: who gets in, who does not, and what becomes of connections whose key is withdrawn."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import os
import signal
import socket as socketlib
import threading
import time
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq

from instep.models.folder import write_model
from instep.security import authenticator
from instep.security.authenticator import Authenticator
from instep.security.principals import Principals
from instep.server.log import Threshold
from instep.server.serve import Kept, reload
from instep.server.server import Server
from instep_client.protocol.wire import Code, Kind
from tests.support.keys import KeyRing
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient
from tests.support.running import log_into, running
from tests.support.served import serving
from tests.support.streaming import random_frames

H = 8
MOST_S = 10.0
"""Generous to a busy machine; 1 s is promised."""


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    return KeyRing(tmp_path, mic={"streams": "mic-*"}, other={})


def peers_of(server: Server) -> list[str]:
    origins = server.default.engine.origins
    return [origins[number].principal.name for number in range(len(origins))]  # type: ignore[union-attr]


async def until(condition: Any) -> None:
    """Wait, however long a busy machine takes to start the server: what never comes ends with the test's own time."""
    while not condition():
        await asyncio.sleep(0.01)


async def reread(server: Server) -> list[dict[str, Any]]:
    """SIGHUP; what it logs."""
    told: list[dict[str, Any]] = []
    await reload(server, lambda: server.config, Threshold("info"), log_into(told), Kept())
    return told


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:*", "ipc://{folder}/socket"])
async def test_a_known_key_is_served_under_its_name(ring: KeyRing, rng: np.random.Generator, endpoint: str) -> None:
    x = random_frames(rng, 3)
    transport = {**ring.transport, "endpoint": endpoint.format(folder=ring.folder)}
    async with running(SMALL, transport=transport) as server:
        async with RawClient(server.endpoint, curve=ring.curve("mic")) as client:
            await client.hello()
            handles = (await client.open("mic-1")).handles()
            reply = await client.step(handles, [0], x)
            np.testing.assert_array_equal(reply.floats().reshape(3, H), whole(SMALL, x[:, 0])[0])
            assert peers_of(server) == ["mic"]


@pytest.mark.parametrize("who", ["no key", "an unknown key", "the key of another server"])
async def test_strangers_are_not_answered_and_the_log_counts_them(ring: KeyRing, who: str) -> None:
    curve = {
        "no key": None,
        "an unknown key": ring.curve("stranger"),
        "the key of another server": ring.curve("mic", server="other"),
    }[who]
    told: list[dict[str, Any]] = []
    async with running(SMALL, transport=ring.transport, told=told) as server:
        while not any(line["event"] == "handshakes failed" for line in told):
            # Again, because a client without keys may see first that it does not fit: then it hangs up for good.
            async with RawClient(server.endpoint, curve=curve) as client:
                await client.send(*client.hello_message())
                assert not await client.socket.poll(500)
    line = next(line for line in told if line["event"] == "handshakes failed")
    reason = {"no key": "without_keys", "an unknown key": "unknown_key"}.get(who, "wrong_server_key")
    assert line[reason] >= 1
    assert line.get("key") == (ring.make("stranger")[0][:8] if who == "an unknown key" else None)
    assert ring.make("stranger")[0] not in str(told)


async def test_clients_that_hang_up_are_not_counted(ring: KeyRing) -> None:
    told: list[dict[str, Any]] = []
    async with running(SMALL, transport=ring.transport, told=told) as server:
        for _ in range(5):
            with socketlib.create_connection(("127.0.0.1", int(server.endpoint.rpartition(":")[2]))) as hung_up:
                hung_up.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0"))
                await asyncio.sleep(0.05)
        async with RawClient(server.endpoint, curve=ring.curve("stranger")) as client:
            await client.send(*client.hello_message())
            await until(lambda: any("unknown_key" in line for line in told))
    assert not any("without_keys" in line for line in told)


def test_handshakes_that_go_on_failing_are_reported_ever_more_rarely(
    ring: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s, reports = 0.0, list[float]()
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        known = Principals.read(ring.peers_file)
        at_door = Authenticator(router, ring.make("server")[1], known, timeout_s=1.0)
        for at in (*range(600), 900):
            now_s = float(at)
            at_door._note({"event": zmq.EVENT_HANDSHAKE_FAILED_AUTH, "value": 400})
            if at_door.failures():
                reports.append(now_s)
        at_door.close()
        router.disable_monitor()
    assert reports[:7] == [0, 1, 3, 7, 15, 31, 63]
    assert len(reports) < 20
    assert reports[-1] == 900


async def test_one_endless_message_without_a_key_is_not_taken(ring: KeyRing) -> None:
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
    ready = b"\x04\x29\x05READY\x0bSocket-Type" + (6).to_bytes(4, "big") + b"DEALER"
    part = b"\x01\xff" + b"x" * 255
    async with running(SMALL, transport=ring.transport) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", int(server.endpoint.rpartition(":")[2]))
        writer.write(greeting + ready)
        taken = 0
        with contextlib.suppress(ConnectionError):
            while taken < 2**26:
                writer.write(part * 1000)
                await writer.drain()
                taken += len(part) * 1000
        writer.close()
        assert taken < 2**24, "no more than what sockets keep"
        async with RawClient(server.endpoint, curve=ring.curve("mic")) as client:
            await client.hello()


async def test_strangers_beyond_the_bound_are_disconnected_and_clients_are_served(
    ring: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authenticator, "MAX_STRANGERS", 20)
    async with running(SMALL, transport=ring.transport) as server:
        async with RawClient(server.endpoint, curve=ring.curve("mic")) as client:
            await client.hello()
            files = len(os.listdir("/proc/self/fd"))
            port = int(server.endpoint.rpartition(":")[2])
            strangers = [socketlib.create_connection(("127.0.0.1", port)) for _ in range(200)]
            await until(lambda: len(os.listdir("/proc/self/fd")) <= files + len(strangers) + 20)
            assert (await client.ask(msgpack.packb([Kind.PING, 1]))).kind is Kind.PONG
            for stranger in strangers:
                stranger.close()


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:*", "ipc://{folder}/socket"])
async def test_a_connection_without_an_accepted_hello_is_ended(
    ring: KeyRing, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failures = os.dup, [OSError(errno.EMFILE, "no descriptor is free")] * 3

    def dup(descriptor: int) -> int:
        if failures:
            raise failures.pop()
        return real(descriptor)

    monkeypatch.setattr(os, "dup", dup)
    transport = {"endpoint": endpoint.format(folder=ring.folder), "handshake_timeout_s": 0.3}
    async with running(SMALL, transport={**ring.transport, **transport}) as server:
        async with RawClient(server.endpoint, curve=ring.curve("other")) as client:
            events = client.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            assert (await client.ask(*client.hello_message(version=1))).code is Code.WRONG_VERSION
            async with RawClient(server.endpoint, curve=ring.curve("mic")) as welcome:
                await welcome.hello()
                assert await events.poll(10_000)
                assert (await welcome.ask(msgpack.packb([Kind.PING, 1]))).kind is Kind.PONG
            events.close()


@pytest.mark.parametrize("change", [{}, {"mic": {"role": "reader"}}, {"mic": {"streams": "mic-2"}}])
async def test_a_key_whose_rights_change_loses_its_connections_and_its_streams_are_parked(
    ring: KeyRing, rng: np.random.Generator, change: dict[str, Any]
) -> None:
    x = random_frames(rng, 6)
    truth = whole(SMALL, x[:, 0])[0]
    async with running(SMALL, transport=ring.transport) as server:
        async with (
            RawClient(server.endpoint, curve=ring.curve("mic")) as client,
            RawClient(server.endpoint, curve=ring.curve("other")) as other,
        ):
            await client.hello()
            await other.hello()
            opened = await client.open("mic-1")
            reply = await client.step(opened.handles(), [0], x[:3])
            np.testing.assert_array_equal(reply.floats().reshape(3, H), truth[:3])

            ring.write(other={"quotas": {"connections": 5}}, **change)
            events = client.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            (line, _) = await reread(server)
            assert (line["event"], line["peers"], line["connections_ended"]) == ("peers reloaded", 1 + len(change), 1)
            assert (await client.receive()).kind is Kind.GOODBYE
            assert await events.poll(10_000)
            events.close()

            await until(lambda: server.default.numbers()["streams_parked"] == 1)
            resumed = await other.resume(["mic-1"], [3], opened.epochs(), take_over=True)
            reply = await other.step(resumed.handles(), [3], x[3:])
            np.testing.assert_array_equal(reply.floats().reshape(3, H), truth[3:])


async def test_sighup_ends_the_answers_to_a_withdrawn_key_and_another_goes_on_with_the_same_bits(
    ring: KeyRing, tmp_path: Path, rng: np.random.Generator
) -> None:
    write_model(tmp_path / "model", SMALL)
    x = random_frames(rng, 20_000)
    truth, seq = whole(SMALL, x[:, 0])[0], 0
    with serving(tmp_path / "model", *ring.arguments) as served:
        endpoint = served.until("serving")["endpoint"]
        async with (
            RawClient(endpoint, curve=ring.curve("mic")) as client,
            RawClient(endpoint, curve=ring.curve("other")) as other,
        ):
            await client.hello()
            await other.hello()
            opened = await client.open("mic-1")
            hung_up_s = answered_s = math.inf
            while (reply := await client.step(opened.handles(), [seq], x[seq : seq + 1], [seq])).kind is Kind.STEPPED:
                np.testing.assert_array_equal(reply.floats(), truth[seq])
                seq, answered_s = seq + 1, time.monotonic()
                if seq == 100:
                    ring.write(other={})
                    hung_up_s = time.monotonic()
                    served.process.send_signal(signal.SIGHUP)
                await asyncio.sleep(0.001)
            assert reply.kind is Kind.GOODBYE
            assert answered_s - hung_up_s < MOST_S
            while (resumed := await other.resume(["mic-1"], [seq], opened.epochs())).codes():
                await asyncio.sleep(0.01)  # until it is parked
            reply = await other.step(resumed.handles(), [seq], x[seq : seq + 1], [seq])
            np.testing.assert_array_equal(reply.floats(), truth[seq])


async def test_the_loop_goes_on_while_the_file_of_peers_is_read(ring: KeyRing, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(SMALL, transport=ring.transport) as server:
        known, goes_on = Principals.read(ring.peers_file), threading.Event()
        loop = asyncio.get_running_loop()

        def read(_: Path) -> Principals:
            loop.call_soon_threadsafe(goes_on.set)
            assert goes_on.wait(10)
            return known

        monkeypatch.setattr(Principals, "read", read)
        (line, *_) = await reread(server)
        assert (line["event"], line["peers"]) == ("peers reloaded", 2)


async def test_a_hello_of_a_key_that_was_withdrawn_meanwhile_is_refused(ring: KeyRing) -> None:
    async with running(SMALL, transport=ring.transport) as server:
        async with RawClient(server.endpoint, curve=ring.curve("mic")) as client:
            assert (await client.ask(msgpack.packb([Kind.PING, 1]))).code is Code.HELLO_FIRST
            ring.write(other={})
            await reread(server)
            assert (await client.ask(*client.hello_message())).code is Code.NOT_ALLOWED


async def test_a_broken_file_of_peers_changes_nothing_and_all_its_problems_are_logged(ring: KeyRing) -> None:
    async with running(SMALL, transport=ring.transport) as server:
        async with RawClient(server.endpoint, curve=ring.curve("mic")) as client:
            await client.hello()
            ring.write(mic={"role": "king"}, other={"quotas": {"streams": "many"}})
            *lines, _ = await reread(server)
            assert [line["event"] for line in lines] == ["peers not reloaded"] * 2
            assert "peers_file" in server.outdated
            assert "mic" not in server.outdated
            assert (await client.ask(msgpack.packb([Kind.PING, 1]))).kind is Kind.PONG
        async with RawClient(server.endpoint, curve=ring.curve("other")) as client:
            await client.hello()


async def test_an_empty_file_of_peers_ends_all_connections(ring: KeyRing) -> None:
    told: list[dict[str, Any]] = []
    async with running(SMALL, transport=ring.transport, told=told) as server:
        async with RawClient(server.endpoint, curve=ring.curve("mic")) as client:
            await client.hello()
            ring.peers_file.write_text("# nobody\n")
            line, _ = await reread(server)
            assert line["peers"] == 0
            assert "key" in next(line for line in told if line["event"] == "disconnected")["reason"]


async def test_an_exception_in_the_authenticator_refuses_one_handshake(
    ring: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(dict[str, Any]):
        failures = 1

        def __contains__(self, key: object) -> bool:
            self.failures -= 1
            if self.failures >= 0:
                raise RuntimeError("a bug")
            return super().__contains__(key)

    told: list[dict[str, Any]] = []
    async with running(SMALL, transport=ring.transport, told=told) as server:
        known = Principals.read(ring.peers_file)
        server.admit(Principals(Failing(known.by_key), known.by_name))
        async with RawClient(server.endpoint, curve=ring.curve("mic")) as refused:
            await refused.send(*refused.hello_message())
            await until(lambda: any(line["event"] == "handshakes failed" for line in told))
        async with RawClient(server.endpoint, curve=ring.curve("mic")) as client:
            await client.hello()
    line = next(line for line in told if line["event"] == "handshakes failed")
    assert (line["failed"], line.get("unknown_key"), str(line["exc_info"])) == (1, None, "a bug")


async def test_the_server_ends_where_nobody_could_connect_any_more(
    ring: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(Authenticator, "_answer", lambda *_: 1 / 0)
    server_ended = "a bug in the server's loop: RuntimeError('the authenticator has ended, so nobody could connect')"
    async with running(SMALL, transport=ring.transport, failure=server_ended) as server:
        async with RawClient(server.endpoint, curve=ring.curve("mic")) as client:
            await client.send(*client.hello_message())
            await until(lambda: server.shutdown.failure is not None)
