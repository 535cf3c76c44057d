"""Open streams: their names, owners, epochs and seqs."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Final

import numpy as np

from instep.core.slots import SlotAllocator
from instep.core.tables import NO_OWNER, SCRATCH_SLOT, Tables
from instep.core.typing import I32, I64, U32, U64, Bool
from instep_client.protocol.codes import Code

_ONE: Final = np.int64(1)


class StreamTable:
    """The streams in memory, by slot. The columns that the hot path needs are in `Tables`.

    An epoch is one ownership of one stream; epochs are unique in a server and only rise. A stream whose connection is
    lost is parked: it belongs to `parked`, a number that no connection has, until a client resumes it.

    `first_generations` is passed to `SlotAllocator`; epochs begin above `last_epoch`.
    """

    def __init__(self, tables: Tables, first_generations: U32, last_epoch: int = 0) -> None:
        self.slots = SlotAllocator(tables, first_generations)
        streams, rows = tables.streams, len(tables.streams)
        self.parked = len(tables.origins) - 1
        self.last_epoch = last_epoch
        self.owner: I32 = streams["owner"]
        self.owned: I64 = tables.origins["streams"]
        self.next_seq: I64 = streams["next_seq"]
        self.step_seq: I64 = streams["step_seq"]
        self.acked: I64 = streams["acked"]
        self.unanswered: I32 = streams["unanswered"]
        self.closing: Bool = streams["closing"].view(np.bool_)
        self.lost: Bool = streams["lost"].view(np.bool_)
        self.last_active_ns: I64 = streams["last_active_ns"]
        self.epoch: U64 = np.zeros(rows, np.uint64)
        self.former_epoch: U64 = np.zeros(rows, np.uint64)
        """The epoch with which the owner resumed the stream; 0 if the stream was taken over."""
        self.granted_seq: I64 = np.zeros(rows, np.int64)
        """The seq that the stream expected next when the present epoch was granted."""
        self.granted_to: I64 = np.zeros(rows, np.int64)
        """The arrival number of the owner's connection; 0 if unknown."""
        self.first_seq: I64 = np.zeros(rows, np.int64)
        """The seq with which the stream began."""
        self.recording_id: U32 = np.zeros(rows, np.uint32)
        """The stream's number in the recording."""
        self.principal: U32 = np.zeros(rows, np.uint32)
        """The principal that the stream counts towards, also while it is parked; 0 for none."""
        self.principal_of: U32 = np.zeros(len(tables.origins), np.uint32)
        """By the number of an owner, its principal."""
        self._first_generation: U32 = streams["first_generation"]
        self._names: list[str] = [""] * rows
        self._slots_of_names: dict[str, int] = {}

    @property
    def open_count(self) -> int:
        """The count of open streams, closing ones included."""
        return len(self._slots_of_names)

    def name(self, slot: int) -> str:
        """The name of an open stream."""
        return self._names[slot]

    def names(self, slots: I64) -> list[str]:
        """The names of open streams, int64 [N]."""
        return [self._names[slot] for slot in slots.tolist()]

    def find(self, names: Sequence[str]) -> I64:
        """The slots of the open streams of those names, int64 [N]; the scratch slot for a name without a stream."""
        return np.array([self._slots_of_names.get(name, SCRATCH_SLOT) for name in names], np.int64)

    def open(
        self,
        names: Sequence[str],
        owner: int,
        now_ns: int,
        first_seqs: I64 | None = None,
        taken: Container[str] = (),
    ) -> tuple[I64, I32]:
        """Open streams.

        Args:
            names: the streams' names; names in use are refused.
            owner: the number of their owner.
            now_ns: on any monotonic clock.
            first_seqs: the seqs of their first frames, int64 [N]; None for 0.
            taken: names that are in use elsewhere.

        Returns:
            slots: int64 [N], the scratch slot if refused.
            codes: int32 [N], 0 or `NAME_IN_USE` or `TOO_MANY_STREAMS`.
        """
        slots = np.full(len(names), SCRATCH_SLOT, np.int64)
        codes = np.zeros(len(names), np.int32)
        fresh: dict[str, int] = {}
        for index, name in enumerate(names):
            if name in fresh or name in self._slots_of_names or name in taken:
                codes[index] = Code.NAME_IN_USE
            else:
                fresh[name] = index
        granted = self.slots.allocate(len(fresh))
        for position, (name, index) in enumerate(fresh.items()):
            if position >= len(granted):
                codes[index] = Code.TOO_MANY_STREAMS
                continue
            slot = int(granted[position])
            slots[index] = slot
            self._names[slot] = name
            self._slots_of_names[name] = slot
        first = 0 if first_seqs is None else first_seqs[codes == 0]
        self.owner[granted] = owner
        self.owned[owner] += len(granted)
        for column in (self.first_seq, self.next_seq, self.step_seq, self.acked):
            column[granted] = first
        self.unanswered[granted] = 0
        for flag in (self.closing, self.lost):
            flag[granted] = False
        self.principal[granted] = self.principal_of[owner]
        self.last_active_ns[granted] = now_ns
        self._first_generation[granted] = self.slots.generations(granted)
        self._new_epochs(granted, None)
        self.granted_to[granted] = 0
        return slots, codes

    def incarnations(self, slots: I64) -> U32:
        """A number for each open stream, uint32 [N], that differs from that of the next stream in its slot."""
        numbers: U32 = self._first_generation[slots]
        return numbers

    def are_open(self, slots: I64, incarnations: U32) -> Bool:
        """Whether slots still contain the streams of these `incarnations`, including closing ones: bool [N]."""
        there: Bool = (self.incarnations(slots) == incarnations) & (self.owner[slots] != NO_OWNER)
        return there

    def recording_ids(self, slots: I64) -> I64:
        """The streams' numbers in the recording: int64 [N]."""
        return self.recording_id[slots].astype(np.int64)

    def hand_over(
        self, slots: I64, owner: int, now_ns: int, former_epochs: U64 | None = None, arrival: int = 0
    ) -> None:
        """Give streams to another owner, with new epochs; their former handles are fenced.

        Args:
            slots: int64 [N], distinct.
            owner: the new owner's number.
            now_ns: any monotonic clock.
            former_epochs: uint64 [N], the epoch that the new owner holds of each, 0 where it holds none; None for 0.
            arrival: the arrival number of the new owner's connection, from 1.
        """
        self.slots.renew(slots)
        self._move(slots, owner)
        self.principal[slots] = self.principal_of[owner]
        self._new_epochs(slots, former_epochs)
        self.granted_to[slots] = arrival
        self.last_active_ns[slots] = now_ns

    def park(self, slots: I64, now_ns: int) -> None:
        """Give streams whose connection is gone to `parked`, until a client resumes them."""
        self._move(slots, self.parked)
        self.last_active_ns[slots] = now_ns

    def unpark(self, slots: I64, owner: int) -> None:
        """Give parked streams back to the owner that has their epochs."""
        self._move(slots, owner)

    def _move(self, slots: I64, owner: int) -> None:
        np.subtract.at(self.owned, self.owner[slots], _ONE)
        self.owner[slots] = owner
        self.owned[owner] += len(slots)

    def _new_epochs(self, slots: I64, former_epochs: U64 | None) -> None:
        self.former_epoch[slots] = 0 if former_epochs is None else former_epochs
        self.granted_seq[slots] = self.next_seq[slots]
        self.epoch[slots] = np.arange(self.last_epoch + 1, self.last_epoch + 1 + len(slots), dtype=np.uint64)
        self.last_epoch += len(slots)

    def release(self, slots: I64) -> None:
        """Forget streams whose frames are all answered, and free their slots."""
        assert not self.unanswered[slots].any(), "a stream with unanswered frames may not be released"
        for slot in slots.tolist():
            del self._slots_of_names[self._names[slot]]
            self._names[slot] = ""
        np.subtract.at(self.owned, self.owner[slots], _ONE)
        self.owner[slots] = NO_OWNER
        self.closing[slots] = False
        self.slots.release(slots)

    def counts(self) -> I64:
        """How many streams count towards each principal, by its number."""
        return np.bincount(self.principal[self.owner != NO_OWNER])

    def open_slots(self) -> I64:
        """Slots of all open streams, including closing ones: int64 [N], rising."""
        return np.flatnonzero(self.owner != NO_OWNER)

    def open_between(self, first: int, end: int, *, parked: bool | None = None) -> I64:
        """Slots from `first` to `end` of streams that are not closing, only parked or connected ones if asked for."""
        owner = self.owner[first:end]
        is_open = (owner != NO_OWNER) & ~self.closing[first:end]
        if parked is not None:
            is_open &= (owner == self.parked) == parked
        return first + np.flatnonzero(is_open)

    def owned_by(self, *owners: int) -> I64:
        """Slots of these owners' streams that are not closing: int64 [N], rising."""
        is_theirs = np.zeros(self.parked + 2, np.bool_)  # the last one is `NO_OWNER`
        is_theirs[list(owners)] = True
        return np.flatnonzero(is_theirs[self.owner] & ~self.closing)

    def idle_since(self, before_ns: int) -> I64:
        """Slots of connected streams without pending frames that were last active before that time: int64 [N]."""
        return self._silent(before_ns, (self.owner != NO_OWNER) & (self.owner != self.parked))

    def parked_since(self, before_ns: int) -> I64:
        """Slots of streams that were parked before that time: int64 [N]."""
        return self._silent(before_ns, self.owner == self.parked)

    def parked_longest(self) -> I64:
        """The slots of parked streams with nothing pending, the stream parked longest first: int64 [N]."""
        return self._longest(self.parked_since(np.iinfo(np.int64).max))

    def idle_longest(self, before_ns: int) -> I64:
        """The slots of `idle_since`, the stream that has been idle longest first: int64 [N]."""
        return self._longest(self.idle_since(before_ns))

    def _longest(self, slots: I64) -> I64:
        return slots[np.argsort(self.last_active_ns[slots], kind="stable")]

    def _silent(self, before_ns: int, among: Bool) -> I64:
        return np.flatnonzero(among & ~self.closing & (self.unanswered == 0) & (self.last_active_ns < before_ns))
