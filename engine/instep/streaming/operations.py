"""Operations on streams: open, resume, read, write, fork, close and evict.

The part of an operation before its first wait runs after all earlier frames were admitted, and before any later one.
Changes that later frames must see are made there.
"""

from __future__ import annotations

import time
from typing import Final

import numpy as np

from instep.core.admission import resolve_handles
from instep.core.ownership import ResumeDecision, check_resume
from instep.core.runs import are_pending
from instep.core.tables import SCRATCH_SLOT, WINDOW
from instep.core.typing import I32, I64, U8, U64, Bool
from instep.streaming.api import Grants, Names, Origin, Refusal, StatesRead
from instep.streaming.engine import Engine
from instep.streaming.hibernation import Hibernation
from instep.streaming.states import StreamStates
from instep.streaming.stats import EventKind
from instep.streaming.tasks import Tasks
from instep_client.protocol.codes import HAVE_ALL, Code

_ENDS: Final[dict[str, EventKind]] = {"closed": "closed", "failed": "lost", "state_lost": "lost"}
"""By reason of an end, the kind of its event, unless that is `evicted`."""
REAP_AT_ONCE: Final = 4096
"""The most streams that are parked or evicted in one tick, of all connections together."""
_LOOK_EVERY: Final = 10
"""The number of ticks between searches for idle streams. A search examines every stream."""


class StreamOperations:
    """All operations on streams except frames."""

    def __init__(
        self,
        engine: Engine,
        states: StreamStates,
        hibernation: Hibernation,
        tasks: Tasks,
    ) -> None:
        self._engine = engine
        self._table = engine.table
        self._journal = engine.journal
        self._origins = engine.origins
        self._states = states
        self._tasks = tasks
        self._tombstones = hibernation.tombstones
        self.hibernation = hibernation

    # ── Open and fork ──────────────────────────────────────────────────────────────────────────────────────────────

    async def open(self, origin: Origin, names: Names, states: U8 | None, first_seqs: I64 | None) -> Grants:
        """Open streams.

        Args:
            origin: their owner.
            names: valid names, some of which may be in use.
            states: initial states [N, row_bytes]; None for the model's own.
            first_seqs: the seqs of their first frames, int64 [N], None for 0.

        Raises:
            Refusal: the origin may not open so many more.
        """
        in_use = self._table.find(names) != SCRATCH_SLOT
        fresh = {name for name, used in zip(names, in_use.tolist(), strict=True) if not used}
        await self.hibernation.make_room(sum(name not in self.hibernation for name in fresh))
        if not self._origins.is_connected(origin):  # gone since it asked; its number may be another's now
            return Grants.none(np.full(len(names), Code.CLIENT_GONE, np.int32))
        origin.check_quota(len(fresh))
        slots, codes = self._table.open(names, origin.number, time.monotonic_ns(), first_seqs, self.hibernation)
        granted = codes == 0
        opened = slots[granted]
        if not len(opened):
            await self._journal.barrier()
            return Grants.none(codes)
        initial = None if states is None else states[granted]
        # Recorded at once: the streams can be parked or taken over before their states are written.
        granted_names = [name for name, is_granted in zip(names, granted.tolist(), strict=True) if is_granted]
        lsn = self._journal.opened(opened, granted_names, initial)
        grants = Grants.of(self._table, slots, codes)
        with self.hibernation.staying(opened):
            if await self._states.load(opened, initial) < len(opened):
                await self._give_up_opened(origin, opened, codes, granted)
                return Grants.none(codes)
            self._engine.stats.opened_streams_total += len(opened)
            self._engine.events.add_all("opened", granted_names, _connection(origin), grants.next_seqs[granted])
            self._tombstones.remove(granted_names)
            await self._journal.durable(lsn)
        if len(opened) < len(names):
            await self._journal.barrier()
        return grants

    async def _give_up_opened(self, origin: Origin, opened: I64, codes: I32, granted: Bool) -> None:
        """Close streams whose initial states could not be written, even if they have another owner by now."""
        codes[granted] = Code.STEP_FAILED
        self._table.lost[opened] = True
        self._engine.fail_pending(opened, Code.STATE_LOST)  # a new owner may have sent frames
        left = opened[~self._table.closing[opened]]
        owners = self._origins.owners(self._table, left[self._table.owner[left] != origin.number])
        await self._end(left, "failed")
        self._origins.notify(owners, Code.STATE_LOST)

    async def fork(self, origin: Origin, handles: U64, names: Names, codes: I32) -> Grants:
        """Open copies of streams, each with the state and the next seq of its original.

        Args:
            origin: the owner of the originals and the copies.
            handles: of the originals, uint64 [N].
            names: of the copies.
            codes: int32 [N], not 0 for copies that are already refused.

        Raises:
            Refusal: as `open`.
        """
        slots, found = await self._own(origin, handles)
        codes = np.where(found, found, codes).astype(np.int32)
        good = np.flatnonzero(codes == 0)
        if not len(good):
            return Grants.none(codes)
        seqs, states, lost = await self._states.read(slots[good])
        codes[good[lost]] = Code.STATE_LOST
        await self._journal.current()
        good = good[~lost]
        if not self._origins.is_connected(origin):
            return Grants.none(codes)  # gone meanwhile; its number may be another's now
        copies = await self.open(origin, [names[index] for index in good.tolist()], states[~lost], seqs[~lost])
        return copies.spread(codes)

    # ── Resume ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def resume(self, origin: Origin, names: Names, have: U64, epochs: U64, take_over: bool) -> Grants:
        """Give streams to an origin.

        The former owner's handles are fenced at once. The grant follows when nothing of the streams is pending, so that
        frames which the new owner sends again are answered from the frame buffer. The end of a stream is reported once
        it is as durable as an output, because a crash could undo it.

        Args:
            origin: the claimant.
            names: distinct names.
            have: uint64 [N], the seqs below which it has all outputs.
            epochs: uint64 [N], under which it had the streams.
            take_over: whether to take them from whichever origin owns them.

        Raises:
            Refusal: two of the names are the same.
        """
        if len(set(names)) < len(names):
            raise Refusal(Code.REPEATED_STREAM)
        asleep = await self.hibernation.wake(names)
        if not self._origins.is_connected(origin):
            return Grants.none(np.full(len(names), Code.CLIENT_GONE, np.int32))
        table, engine = self._table, self._engine
        window = int(engine.tables.counts[WINDOW])
        decision = check_resume(table, window, self._tombstones, names, have, epochs, take_over, origin.arrival)
        decision.codes[asleep != 0] = asleep[asleep != 0]
        good = decision.codes == 0
        slots = decision.slots[good]
        is_elsewhere = (table.owner[slots] != origin.number) & (table.owner[slots] != table.parked)
        elsewhere = slots[is_elsewhere]
        self._origins.notify(self._origins.owners(table, elsewhere), Code.FENCED)
        engine.events.add_all("fenced", table.names(elsewhere), _connection(origin), table.next_seq[elsewhere])
        table.hand_over(slots, origin.number, time.monotonic_ns(), decision.former_epochs[good], origin.arrival)
        with self.hibernation.staying(slots):
            return await self._grant(origin, names, decision, slots)

    async def _grant(self, origin: Origin, names: Names, decision: ResumeDecision, slots: I64) -> Grants:
        """Grant streams that were handed over, once they have no pending frames and this is durable."""
        table, engine, good = self._table, self._engine, decision.codes == 0
        incarnations = table.incarnations(slots)
        named = table.find(names)
        await self._ended(named[table.closing[named]])
        await engine.waiters.until(lambda: not are_pending(engine.packed, slots))
        if not self._origins.is_connected(origin):
            return Grants.none(decision.codes)  # gone meanwhile; its number may be another's now
        # Meanwhile another origin may have taken them, or they have ended and others are in their slots.
        is_there = table.are_open(slots, incarnations)
        is_own = is_there & (table.owner[slots] == origin.number)
        decision.codes[good] = np.where(is_own, 0, np.where(is_there, Code.FENCED, Code.UNKNOWN_STREAM))
        own = slots[is_own]
        # Not before: a pending frame has no output yet, and its step may have failed.
        acked = np.minimum(decision.have[good][is_own], table.next_seq[own])
        table.acked[own] = np.maximum(table.acked[own], acked)
        engine.stats.resumed_streams_total += len(own)
        engine.events.add_all("resumed", table.names(own), _connection(origin), table.next_seq[own])
        self._journal.resumed(own)
        grants = Grants.of(table, decision.slots, decision.codes)
        grants.expected_seqs[:] = decision.expected_seq
        await self._journal.current()
        return grants

    async def _ended(self, slots: I64) -> None:
        """Wait until all of these streams that are closing have ended."""
        table, incarnations = self._table, self._table.incarnations(slots)
        await self._engine.waiters.until(
            lambda: not (table.closing[slots] & (table.incarnations(slots) == incarnations)).any()
        )

    # ── Read and write states ──────────────────────────────────────────────────────────────────────────────────────

    async def read_own_states(self, origin: Origin, handles: U64) -> StatesRead:
        """Read states of an origin's streams.

        Each is the state before the frame of its next seq, without pending frames. It is returned once everything that
        it depends on is durable.
        """
        slots, codes = await self._own(origin, handles)
        return await self._read_states(slots, codes)

    async def read_states(self, names: Names) -> StatesRead:
        """Read states of streams by distinct names, whoever owns them; see `read_own_states`."""
        if len(set(names)) < len(names):
            raise Refusal(Code.REPEATED_STREAM)
        while True:
            asleep = await self.hibernation.read(names)
            slots = self._table.find(names)
            if not self._table.closing[slots].any():
                break
            await self._ended(slots[self._table.closing[slots]])
        codes = np.zeros(len(names), np.int32)
        for index in np.flatnonzero(slots == SCRATCH_SLOT).tolist():
            codes[index] = Code.EXPIRED if names[index] in self._tombstones else Code.UNKNOWN_STREAM
        read = await self._read_states(slots, codes)
        for index in np.flatnonzero(slots == SCRATCH_SLOT).tolist():
            if (found := asleep.get(names[index])) is not None:
                code, read.next_seqs[index], read.states[index] = found
                read.codes[index] = code or 0
        return read

    async def _read_states(self, slots: I64, codes: I32) -> StatesRead:
        good = codes == 0
        next_seqs, states = np.zeros(len(slots), np.int64), self._states.spec.missing(len(slots))
        if good.any():
            next_seqs[good], states[good], lost = await self._states.read(slots[good])
            codes[good] = np.where(lost, Code.STATE_LOST, 0)
        await self._journal.current()
        return StatesRead(next_seqs, states, codes)

    async def write_states(self, origin: Origin, handles: U64, states: U8 | None, codes: I32) -> I32:
        """Give streams without pending frames other states.

        Frames that arrive meanwhile wait, so that the change is recorded before them.

        Args:
            origin: owns the streams.
            handles: uint64 [N].
            states: [N, row_bytes], None for the model's initial state.
            codes: int32 [N], not 0 where a state is refused already.

        Returns:
            int32 [N], 0 where the state was written.
        """
        slots, found = await self._own(origin, handles)
        found[(found == 0) & (self._table.unanswered[slots] > 0)] = Code.FRAMES_PENDING
        codes = np.where(found, found, codes).astype(np.int32)
        good = codes == 0
        if not good.any():
            return codes
        changed = slots[good]
        written = None if states is None else states[good]
        count = await self._states.load(changed, written)
        if count < len(changed):
            codes[good] = Code.STEP_FAILED
            self.lose(changed[:count])  # they have changed, and the recording does not know
            return codes
        await self._journal.durable(self._journal.reset(changed, written))
        return codes

    # ── Close and evict ────────────────────────────────────────────────────────────────────────────────────────────

    async def close(self, origin: Origin, handles: U64, have: U64) -> tuple[U8, I32]:
        """Close streams once their pending frames are answered; they take no frames from now on.

        A stream whose owner lacks outputs stays open, because they could not be sent again if their replies were lost.

        Args:
            origin: owns the streams.
            handles: uint64 [N].
            have: uint64 [N], the seqs below which it has, or does not need, the outputs.

        Returns:
            states: the final ones [N, row_bytes].
            codes: int32 [N].
        """
        states, codes = self._states.spec.missing(len(handles)), np.zeros(len(handles), np.int32)
        rest = np.ones(len(handles), np.bool_)
        if asleep := self._asleep(origin, handles):
            named = {name: int(handles[place]) for place, (name, _) in asleep.items()}
            wants = {name: int(have[place]) for place, (name, _) in asleep.items()}
            closed = await self.hibernation.close(wants, named)
            for place, (name, _) in asleep.items():
                if name in closed:
                    code, states[place] = closed[name]
                    codes[place], rest[place] = code or 0, False
        slots, found = await self._own(origin, handles[rest])
        found[(found == 0) & (have[rest] < self._table.next_seq[slots].astype(np.uint64))] = Code.FRAMES_PENDING
        codes[rest] = found
        good = np.flatnonzero(rest)[found == 0]
        if len(good):
            states[good], lost = await self._end(slots[found == 0], "closed")
            codes[good] = np.where(lost, Code.STATE_LOST, 0)
        return states, codes

    async def _end(self, slots: I64, reason: str) -> tuple[U8, Bool]:
        """Close streams; returns the final states [N, row_bytes] and which of them are lost."""
        packed, holds = self._engine.packed, self._engine.tables.streams["holds"]
        self._table.closing[slots] = True
        await self._engine.waiters.until(lambda: not (are_pending(packed, slots) or holds[slots].any()))
        _, states, lost = await self._states.read(slots)
        lsn = self._journal.closed(slots, reason, states, lost)
        names, next_seqs = self._table.names(slots), self._table.next_seq[slots]
        self._engine.events.add_all(_ENDS.get(reason, "evicted"), names, reason, next_seqs)
        self._table.release(slots)
        self._origins.release_left()
        self._engine.stats.closed_streams_total += len(slots)
        self._engine.waiters.check()  # claims wait for it
        await self._journal.durable(lsn)
        return states, lost

    async def remove(self, names: Names, *, park: bool) -> I32:
        """Close or park streams by distinct names for an operator, and notify their owners; see `close`.

        Returns:
            int32 [N], 0 where it was done.

        Raises:
            Refusal: two of the names are the same, or a parked stream would end at once.
        """
        if len(set(names)) < len(names):
            raise Refusal(Code.REPEATED_STREAM)
        if park and not self.hibernation.limits.park_ns:
            sentence = "limits.park_s is 0, so a parked stream would end at once: close it, or have the limit raised"
            raise Refusal(Code.NOT_ALLOWED, sentence=sentence)
        found, now_ns = dict[str, int](), time.monotonic_ns()
        # Others go to sleep while these are closed.
        while asleep := {name: 0 for name in names if name in self.hibernation and name not in found}:
            self._origins.notify(self.hibernation.park(list(asleep), now_ns), Code.BY_OPERATOR)
            if not park:
                closed = await self.hibernation.close(dict.fromkeys(asleep, HAVE_ALL), asleep)
                asleep = {name: code or 0 for name, (code, _) in closed.items()}
            found |= asleep
        codes = np.array([found.get(name, Code.UNKNOWN_STREAM) for name in names], np.int32)
        slots = self._table.find(names)
        is_here = (codes == Code.UNKNOWN_STREAM) & (slots != SCRATCH_SLOT) & ~self._table.closing[slots]
        slots, codes[is_here] = slots[is_here], 0
        # Not later: what else its owner sends is refused, and this tells it why.
        self._origins.notify(self._origins.owners(self._table, slots), Code.BY_OPERATOR)
        if park:
            self.park(slots[self._table.owner[slots] != self._table.parked], now_ns)
            await self._journal.durable(self._journal.newest)
        elif len(slots):
            _, lost = await self._end(slots, "closed")
            codes[is_here] = np.where(lost, Code.STATE_LOST, 0)
        return codes

    def park(self, slots: I64, now_ns: int) -> None:
        """Take streams, int64 [N], from their owners; they wait to be resumed."""
        self._table.park(slots, now_ns)
        self._journal.parked(slots)
        self._engine.stats.parked_streams_total += len(slots)
        self._engine.events.add_all("parked", self._table.names(slots), seqs=self._table.next_seq[slots])
        self._origins.release_left()

    def lose(self, slots: I64) -> None:
        """End streams, int64 [N], whose states are lost."""
        self._table.lost[slots] = True
        self.evict(slots[~self._table.closing[slots]], Code.STATE_LOST)

    def expire(self, slots: I64) -> None:
        """Evict parked streams, int64 [N]; later requests for them get EXPIRED."""
        self._tombstones.add(map(self._table.name, slots.tolist()))
        self.evict(slots, Code.EXPIRED)

    def evict(self, slots: I64, code: Code) -> None:
        """Close streams, int64 [N], and notify their owners with the code when that is durable."""
        if not len(slots):
            return
        self._engine.stats.evicted(code.name.lower(), len(slots))
        self._table.closing[slots] = True
        self._tasks.start(self._evict(slots, code, self._origins.owners(self._table, slots)))

    async def _evict(self, slots: I64, code: Code, owners: list[tuple[Origin, U64]]) -> None:
        await self._end(slots, code.name.lower())
        self._origins.notify(owners, code)

    def _asleep(self, origin: Origin, handles: U64) -> dict[int, tuple[str, int]]:
        """Names and epochs of the streams of an origin that hibernate, by the index of their handle in uint64 [N]."""
        listed, asleep = handles.tolist(), self._engine.asleep
        if len(set(listed)) < len(listed):
            raise Refusal(Code.REPEATED_STREAM)
        found = {place: asleep[handle] for place, handle in enumerate(listed) if handle in asleep}
        return {place: (name, epoch) for place, (owner, name, epoch) in found.items() if owner is origin}

    async def awake(self, origin: Origin, handles: U64) -> tuple[U64, I32]:
        """Wake the streams of an origin that hibernate; its other streams stay in memory meanwhile.

        Returns:
            handles: the handles of all streams from now on, uint64 [N].
            codes: int32 [N], the reason why a stream still hibernates or was lost, otherwise 0.

        Raises:
            Refusal: a stream is named twice, or the origin has left meanwhile.
        """
        # A copy: of an array that cannot be written, as a message's is, another kernel would be compiled.
        handles, codes = handles.copy(), np.zeros(len(handles), np.int32)
        if asleep := self._asleep(origin, handles):
            table, places, names = self._table, list(asleep), [name for name, _ in asleep.values()]
            slots, found = self._resolve(origin, handles)
            with self.hibernation.staying(slots[found == 0]):
                codes[places] = await self.hibernation.wake(names)
            if not self._origins.is_connected(origin):
                raise Refusal(Code.CLIENT_GONE)
            # Meanwhile a name may have become another stream's, or a stream another owner's. An epoch never does.
            woken, epochs = table.find(names), np.array([epoch for _, epoch in asleep.values()], np.uint64)
            is_same = (table.epoch[woken] == epochs) & (table.owner[woken] == origin.number)
            handles[places] = np.where(is_same, table.slots.handles(woken), handles[places])
        return handles, codes

    async def _own(self, origin: Origin, handles: U64) -> tuple[I64, I32]:
        """Wake streams of an origin; return their slots, and the codes of those that may not be used."""
        handles, refused = await self.awake(origin, handles)
        slots, codes = self._resolve(origin, handles)
        return slots, np.where(refused, refused, codes).astype(np.int32)

    def _resolve(self, origin: Origin, handles: U64) -> tuple[I64, I32]:
        slots, codes = np.empty(len(handles), np.int64), np.empty(len(handles), np.int32)
        if resolve_handles(self._engine.packed, handles, origin.number, slots, codes):
            raise Refusal(Code.REPEATED_STREAM)
        return slots, codes


def _connection(origin: Origin) -> str:
    return f"connection {origin.number}"


class Reaper:
    """Parks the streams of connections that are gone, and ends streams that are idle or parked for too long."""

    def __init__(
        self,
        engine: Engine,
        operations: StreamOperations,
        at_once: int = REAP_AT_ONCE,
    ) -> None:
        self._engine = engine
        self._table = engine.table
        self._operations = operations
        self._hibernation = operations.hibernation
        self._at_once = at_once
        self._ticks = 0
        self._detaching: set[int] = set()
        """Numbers of origins that are gone and may own streams that are neither parked nor closing yet."""

    @property
    def is_detaching(self) -> bool:
        """Whether streams of lost connections are still to be parked or closed."""
        return bool(self._detaching)

    def detach(self, origin: Origin) -> None:
        """Park or close the streams of an origin that is gone, from the next tick on.

        Until then the streams belong to its number, which no other origin gets, and can be resumed.
        """
        self._engine.origins.disconnect(origin)
        self._detaching.add(origin.number)
        self._engine.origins.release_left()
        if not self._table.owned[origin.number]:
            self._detaching.discard(origin.number)

    def tick(self, now_ns: int) -> None:
        """Do the due work."""
        if self._detaching:
            self._park(now_ns)
        self._evict_surplus()
        looks = self._ticks % _LOOK_EVERY == 0
        if looks:
            self._evict_idle(now_ns)
        self._hibernation.tick(now_ns, looks=looks)
        self._ticks += 1

    def _park(self, now_ns: int) -> None:
        # The number of an origin whose streams were all resumed elsewhere may be another origin's by now.
        self._detaching = {number for number in self._detaching if self._engine.origins[number] is None}
        owned = self._table.owned_by(*self._detaching)
        slots, rest = owned[: self._at_once], owned[self._at_once :]
        self._detaching = set(self._table.owner[rest].tolist())
        if not self._hibernation.limits.park_ns:
            self._operations.evict(slots, Code.CLIENT_GONE)
            return
        self._operations.park(slots, now_ns)

    def _evict_surplus(self) -> None:
        table, most = self._table, self._hibernation.limits.max_parked
        if table.owned[table.parked] <= most:
            return
        excess = min(len(table.parked_since(np.iinfo(np.int64).max)) - most, self._at_once)
        if excess > 0 and self._hibernation.is_possible:
            self._hibernation.hibernate_parked(excess)
        elif excess > 0:
            self._operations.expire(table.parked_longest()[:excess])

    def _evict_idle(self, now_ns: int) -> None:
        limits, table = self._hibernation.limits, self._table
        if limits.max_idle_ns:
            idle = table.idle_since(now_ns - limits.max_idle_ns)
            # Those that are still to be parked look idle, but they have `park_ns`.
            is_detaching = np.isin(table.owner[idle], list(self._detaching))
            self._operations.evict(idle[~is_detaching][: self._at_once], Code.IDLE)
        parked = table.parked_since(now_ns - limits.park_ns)
        is_free = self._engine.tables.streams["holds"][parked] == 0  # others may be about to be resumed
        self._operations.expire(parked[is_free][: self._at_once])
