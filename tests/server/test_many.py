"""Many streams at once, some in each turn of the loop: gone with their connection, silent, or too many parked."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from instep.server.departures import Departures
from instep.server.lifecycle import Lifecycle
from instep.server.postbox import Postbox
from instep.server.tap import Tap

from instep.core.streams import StreamTable
from instep.core.typing import I64
from instep.recording.reader import RecordingReader
from instep.recording.recorder import Recorder
from instep.recording.recovery import read_recovery
from instep.recording.states import StateRows
from instep.recording.writer import RecordingWriter
from instep.server import departures as departures_module
from instep.server import evictions as evictions_module
from instep.server.server import Server
from instep_client.protocol.wire import HAVE_ALL, Code
from tests.support.models import SMALL
from tests.support.raw import RawClient
from tests.support.running import running

AT_ONCE, COUNT = 3, 10
NAMES = [f"s{number}" for number in range(COUNT)]


class Turns:
    """How many streams were parked and closed in each go, and rows a verb of the recorder was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parked: list[int] = []
        self.closed: list[int] = []
        self.rows: list[int] = []
        park, close = Tap.parked, Lifecycle.close

        def parked(tap: Tap, slots: I64) -> int:
            self.parked.append(len(slots))
            return park(tap, slots)

        def closed(lifecycle: Lifecycle, slots: I64, *rest: Any) -> None:
            self.closed.append(len(slots))
            close(lifecycle, slots, *rest)

        monkeypatch.setattr(Tap, "parked", parked)
        monkeypatch.setattr(Lifecycle, "close", closed)
        put = Recorder._put_rows

        def rows(recorder: Recorder, write: Any, count: int) -> int:
            self.rows.append(count)
            return put(recorder, write, count)

        monkeypatch.setattr(Recorder, "_put_rows", rows)


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Turns:
    for module in (departures_module, evictions_module):
        monkeypatch.setattr(module, "AT_ONCE", AT_ONCE)
    return Turns(monkeypatch)


@contextlib.asynccontextmanager
async def left_behind(**sections: Any) -> AsyncIterator[tuple[Server, RawClient, list[int]]]:
    """A server whose connection with `COUNT` streams is given up just now, another one, and the streams' epochs."""
    async with running(SMALL, **sections) as server:
        async with RawClient(server.endpoint) as gone:
            await gone.hello()
            epochs = (await gone.open(*NAMES)).epochs()
            async with RawClient(server.endpoint) as client:
                await client.hello()
                server._postbox.give_up(server._clients.all()[0])
                yield server, client, epochs


async def until_parked(server: Server, count: int) -> None:
    table = server.engine.table
    while table.owned[table.parked] != count:
        await asyncio.sleep(0.005)


async def test_streams_of_a_connection_that_is_gone_are_parked_some_at_a_time(tmp_path: Path, turns: Turns) -> None:
    path = tmp_path / "r.instep"
    async with left_behind(recording={"file": path}) as (server, client, epochs):
        await until_parked(server, COUNT)
        assert turns.parked == [3, 3, 3, 1]
        assert turns.rows == [COUNT, 3, 3, 3, 1], "one entry of the queue for all that are recorded in one go"
        resumed = await client.resume(NAMES, [0] * COUNT, epochs)
        assert resumed.failures() == []
        assert turns.rows[5:] == [COUNT]
        assert len(server._clients._free) == 1
    with RecordingReader(path) as reader:
        reader.check_positions()
        parked = [event.stream or 0 for event in reader.events() if event.kind == "parked"]
        assert sorted(parked[:COUNT]) == list(range(1, COUNT + 1))


async def test_streams_end_some_at_a_time_with_their_connection_where_none_are_kept(turns: Turns) -> None:
    async with left_behind(limits={"park_s": 0}) as (server, _, _):
        while server.engine.table.open_count:
            await asyncio.sleep(0.005)
        assert turns.closed == [3, 3, 3, 1]
        assert server._clients._free == [0]


async def test_a_stream_whose_turn_to_be_parked_has_not_come_is_resumed_or_refused_as_any_other(
    monkeypatch: pytest.MonkeyPatch, turns: Turns
) -> None:
    tidy = Departures.tidy
    monkeypatch.setattr(Departures, "tidy", lambda self: None)
    async with left_behind() as (server, client, epochs):
        table = server.engine.table
        assert not turns.parked
        tidy(server.lifecycle.departures)
        assert table.owned[table.parked] == AT_ONCE
        older = await client.resume(NAMES, [0] * COUNT, [epoch - 1 for epoch in epochs])
        assert {code for _, _, code, _ in older.failures()} == {Code.FENCED}
        resumed = await client.resume(NAMES[:8], [0] * 8, epochs[:8])
        assert resumed.failures() == []
        tidy(server.lifecycle.departures)
        own = table.owned_by(1)
        assert sorted(table.name(slot) for slot in own.tolist()) == NAMES[:8]
        assert turns.parked == [3, 2]
        assert server._clients._free == [0]
        x = np.zeros((1, 8, 5), np.float32)
        assert (await client.step(resumed.handles(), [0] * 8, x)).failures() == []


async def test_a_connection_that_gets_the_number_of_one_that_is_gone_keeps_its_streams(
    monkeypatch: pytest.MonkeyPatch, turns: Turns
) -> None:
    tidy = Departures.tidy
    monkeypatch.setattr(Departures, "tidy", lambda self: None)
    async with left_behind() as (server, client, epochs):
        tidy(server.lifecycle.departures)
        resumed = await client.resume(NAMES, [0] * COUNT, epochs)
        assert server._clients._free == [0], "its last stream was taken before its turn to be parked came"
        async with RawClient(server.endpoint) as heir:
            await heir.hello()
            taken = await heir.resume(NAMES, [0] * COUNT, resumed.epochs())
            assert server.engine.table.owned[0] == COUNT
            for _ in range(COUNT):
                tidy(server.lifecycle.departures)
            assert turns.parked == [3]
            assert (await heir.step(taken.handles(), [0] * COUNT, np.zeros((1, COUNT, 5), np.float32))).failures() == []


@pytest.mark.parametrize("park_s", [0, 300])
async def test_connections_that_go_at_once_take_a_turn_no_longer_than_one_of_them(
    monkeypatch: pytest.MonkeyPatch, turns: Turns, park_s: float
) -> None:
    """In each turn, so many streams of all of them together, after one look through the table."""
    scans, of_turns = Counter[str](), list[Counter[str]]()
    tidy = Departures.tidy

    def counted(name: str) -> Any:
        scan = getattr(StreamTable, name)

        def counting(*arguments: Any) -> Any:
            scans[name] += 1
            return scan(*arguments)

        return counting

    def turn(departures: Departures) -> None:
        scans.clear()
        tidy(departures)
        of_turns.append(scans.copy())

    kept = 4 if park_s else 0
    async with running(SMALL, limits={"park_s": park_s, "max_parked_streams": 4}) as server:
        for name in ("owned_by", "parked_since"):
            monkeypatch.setattr(StreamTable, name, counted(name))
        monkeypatch.setattr(Departures, "tidy", turn)
        table, clients = server.engine.table, server._clients
        for number in range(COUNT):
            client = clients.add(b"\0%d" % number, 0)
            assert client is not None
            table.open([f"{number}-a", f"{number}-b"], client.number, 0)
        for client in clients.all():
            server._postbox.give_up(client)
        assert not scans
        assert not turns.parked
        assert not turns.closed
        while table.open_count > kept or table.closing.any():
            await asyncio.sleep(0.005)
        assert sorted(clients._free) == list(range(COUNT))
        assert turns.parked == ([3] * 6 + [2] if park_s else [])
        assert sum(turns.closed) == 2 * COUNT - kept
        assert max(turns.closed) <= AT_ONCE
        assert {count for turn in of_turns for count in turn.values()} == {1}
        assert sum("owned_by" in turn for turn in of_turns) == 7


async def test_parked_streams_expire_some_at_a_time(turns: Turns) -> None:
    async with left_behind(limits={"park_s": 0.001}) as (server, client, epochs):
        while server.engine.table.open_count:
            await asyncio.sleep(0.005)
        assert sum(turns.closed) == COUNT
        assert max(turns.closed) <= AT_ONCE
        codes = (await client.resume(NAMES, [HAVE_ALL] * COUNT, epochs)).failures()
        assert [code for _, _, code, _ in codes] == [Code.EXPIRED] * COUNT


async def test_silent_streams_are_evicted_some_at_a_time(turns: Turns) -> None:
    async with running(SMALL, limits={"max_idle_s": 0.001}) as server, RawClient(server.endpoint) as client:
        await client.hello()
        await client.open(*NAMES)
        while server.engine.table.open_count:
            await asyncio.sleep(0.005)
        assert sum(turns.closed) == COUNT
        assert max(turns.closed) <= AT_ONCE


async def test_streams_that_are_not_parked_yet_are_not_taken_for_silent_ones(
    monkeypatch: pytest.MonkeyPatch, turns: Turns
) -> None:
    tidy, probe, ticks = Departures.tidy, Postbox.probe, list[int]()
    monkeypatch.setattr(Departures, "tidy", lambda self: None)

    def probing(postbox: Postbox, now_ns: int) -> None:
        ticks.append(now_ns)
        probe(postbox, now_ns)

    monkeypatch.setattr(Postbox, "probe", probing)
    async with left_behind(limits={"max_idle_s": 60, "first_frame_s": 60}) as (server, _, _):
        server.engine.table.last_active_ns[:] = -(10**12)
        ticks.clear()
        while len(ticks) < 2:
            await asyncio.sleep(0.005)
        assert not turns.closed
        monkeypatch.setattr(Departures, "tidy", tidy)
        await until_parked(server, COUNT)
        assert not server.statistics.evicted_by_code


async def test_beyond_the_most_that_are_kept_the_longest_parked_go_some_at_a_time(turns: Turns) -> None:
    async with left_behind(limits={"max_parked_streams": 2}) as (server, client, epochs):
        while server.engine.table.open_count > 2:
            await asyncio.sleep(0.005)
        assert sum(turns.closed) == COUNT - 2
        assert max(turns.closed) <= AT_ONCE
        await until_parked(server, 2)
        resumed = await client.resume(NAMES, [0] * COUNT, epochs)
        kept = [name for name, handle in zip(NAMES, resumed.handles(), strict=True) if handle]
        assert kept == NAMES[-2:], "those that were parked last"


async def test_after_a_restart_no_more_are_parked_than_are_kept(tmp_path: Path, turns: Turns) -> None:
    path = tmp_path / "r.instep"
    async with left_behind(recording={"file": path}) as (server, _, epochs):
        await until_parked(server, COUNT)
    async with running(SMALL, recording={"file": path}, limits={"max_parked_streams": 2}) as server:
        await until_parked(server, 2)
        assert server.statistics.evicted_by_code == {"expired": COUNT - 2}
        assert turns.closed == [3, 3, 2]
        async with RawClient(server.endpoint) as client:
            await client.hello()
            resumed = await client.resume(NAMES, [0] * COUNT, epochs)
            assert [code for _, _, code, _ in resumed.failures()] == [Code.EXPIRED] * (COUNT - 2)
    with RecordingReader(path) as reader:
        assert [info.reason for info in reader.streams()] == ["expired"] * (COUNT - 2) + [None] * 2


async def test_a_snapshot_of_many_states_takes_as_many_transactions_as_answers_should_not_wait_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    replace, commit = RecordingWriter._replace_states, RecordingWriter.commit

    def replaced(writer: RecordingWriter, through: int, rows: StateRows) -> None:
        told.append(len(rows.streams))
        replace(writer, through, rows)

    def committed(writer: RecordingWriter) -> None:
        commit(writer)
        told.append(0)

    path = tmp_path / "r.instep"
    async with running(SMALL, recording={"file": path}) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open(*NAMES)).handles()
        await client.step(handles, [0] * COUNT, np.ones((1, COUNT, 5), np.float32))
        monkeypatch.setattr(RecordingWriter, "_replace_states", replaced)
        monkeypatch.setattr(RecordingWriter, "commit", committed)
        monkeypatch.setattr(server._snapshots, "_at_once", AT_ONCE)
        server._snapshots.take()
        while server._snapshots.is_under_way:
            await asyncio.sleep(0.001)
        assert [count for count in told if count] == [3, 3, 3, 1]
        assert all(first == 0 or second == 0 for first, second in itertools.pairwise(told)), "each in its own commit"
    with read_recovery(path, lambda _: None) as recovered:
        assert list(recovered.replay()) == []
        assert [stream.seq for stream in recovered.streams] == [1] * COUNT
