"""Quotas on a live encrypted server: what is refused, and that it is taken once there is room."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgpack
import numpy as np

from instep.security.principals import Principals
from instep_client import AsyncClient
from instep_client.protocol import wire
from instep_client.protocol.wire import Code, Kind
from tests.support.keys import KeyRing
from tests.support.models import SMALL
from tests.support.raw import RawClient
from tests.support.running import running
from tests.support.step_messages import parts

FRAMES = np.zeros((4, 1, 5), np.float32)


def ring(folder: Path, **quotas: float) -> KeyRing:
    return KeyRing(folder, ann={"quotas": quotas}, bob={})


async def test_connections_are_those_of_a_principal_and_not_of_others(tmp_path: Path) -> None:
    keys = ring(tmp_path, connections=1)
    async with (
        running(SMALL, transport=keys.transport) as server,
        RawClient(server.endpoint, curve=keys.curve("ann")) as second,
        RawClient(server.endpoint, curve=keys.curve("bob")) as other,
    ):
        async with RawClient(server.endpoint, curve=keys.curve("ann")) as first:
            await first.hello()
            refused = await second.ask(*second.hello_message())
            assert (refused.code, refused.header[4] > 0) == (Code.BUSY, True)
            await other.hello()
        while (await second.ask(*second.hello_message())).kind is not Kind.WELCOME:
            await asyncio.sleep(0.05)
        assert server.used()["ann"]["refused_total"] >= 1


async def test_streams_count_wherever_they_are_until_they_end_or_another_resumes_them(tmp_path: Path) -> None:
    keys = ring(tmp_path, streams=3)
    record = {"path": tmp_path / "rec.instep"}
    limits = {"hibernate_after_s": 0.05}
    async with (
        running(SMALL, transport=keys.transport, recording=record, limits=limits) as server,
        RawClient(server.endpoint, curve=keys.curve("ann")) as ann,
        RawClient(server.endpoint, curve=keys.curve("bob")) as bob,
    ):
        await ann.hello()
        await bob.hello()
        assert (await ann.open("a", "b")).codes() == []
        assert (await ann.open("a")).codes() == [Code.NAME_IN_USE]
        refused = await ann.open("c", "d")
        assert (refused.code, refused.header[4] > 0) == (Code.TOO_MANY_STREAMS, True)
        assert (await ann.open("c")).codes() == []
        while len(server.default.operations.hibernation) < 3:
            await asyncio.sleep(0.02)
        assert (await ann.open("d")).code is Code.TOO_MANY_STREAMS
        assert (await bob.open(*"xyz", "z2")).codes() == []
        taken = await bob.resume(["a"], [wire.HAVE_ALL], [0], take_over=True)
        assert taken.codes() == []
        assert {name: used["streams"] for name, used in server.used().items()} == {"ann": 2, "bob": 5}
        opened = await ann.open("d")
        while not opened.request:  # about the stream that was taken over
            opened = await ann.receive()
        assert opened.codes() == []
        assert (await bob.close(taken.handles())).codes() == []
        assert server.used()["bob"]["streams"] == 4


async def test_frames_beyond_the_rate_wait_as_long_as_the_answer_says(tmp_path: Path) -> None:
    keys = ring(tmp_path, frames_per_s=4.0)
    async with (
        running(SMALL, transport=keys.transport) as server,
        RawClient(server.endpoint, curve=keys.curve("ann")) as ann,
    ):
        await ann.hello()
        handles = (await ann.open("a")).handles()
        for seq in (0, 4):
            assert (await ann.step(handles, [seq], FRAMES, [seq])).kind is Kind.STEPPED
        refused = await ann.step(handles, [8], FRAMES, [8])
        assert refused.code is Code.BUSY
        await asyncio.sleep(refused.header[4] / 1e6)
        assert (await ann.step(handles, [8], FRAMES, [8])).kind is Kind.STEPPED
        assert [server.used()["ann"][each] for each in ("frames_total", "refused_total")] == [12, 1]


async def test_whoever_reads_nothing_gets_no_more_until_it_has_read(tmp_path: Path) -> None:
    keys = ring(tmp_path, unread_bytes=1500)
    async with (
        running(SMALL, transport=keys.transport) as server,
        RawClient(server.endpoint, curve=keys.curve("ann")) as ann,
    ):
        await ann.hello()
        handles = (await ann.open("a")).handles()
        await ann.statistics()  # more than that
        await ann.send(*ann.step_message(handles, [0], FRAMES))
        header, _ = parts(await ann.socket.recv_multipart())
        assert header[0] == Kind.PING
        refused = await ann.receive()
        assert (refused.code, refused.header[4] > 0) == (Code.BUSY, True)
        assert (await ann.step(handles, [0], FRAMES)).code is Code.BUSY  # it has said nothing
        await ann.send(msgpack.packb([Kind.PONG, header[1]]))
        assert (await ann.step(handles, [0], FRAMES)).kind is Kind.STEPPED
        assert server.used()["ann"]["unread_bytes"] < 1500


async def test_whoever_reads_is_not_refused_whatever_other_connections_have_not_confirmed(tmp_path: Path) -> None:
    keys = ring(tmp_path, unread_bytes=100_000)
    async with (
        running(SMALL, transport=keys.transport) as server,
        AsyncClient(server.endpoint, **keys.of_client("ann")) as one,
        AsyncClient(server.endpoint, **keys.of_client("ann")) as other,
    ):
        for stream in (await one.open("a"), await other.open("b")):
            for _ in range(100):
                await stream.step(np.zeros((50, 5), np.float32))
        assert server.used()["ann"]["refused_total"] == 0


async def test_a_refusal_asks_all_connections_whether_they_have_read(tmp_path: Path) -> None:
    keys = ring(tmp_path, unread_bytes=100_000)
    async with (
        running(SMALL, transport={**keys.transport, "heartbeat_s": 60.0}) as server,
        RawClient(server.endpoint, curve=keys.curve("ann")) as ann,
        RawClient(server.endpoint, curve=keys.curve("ann")) as idle,
    ):
        await ann.hello()
        await idle.hello()
        handles = (await ann.open("a")).handles()
        await idle.open("b")  # one without streams is asked now and then
        await idle.statistics()
        keys.write(ann={"quotas": {"unread_bytes": 2000}})  # fewer than it has not confirmed
        server.admit(Principals.read(keys.peers_file))
        assert (await ann.step(handles, [0], FRAMES)).code is Code.BUSY
        assert await idle.socket.poll(10_000)
        header, _ = parts(await idle.socket.recv_multipart())
        await idle.send(msgpack.packb([Kind.PONG, header[1]]))
        async with asyncio.timeout(10):
            while (await ann.step(handles, [0], FRAMES)).kind is not Kind.STEPPED:
                await asyncio.sleep(0.01)
