"""Streams from opening to end: opened, parked, resumed, looked at, changed, closed, evicted."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from instep.core.ownership import judge_claims
from instep.core.rings import Rings
from instep.core.slots import SCRATCH_SLOT
from instep.core.streams import NO_OWNER, StreamTable
from instep.core.typing import F32, I32, I64, U64, Bool
from instep.runtime.stepper import Stepper
from instep.runtime.worker import Worker
from instep.server import replies
from instep.server.clients import Client, ClientTable
from instep.server.departures import Departures
from instep.server.postbox import Postbox
from instep.server.statistics import Statistics
from instep.server.tap import Tap
from instep.server.waits import Waits
from instep_client.protocol.wire import GRANT, Code, GrantArray

_TOMBSTONES = 65_536
"""Names of expired streams that are remembered."""


class Lifecycle:
    """Everything that happens to streams but frames.

    Args:
        table: the streams.
        rings: their frames.
        stepper: the states.
        worker: runs the stepper.
        clients: connections, whose numbers own streams.
        postbox: where notices go.
        tap: where it is recorded.
        statistics: what is counted.
        log_failure: told of jobs of the worker that failed.
        parks: whether streams of a connection that is gone are kept for a while.
        max_parked: the most streams that are parked at once; beyond it the longest parked are evicted.
    """

    def __init__(
        self,
        table: StreamTable,
        rings: Rings,
        stepper: Stepper,
        worker: Worker,
        clients: ClientTable,
        postbox: Postbox,
        tap: Tap,
        statistics: Statistics,
        log_failure: Callable[[Exception | None, int], None],
        *,
        parks: bool,
        max_parked: int,
    ) -> None:
        self._table = table
        self._rings = rings
        self._stepper = stepper
        self._clients = clients
        self._postbox = postbox
        self._tap = tap
        self._statistics = statistics
        self._log_failure = log_failure
        self.waits = Waits(table, worker)
        """What waits for frames, for the worker, for other streams to end."""
        self.departures = Departures(
            table, clients, tap, statistics, self.evict, self.expire, parks=parks, max_parked=max_parked
        )
        """Connections that are gone."""
        self._expired: OrderedDict[str, None] = OrderedDict()
        self.on_ready: Callable[[I64], None] = lambda slots: None
        """Called with slots that can step again, int64 [N]."""
        self.on_not_loaded: Callable[[I64], None] = lambda slots: None
        """Called with slots that were held for a state that could not be loaded, int64 [N]; they are closing."""

    # ── Open ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def open(
        self,
        client: Client,
        names: Sequence[str],
        states: F32 | None,
        first_seqs: I64 | None,
        on_opened: Callable[[GrantArray, I32], None],
    ) -> None:
        """Open streams; `on_opened` gets grants [N] (handle 0 where refused) and codes int32 [N].

        Args:
            client: who will own them.
            names: good names, some of which may be in use.
            states: initial states, finite float32 [N, layers, size], or None for zeros.
            first_seqs: the seqs of their first frames, int64 [N], or None for 0.
            on_opened: called when the slots hold their initial states.
        """
        slots, codes = self._table.open(names, client.number, time.monotonic_ns(), first_seqs)
        granted = codes == 0
        opened = slots[granted]
        if not len(opened):
            on_opened(np.zeros(len(slots), GRANT), codes)
            return
        initial = None if states is None else states[granted]
        # Noted down at once: the streams can be parked or taken over before the worker has loaded their states.
        granted_names = [name for name, is_granted in zip(names, granted.tolist(), strict=True) if is_granted]
        ticket = self._tap.opened(opened, granted_names, initial)
        grants = np.zeros(len(slots), GRANT)
        grants[granted] = self._grants(opened)
        self._rings.hold(opened)

        def done(_: F32 | None, error: Exception | None) -> None:
            if error is None:
                self.on_ready(self._rings.let_go(opened))
                for name in names:
                    self._expired.pop(name, None)
                self._tap.when_durable(ticket, lambda: on_opened(grants, codes))
                return
            self._log_failure(error, len(opened))
            codes[granted] = Code.STEP_FAILED
            self._table.lost[opened] = True
            is_left = ~self._table.closing[opened]  # the others are on their way out already
            taken = opened[is_left & (self._table.epoch[opened] != grants["epoch"][granted])]
            owners = self._owners(taken)

            def closed(_: F32, __: Bool) -> None:
                on_opened(np.zeros(len(slots), GRANT), codes)
                self._notify(owners, Code.STATE_LOST)

            self.close(opened[is_left], "failed", closed)
            self.on_not_loaded(opened)  # somebody who took a stream over may have sent frames

        # Whoever reads the slots from now on must not find what is left of their last streams.
        self.waits.submit(lambda: self._stepper.load(opened, initial), done)

    def _grants(self, slots: I64) -> GrantArray:
        grants = np.zeros(len(slots), GRANT)
        grants["handle"] = self._table.slots.handles(slots)
        grants["epoch"] = self._table.epoch[slots]
        grants["next_seq"] = self._table.next_seq[slots]
        return grants

    # ── Resume ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def resume(
        self,
        client: Client,
        names: Sequence[str],
        have: U64,
        epochs: U64,
        take_over: bool,
        on_resumed: Callable[[GrantArray, I32, I64], None],
    ) -> None:
        """Give streams to a connection; `on_resumed` gets grants [N], codes int32 [N] and the expected seqs int64 [N].

        The former owner's handles are fenced at once; the answer follows when nothing of the streams is pending, so
        that what the new owner sends again is answered from the rings. Nobody is told that a stream is no more before
        its end is as durable as an output would be: a crash could undo it.

        Args:
            client: who claims them.
            names: distinct names.
            have: uint64 [N], outputs the client holds (seqs below it).
            epochs: uint64 [N], under which it had the streams.
            take_over: whether to take them from whoever owns them.
            on_resumed: called once.
        """
        window, arrival = self._rings.window, client.arrival
        claims = judge_claims(self._table, window, self._expired, names, have, epochs, take_over, arrival)
        good = claims.codes == 0
        slots = claims.slots[good]
        self._tell_owners(slots, Code.FENCED, besides=client.number)
        self._hand_over(slots, client, claims.former_epochs[good])
        table, openings = self._table, self._table.openings(slots)

        def answered() -> None:
            if self._clients.by_number(client.number) is not client:
                return  # gone meanwhile; its number may be another's now
            # Meanwhile somebody else may have taken them, or they have ended and others are in their slots.
            is_there = (table.openings(slots) == openings) & (table.owner[slots] != NO_OWNER)
            is_own = is_there & (table.owner[slots] == client.number)
            own = slots[is_own]
            grants = np.zeros(len(names), GRANT)
            grants[np.flatnonzero(good)[is_own]] = self._grants(own)
            claims.codes[good] = np.where(is_own, 0, np.where(is_there, Code.FENCED, Code.UNKNOWN_STREAM))
            # Not before: what is pending is no output yet, and its step may fail.
            have = np.minimum(claims.have[good][is_own], table.next_seq[own])
            table.acked[own] = np.maximum(table.acked[own], have)
            self._statistics.resumed_streams_total += len(own)
            self._tap.resumed(own)
            # That, or what a refusal rests on.
            self.when_all_is_durable(lambda: on_resumed(grants, claims.codes, claims.expected_seq))

        named = table.find_all(names)
        closing = named[table.closing[named]]
        self.waits.when_ended(closing, lambda: self.waits.when_answered(slots, answered))

    def _hand_over(self, slots: I64, to: Client, former_epochs: U64) -> None:
        owners = set(self._table.owner[slots].tolist())
        self._table.hand_over(slots, to.number, time.monotonic_ns(), former_epochs, to.arrival)
        self.departures.may_have_left(owners)

    # ── Look at and change ─────────────────────────────────────────────────────────────────────────────────────────

    def find(self, names: Sequence[str], on_found: Callable[[I64, I32], None]) -> None:
        """Find streams, whoever has them, once those of them that are closing have ended.

        `on_found` gets their slots int64 [N], and codes int32 [N], 0 where there is such a stream.
        """
        slots, codes = self._table.find_all(names), np.zeros(len(names), np.int32)
        closing = slots[self._table.closing[slots]]
        if len(closing):
            self.waits.when_ended(closing, lambda: self.find(names, on_found))
            return
        for index in np.flatnonzero(slots == SCRATCH_SLOT).tolist():
            codes[index] = Code.EXPIRED if names[index] in self._expired else Code.UNKNOWN_STREAM
        on_found(slots, codes)

    def read_state(self, slots: I64, on_read: Callable[[I64, F32, Bool], None]) -> None:
        """Read states; `on_read` gets the next seqs int64 [N], the states [N, layers, size] and which are lost (NaN).

        A state is the one after every frame before its seq, whatever is pending. It is told when everything that it
        rests on is durable.
        """

        def read(seqs: I64, states: F32, lost: Bool) -> None:
            self.when_all_is_durable(lambda: on_read(seqs, states, lost))

        self._read(slots, read)

    def when_all_is_durable(self, act: Callable[[], None]) -> None:
        """Tell somebody something once everything that was recorded so far is as durable as an output would be.

        What is told is not recorded itself, so the recorder's queue does not bound how much of it waits: `waits` does.
        """
        self._tap.when_durable(self._tap.newest, self.waits.until_told(act))

    def _read(self, slots: I64, on_read: Callable[[I64, F32, Bool], None]) -> None:
        readable = ~self._table.lost[slots]

        def done(found: F32 | None, error: Exception | None) -> None:
            lost = self._table.lost[slots]
            states = self._stepper.no_states(len(slots))
            if found is not None:
                states[readable] = found
            else:
                self._log_failure(error, len(slots))
                lost[:] = True
            states[lost] = np.nan
            # Steps that were submitted before have been handed back before, later ones will be later.
            on_read(self._table.step_seq[slots], states, lost)

        self.waits.submit(lambda: self._stepper.read(slots[readable]), done)

    def reset(self, slots: I64, states: F32 | None, on_reset: Callable[[bool], None]) -> None:
        """Give streams with nothing pending another state, zeros where None; `on_reset` gets whether it was done.

        Frames that come meanwhile wait, so that the recording has the change before them.
        """
        self._rings.hold(slots)

        def done(_: F32 | None, error: Exception | None) -> None:
            if error is None:
                ticket = self._tap.reset(slots, states)
                self._tap.when_durable(ticket, lambda: on_reset(True))
            else:
                self._log_failure(error, len(slots))
                on_reset(False)
            self.on_ready(self._rings.let_go(slots))

        self.waits.submit(lambda: self._stepper.load(slots, states), done)

    # ── Close ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def close(self, slots: I64, reason: str, on_closed: Callable[[F32, Bool], None]) -> None:
        """Close streams once what they have pending is answered; they take nothing more from now on.

        `on_closed` gets the final states, float32 [N, layers, size], and which of them are lost (NaN): bool [N].
        """
        self._table.closing[slots] = True

        def answered() -> None:
            self._read(slots, released)

        def released(_: I64, states: F32, lost: Bool) -> None:
            ticket = self._tap.closed(slots, reason, states, lost)
            self._release(slots)
            self._tap.when_durable(ticket, lambda: on_closed(states, lost))
            self.waits.ended()

        self.waits.when_answered(slots, answered)

    def _release(self, slots: I64) -> None:
        owners = self._table.owner[slots]
        self._table.release(slots)
        self.departures.may_have_left(set(owners.tolist()))

    # ── Evict ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def expire(self, slots: I64) -> None:
        """Evict parked streams; whoever asks for them later is told that they were here."""
        for slot in slots.tolist():
            self._expired[self._table.name(slot)] = None
        while len(self._expired) > _TOMBSTONES:
            self._expired.popitem(last=False)
        self.evict(slots, Code.EXPIRED)

    def evict(self, slots: I64, code: Code) -> None:
        """Close streams for a reason, and tell their owners."""
        if not len(slots):
            return
        self._statistics.evicted(code, len(slots))
        owners = self._owners(slots)
        self.close(slots, code.name.lower(), lambda *_: self._notify(owners, code))

    def _tell_owners(self, slots: I64, code: Code, besides: int) -> None:
        owners = self._table.owner[slots]
        others = (owners != besides) & (owners != self._table.parked)
        self._notify(self._owners(slots[others]), code)

    def _owners(self, slots: I64) -> list[tuple[Client, U64]]:
        """The connections that own streams and are not gone, each with the handles of those that it owns.

        Connections and not their numbers, since a number may be another's by the time that they are told.
        """
        slots = slots[np.argsort(self._table.owner[slots], kind="stable")]
        numbers, handles = self._table.owner[slots], self._table.slots.handles(slots)
        first = np.flatnonzero(np.diff(numbers, prepend=NO_OWNER))
        owners = map(self._clients.by_number, numbers[first].tolist())
        return [
            (owner, own) for owner, own in zip(owners, np.split(handles, first[1:]), strict=False) if owner is not None
        ]

    def _notify(self, owners: list[tuple[Client, U64]], code: Code) -> None:
        now_ns = time.monotonic_ns()
        for owner, handles in owners:
            self._postbox.send(owner, replies.evicted(code, handles), now_ns)
