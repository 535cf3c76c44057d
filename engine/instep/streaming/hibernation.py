"""Hibernation moves idle streams from memory to the recording, and back when they are needed.

A stream that hibernates is open, and all of it is in the recording: its state, its seq, its epoch and the frames that
its client has not acknowledged. Memory keeps only its name and its position in the recording. Its owner notices nothing
until its next frame or request, which wakes the stream. It then gets another slot, so the owner is sent a new handle.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Final, NamedTuple

import numpy as np

from instep.core.typing import I32, I64, U8, U64, Bool
from instep.recording.errors import DamagedRecording
from instep.recording.records import OpenStream
from instep.recording.schema import UNKNOWN_SEQ
from instep.streaming.api import Names, Origin, StreamEvent
from instep.streaming.engine import Engine
from instep.streaming.states import StreamStates, put_into_memory, state_rows
from instep.streaming.stats import EventKind
from instep.streaming.tasks import Tasks, Waiters
from instep_client.protocol.codes import Code

_AT_ONCE: Final = 1024
"""The most streams that leave memory, return to it or are checked for their age in one turn of the loop."""
_MOST_TOMBSTONES: Final = 65_536


@dataclass(frozen=True, slots=True)
class IdleLimits:
    """Limits of idle streams, in memory and in the recording: times in ns, and numbers of streams."""

    max_idle_ns: int
    """A stream of a connected client ends when it was idle for this long; 0 for never."""
    park_ns: int
    """A stream is closed this long after its connection was lost; 0 for at once."""
    max_parked: int
    """The most parked streams in memory. Beyond it those parked longest hibernate or, without a recording, are closed.
    """
    hibernate_after_ns: int = 0
    """A stream with nothing to do for this long hibernates; 0 for only when its slot is needed."""
    max_hibernated: int = 1_000_000
    """The most streams that hibernate; beyond it the streams that have hibernated longest expire."""
    quiet_ns: int = 1_000_000_000
    """A stream with nothing to do for this long leaves memory when another stream needs its slot."""
    most_wait_ns: int = 5_000_000_000
    """The longest that a waking stream waits for a free slot."""

    def expires_in_ns(self, idle_ns: int, *, has_owner: bool) -> int | None:
        """The time left until a stream expires if it stays idle; None if it never does."""
        if not has_owner:
            return max(0, self.park_ns - idle_ns)
        return max(0, self.max_idle_ns - idle_ns) if self.max_idle_ns else None


class Sleeper(NamedTuple):
    """A hibernating stream."""

    stream: int
    """Its number in the recording."""
    owner: Origin | None
    """Its owner; None if the connection is gone, or after a restart."""
    since_ns: int
    """The time since which it is idle or, without an owner, since which its connection is gone."""
    handle: int = 0
    """The owner's handle; 0 without an owner."""
    principal: int = 0
    """The principal that it counts towards."""


class Tombstones:
    """The names of the streams that expired last; older ones are forgotten."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def add(self, names: Iterable[str]) -> None:
        """Add the names of streams that have expired."""
        for name in names:
            self._names.pop(name, None)
            self._names[name] = None
        while len(self._names) > _MOST_TOMBSTONES:
            del self._names[next(iter(self._names))]

    def remove(self, names: Iterable[str]) -> None:
        """Remove names under which streams are open again."""
        for name in names:
            self._names.pop(name, None)


class Hibernation(Mapping[str, Sleeper]):
    """The streams that are open and not in memory, by name, in the order in which they left memory.

    `load` reads open streams from the recording by their numbers.
    """

    def __init__(
        self,
        engine: Engine,
        states: StreamStates,
        tombstones: Tombstones,
        load: Callable[[Sequence[int]], Awaitable[list[OpenStream]]],
        limits: IdleLimits,
        tasks: Tasks,
    ) -> None:
        self._engine = engine
        self._table = engine.table
        self._journal = engine.journal
        self._states = states
        self.tombstones = tombstones
        self._load = load
        self.limits = limits
        self._tasks = tasks
        self._asleep: dict[str, Sleeper] = {}
        self.count_of: Counter[int] = Counter()
        """How many hibernate, by the principal that they count towards; those of none are not counted."""
        self._busy: dict[str, asyncio.Future[None]] = {}
        """Names of streams that are being read from the recording, to be woken or closed."""
        self._newest_lsn = 0
        """The recording is read only once this lsn is committed."""
        self._ages: Iterator[str] = iter(())
        """Names of streams whose age is checked next."""
        self._is_behind = False
        """Whether more streams were idle than may hibernate at once."""
        self._wanted: dict[str, int] = {}
        """Names of streams for which frames have come, each with the time until which it may wait for a slot."""
        self._needs_room = Waiters()
        """Coroutines that wait for free slots."""
        self._vacant = 0
        """While `_needs_room` is checked, the number of coroutines that may still proceed."""
        self._staying: I64 = np.zeros(len(engine.table.owner), np.int64)
        """By slot, the number of requests under way that keep the stream in memory."""

    def __getitem__(self, name: str) -> Sleeper:
        return self._asleep[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._asleep)

    def __len__(self) -> int:
        return len(self._asleep)

    @property
    def is_possible(self) -> bool:
        """Whether a recording exists that can hold hibernating streams."""
        return self._journal.is_recording and not self._journal.has_failed

    def restarted(self, streams: Mapping[str, int]) -> None:
        """Add streams that a restart did not load from the recording: name → number."""
        now_ns = time.monotonic_ns()
        self._asleep.update((name, Sleeper(stream, None, now_ns)) for name, stream in streams.items())

    # ── To sleep ───────────────────────────────────────────────────────────────────────────────────────────────────

    def tick(self, now_ns: int, *, looks: bool = True) -> None:
        """Let some of the idle streams hibernate, and some of the hibernating streams expire.

        All streams are searched for idle ones if it `looks`, or if there were too many last time.
        """
        if self._needs_room:
            self._vacant = self._room(len(self._needs_room))
            self._needs_room.check()
            self._vacant = 0
        if not self.is_possible or not self._journal.room:
            return
        if self.limits.hibernate_after_ns and (looks or self._is_behind):
            before_ns, table = now_ns - self.limits.hibernate_after_ns, self._table
            sleepy = self._sleepy(np.concatenate([table.parked_since(before_ns), table.idle_since(before_ns)]))
            self._is_behind = len(sleepy) > _AT_ONCE
            self._hibernate(sleepy[:_AT_ONCE])
        if old := self._old(now_ns):
            self._tasks.start(self._expire(old))

    async def make_room(self, slots: int) -> None:
        """Let streams hibernate until `slots` are free, or no other stream may hibernate.

        Parked streams hibernate before idle streams of connected clients, those parked or idle longest first.
        """
        while self.is_possible and (missing := slots - self._table.slots.free_count) > 0:
            if not self._journal.room:
                await self._journal.committed(self._journal.newest)
            count = min(missing, _AT_ONCE)
            if not (self.hibernate_parked(count) or self._hibernate(self._idle()[:count])):
                return
            await self._journal.committed(self._newest_lsn)

    def _idle(self) -> I64:
        return self._sleepy(self._table.idle_longest(time.monotonic_ns() - self.limits.quiet_ns))

    def _room(self, most: int) -> int:
        """The count of streams, up to `most`, for which there could be room in memory now."""
        count = self._table.slots.free_count
        if count < most and self.is_possible:
            count += len(self._sleepy(self._table.parked_longest())) + len(self._idle())
        return min(count, most)

    async def _until_room(self, names: Iterable[str], until_ns: int) -> None:
        """Wait until there may be room for one of these streams, all have left hibernation, or it is `until_ns`."""

        def takes_room() -> bool:
            self._vacant -= 1
            return self._vacant >= 0

        await self._needs_room.until(
            lambda: time.monotonic_ns() > until_ns or not any(name in self._asleep for name in names) or takes_room()
        )

    def hibernate_parked(self, count: int) -> int:
        """Let up to `count` parked streams hibernate, the one parked longest first; return how many did."""
        if not self._journal.room:  # the recorder is behind
            return 0
        return self._hibernate(self._sleepy(self._table.parked_longest())[:count])

    def _sleepy(self, slots: I64) -> I64:
        """Drop the slots of streams that an operation works on; no stream in `slots` has pending frames."""
        records = self._engine.tables.streams
        is_free: Bool = (records["holds"][slots] == 0) & ~self._table.lost[slots] & (self._staying[slots] == 0)
        return slots[is_free]

    @contextmanager
    def staying(self, slots: I64) -> Iterator[None]:
        """Keep the streams in these slots, int64 [N], in memory while the block runs."""
        self._staying[slots] += 1
        try:
            yield
        finally:
            self._staying[slots] -= 1

    def _hibernate(self, slots: I64) -> int:
        """Let streams, int64 [N], leave memory, and return how many did; see `_sleepy` for which streams may."""
        if not len(slots):
            return 0
        engine, table = self._engine, self._table
        changed = slots[self._journal.dirty.are_dirty(slots)]
        if len(changed):
            try:
                rows = state_rows(engine.tables, table, changed, self._states.access.read(changed))
            except Exception as error:  # they stay as they are
                self._engine.log_failure(error, len(changed))
                return 0
            self._journal.hibernated(changed, rows)
        self._newest_lsn = self._journal.newest  # their openings and owners count too
        origins, numbers, now_ns = engine.origins, table.recording_ids(slots), time.monotonic_ns()
        owners, epochs, handles = table.owner[slots], table.epoch[slots], table.slots.handles(slots)
        columns = slots, numbers, owners, table.last_active_ns[slots], epochs, handles, table.principal[slots]
        by_stream = zip(*(each.tolist() for each in columns), strict=True)
        for slot, number, owner, active_ns, epoch, handle, principal in by_stream:
            name, origin = table.name(slot), origins[owner]
            is_leaving = origin is None and owner != table.parked  # its connection has just gone
            since_ns = now_ns if is_leaving else active_ns
            self._asleep[name] = Sleeper(number, origin, since_ns, 0 if origin is None else handle, principal)
            self.count_of[principal] += 1
            if origin is not None:
                engine.asleep[handle] = origin, name, epoch
        engine.events.add_all("hibernated", table.names(slots), seqs=table.next_seq[slots])
        table.release(slots)
        origins.release_left()
        engine.stats.hibernated_streams_total += len(slots)
        return len(slots)

    def _leave(self, name: str) -> Sleeper:
        """Remove a stream that is in memory again or has ended."""
        asleep = self._asleep.pop(name)
        self.count_of[asleep.principal] -= 1
        self._engine.asleep.pop(asleep.handle, None)
        return asleep

    # ── Awake ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def wake_wanted(self) -> None:
        """Begin to wake streams for which frames have come, unless that has begun."""
        is_waking, until_ns = bool(self._wanted), time.monotonic_ns() + self.limits.most_wait_ns
        for name in self._engine.wanted:
            self._wanted.setdefault(name, until_ns)
        self._engine.wanted.clear()
        if not is_waking:
            self._tasks.start(self._wake_for_frames())

    async def _wake_for_frames(self) -> None:
        """Wake the wanted streams, as many at a time as there is room for, and notify the owners of the others."""
        while names := list(self._wanted):
            codes = dict(zip(names, (await self._wake(names)).tolist(), strict=True))
            now_ns, table = time.monotonic_ns(), self._table
            for name, code in codes.items():
                if code == Code.TOO_MANY_STREAMS and now_ns <= self._wanted[name]:
                    continue
                del self._wanted[name]
                if code not in (0, Code.STATE_LOST) and (asleep := self._asleep.get(name)) is not None:
                    self._engine.origins.notify(_owners([asleep]), Code(code))
            slots = table.find([name for name, code in codes.items() if not code])
            table.last_active_ns[slots[table.owner[slots] != table.parked]] = now_ns  # till their frames come again
            if self._wanted.keys() <= codes.keys() and self._wanted:
                await self._until_room(list(self._wanted), min(self._wanted.values()))

    async def wake(self, names: Names) -> I32:
        """Put those of these streams into memory that hibernate, under their owner, or parked if it is gone.

        It waits for room for up to `IdleLimits.most_wait_ns`. No stream hibernates again before the caller's next wait.

        Returns:
            int32 [N], the reasons why streams still hibernate or were lost; 0 for the others.
        """
        until_ns = time.monotonic_ns() + self.limits.most_wait_ns
        while True:
            with self.staying(self._table.find(names)):  # none of them makes room for another
                codes = await self._wake(names)
            missing = [names[at] for at in np.flatnonzero(codes == Code.TOO_MANY_STREAMS).tolist()]
            if not missing or time.monotonic_ns() > until_ns:
                return codes
            await self._until_room(missing, until_ns)

    async def _wake(self, names: Names) -> I32:
        woken: list[I64] = []
        refused: dict[str, Code] = {}
        tried: set[str] = set()
        try:
            # Those that were in memory may have gone to sleep while others were read.
            while sleepers := await self._sleepers(names, tried):
                tried.update(sleepers)
                room = self._room(len(sleepers))
                refused |= dict.fromkeys(sleepers[room:], Code.TOO_MANY_STREAMS)
                with self._reading(sleepers[:room]):
                    await self._journal.committed(self._newest_lsn)
                    for first in range(0, room, _AT_ONCE):
                        part = {name: self._asleep[name] for name in sleepers[:room][first : first + _AT_ONCE]}
                        streams, unread = await self._load_all(part)
                        refused |= unread
                        await self._lose(part, unread)
                        await self.make_room(len(streams))
                        woken.append(self._put(streams, refused))
                        self._engine.hold(woken[-1])
        finally:
            for slots in woken:
                self._engine.release(slots)
            self._engine.waiters.check()  # closings wait for it
        woken_since = {name for name, code in refused.items() if name not in self._asleep and code != Code.STATE_LOST}
        return np.array([0 if name in woken_since else refused.get(name, 0) for name in names], np.int32)

    async def _sleepers(self, names: Names, tried: set[str]) -> list[str]:
        """Names of streams that hibernate and were not tried, once no other task is waking or ending them."""
        while busy := {self._busy[name] for name in names if name in self._busy}:
            await asyncio.wait(busy)
        return [name for name in dict.fromkeys(names) if name in self._asleep and name not in tried]

    def _put(self, streams: list[OpenStream], refused: dict[str, Code]) -> I64:
        """Put streams into memory while there is room, and return their slots."""
        code = Code.TOO_MANY_STREAMS
        try:
            slots = put_into_memory(self._engine.tables, self._table, self._states.access, streams)
        except Exception as error:  # a device's failure may be gone at the next try
            self._engine.log_failure(error, len(streams))
            slots, code = np.zeros(0, np.int64), Code.STEP_FAILED
        refused.update((stream.name, code) for stream in streams[len(slots) :])
        owned: dict[Origin, list[tuple[int, int]]] = {}
        for slot, stream in zip(slots.tolist(), streams, strict=False):
            asleep = self._leave(stream.name)
            self._table.last_active_ns[slot] = asleep.since_ns  # being woken does not prolong its time
            self._table.principal[slot] = asleep.principal
            if asleep.owner is not None and self._engine.origins.is_connected(asleep.owner):
                owned.setdefault(asleep.owner, []).append((slot, asleep.handle))
        for owner, pairs in owned.items():
            own = np.array([slot for slot, _ in pairs])
            former = np.array([handle for _, handle in pairs], np.uint64)  # else those from 2^63 on would be rounded
            self._table.unpark(own, owner.number)
            owner.notify(StreamEvent(Code.HIBERNATED, former, self._table.slots.handles(own)))
        self._engine.stats.woken_streams_total += len(slots)
        self._engine.events.add_all("woken", self._table.names(slots), seqs=self._table.next_seq[slots])
        return slots

    @contextmanager
    def _reading(self, names: list[str]) -> Iterator[None]:
        """Keep others from waking or closing these streams while the block runs."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._busy.update(dict.fromkeys(names, done))
        try:
            yield
        finally:
            for name in names:
                del self._busy[name]
            done.set_result(None)

    async def read(self, names: Names) -> dict[str, tuple[Code | None, int, U8]]:
        """Read states without waking a stream.

        Returns:
            By name, for those of these streams that hibernate: the code of a failure, the next seq, and the state,
            uint8 [row_bytes].
        """
        found: dict[str, tuple[Sleeper, tuple[Code | None, int, U8]]] = {}

        def is_read(name: str) -> bool:
            return name in found and found[name][0] is self._asleep[name]  # else it was awake meanwhile

        while sleepers := [name for name in names if name in self._asleep and not is_read(name)]:
            part = {name: self._asleep[name] for name in sleepers[:_AT_ONCE]}
            await self._journal.committed(self._newest_lsn)
            streams, refused = await self._load_all(part)
            nothing = self._states.spec.missing(1)[0]
            found |= {name: (part[name], (code, 0, nothing)) for name, code in refused.items()}
            for stream, row in zip(streams, self._rows(streams), strict=True):
                found[stream.name] = part[stream.name], (None, stream.seq, row)
        return {name: what for name, (asleep, what) in found.items() if self._asleep.get(name) is asleep}

    def _rows(self, streams: list[OpenStream]) -> U8:
        rows = self._states.spec.initial(len(streams))
        for row, stream in zip(rows, streams, strict=True):
            if stream.state is not None:
                row[:] = stream.state
        return rows

    async def _load_all(self, sleepers: Mapping[str, Sleeper]) -> tuple[list[OpenStream], dict[str, Code]]:
        """Return the streams that could be read, and by name the reasons for the others."""
        try:
            return await self._load([asleep.stream for asleep in sleepers.values()]), {}
        except Exception as error:  # also of a system that has no thread or memory left to read it
            if len(sleepers) == 1:
                self._engine.log_failure(error, 1)
                is_damaged = isinstance(error, DamagedRecording)
                return [], dict.fromkeys(sleepers, Code.STATE_LOST if is_damaged else Code.STEP_FAILED)
        streams, refused = list[OpenStream](), dict[str, Code]()
        for name, asleep in sleepers.items():
            one, unread = await self._load_all({name: asleep})
            streams += one
            refused |= unread
        return streams, refused

    # ── To an end ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _old(self, now_ns: int) -> list[str]:
        """Some of the streams that have to end now; it takes several ticks to look at all streams."""
        limits, origins = self.limits, self._engine.origins
        surplus = islice(self._asleep, min(max(0, len(self._asleep) - limits.max_hibernated), _AT_ONCE))
        old = dict.fromkeys(surplus)
        looked_at = list(islice(self._ages, _AT_ONCE))
        if not looked_at:
            self._ages = iter(list(self._asleep))
        for name in looked_at:
            if (asleep := self._asleep.get(name)) is None:
                continue
            owner, since_ns = asleep.owner, asleep.since_ns
            if owner is not None and not origins.is_connected(owner):
                self.park([name], now_ns)
            elif (owner is None or limits.max_idle_ns) and now_ns - since_ns > (
                limits.park_ns if owner is None else limits.max_idle_ns
            ):
                old[name] = None
        return [name for name in old if name not in self._busy]

    def park(self, names: Names, now_ns: int) -> list[tuple[Origin, U64]]:
        """Take hibernating streams from their owners, and return these, each with its handle."""
        owned = {name: asleep for name in names if (asleep := self._asleep.get(name)) and asleep.owner is not None}
        for name, asleep in owned.items():
            self._engine.asleep.pop(asleep.handle, None)
            self._asleep[name] = asleep._replace(owner=None, since_ns=now_ns, handle=0)
        return _owners(owned.values())

    async def _expire(self, names: list[str]) -> None:
        """Close streams; later requests for them get EXPIRED."""
        names = [name for name in names if name in self._asleep and name not in self._busy]  # a moment has passed
        if not names:
            return
        with self._reading(names):
            asleep = {name: self._asleep[name] for name in names}
            streams, unread = await self._end(asleep, "expired", "evicted")
            for name in unread.keys() & self._asleep.keys():  # tried again as late as if it went to sleep now
                self._asleep[name] = self._asleep[name]._replace(since_ns=time.monotonic_ns())
            self.tombstones.add(stream.name for stream in streams)
            self._engine.stats.evicted("expired", len(streams))
            self._engine.origins.notify(_owners(asleep[stream.name] for stream in streams), Code.EXPIRED)

    async def close(self, have: Mapping[str, int], handles: Mapping[str, int]) -> dict[str, tuple[Code | None, U8]]:
        """Close streams without waking them.

        Args:
            have: by name, the seq below which the owner has every output or gives it up.
            handles: by name, the owner's handles; 0 for streams without an owner. Other streams are left out.

        Returns:
            By name, for streams that hibernated: the code of a refusal or None, and the final state, uint8 [row_bytes].
        """
        nothing = self._states.spec.missing(1)[0]
        closed: dict[str, tuple[Code | None, U8]] = {}
        names = [name for name in await self._sleepers(list(have), set()) if self._asleep[name].handle == handles[name]]
        with self._reading(names):
            for first in range(0, len(names), _AT_ONCE):
                part = {name: self._asleep[name] for name in names[first : first + _AT_ONCE]}
                streams, refused = await self._end(part, "closed", "closed", have)
                closed |= {name: (code, nothing) for name, code in refused.items()}
                rows = self._rows(streams)
                closed |= {stream.name: (None, row) for stream, row in zip(streams, rows, strict=True)}
        await self._journal.durable(self._journal.newest)
        return closed

    async def _end(
        self, sleepers: Mapping[str, Sleeper], reason: str, kind: EventKind, have: Mapping[str, int] | None = None
    ) -> tuple[list[OpenStream], dict[str, Code]]:
        """Close streams; returns the closed ones, and codes by name for the others."""
        await self._journal.committed(self._newest_lsn)
        streams, refused = await self._load_all(sleepers)
        await self._lose(sleepers, refused)
        if have is not None:
            refused |= {each.name: Code.FRAMES_PENDING for each in streams if have[each.name] < each.seq}
            streams = [stream for stream in streams if stream.name not in refused]
        seqs = np.array([each.seq for each in streams], np.int64)
        self._ended([each.name for each in streams], reason, kind, seqs, self._rows(streams), is_lost=False)
        return streams, refused

    async def _lose(self, sleepers: Mapping[str, Sleeper], refused: Mapping[str, Code]) -> None:
        """End the streams whose states the recording has lost, and notify their owners."""
        names = [name for name, code in refused.items() if code == Code.STATE_LOST]
        if not names:
            return
        nothing, seqs = self._states.spec.missing(len(names)), np.full(len(names), UNKNOWN_SEQ)
        self._ended(names, "state_lost", "lost", seqs, nothing, is_lost=True)
        self._engine.stats.evicted("state_lost", len(names))
        await self._journal.durable(self._journal.newest)
        self._engine.origins.notify(_owners(sleepers[name] for name in names), Code.STATE_LOST)

    def _ended(self, names: list[str], reason: str, kind: EventKind, seqs: I64, rows: U8, *, is_lost: bool) -> None:
        numbers = np.array([self._leave(name).stream for name in names], np.int64)
        self._journal.ended(numbers, reason, seqs, rows, np.full(len(names), is_lost))
        self._engine.stats.closed_streams_total += len(names)
        self._engine.events.add_all(kind, names, reason, seqs)


def _owners(sleepers: Iterable[Sleeper]) -> list[tuple[Origin, U64]]:
    """The owners of streams that have one, each with its handle."""
    return [(each.owner, np.array([each.handle], np.uint64)) for each in sleepers if each.owner is not None]
