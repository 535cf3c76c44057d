"""Every open stream, one row a slot. State of streams lives here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from instep.core.keeping import Keeping
from instep.core.slots import SCRATCH_SLOT, SlotAllocator
from instep.core.typing import I32, I64, U32, U64, Bool
from instep_client.protocol.codes import Code

NO_OWNER = -1
_ONE = np.int64(1)


class StreamTable:
    """Columns over slots: owner, epoch, expected seq, frames pending, activity.

    An epoch is one ownership of one stream; epochs are unique in a server and only rise. A stream whose connection is
    gone is parked: it belongs to `parked`, an owner that no connection is, until somebody resumes it.

    Args:
        max_streams: how many may be open at once.
        max_owners: owners are numbered from 0 to this, exclusive; this number itself is `parked`.
        first_generation: see `SlotAllocator`.
        last_epoch: epochs begin above it.
    """

    def __init__(self, max_streams: int, max_owners: int, first_generation: int = 1, last_epoch: int = 0) -> None:
        self.keeping = Keeping(max_streams)
        self.slots = SlotAllocator(max_streams, first_generation)
        rows = max_streams + 1
        self.parked = max_owners
        self.last_epoch = last_epoch
        self.owner: I32 = np.full(rows, NO_OWNER, np.int32)
        self.owned: I64 = np.zeros(max_owners + 1, np.int64)
        """How many streams each owner has, those that are closing included."""
        self.epoch: U64 = np.zeros(rows, np.uint64)
        self.former_epoch: U64 = np.zeros(rows, np.uint64)
        """The epoch that its holder gave for the present one; 0 where it was taken from somebody."""
        self.granted_seq: I64 = np.zeros(rows, np.int64)
        """What the stream expected next when the present epoch was given."""
        self.granted_to: I64 = np.zeros(rows, np.int64)
        """The arrival of the connection to which it was given; 0 for none that is known."""
        self._first_generation: U32 = np.zeros(rows, np.uint32)
        """The generation under which the slot's stream was opened; those from there to the present one are fenced."""
        self.first_seq: I64 = np.zeros(rows, np.int64)
        """The seq with which the stream began."""
        self.next_seq: I64 = np.zeros(rows, np.int64)
        """The seq the stream expects next, counting admitted frames."""
        self.step_seq: I64 = np.zeros(rows, np.int64)
        """The seq that the stream's next step applies."""
        self.acked: I64 = np.zeros(rows, np.int64)
        """The seq before which the client has every output."""
        self.pending: I32 = np.zeros(rows, np.int32)
        """Frames admitted and not yet answered."""
        self.closing: Bool = np.zeros(rows, np.bool_)
        self.lost: Bool = np.zeros(rows, np.bool_)
        """Streams whose state can no longer be trusted; they are closing."""
        self.renumbered: Bool = np.zeros(rows, np.bool_)
        """Streams that a restart with other numerics took from their owners."""
        self.last_active_ns: I64 = np.zeros(rows, np.int64)
        self.marks: I32 = np.zeros(rows, np.int32)
        """Scratch space with an entry a slot, for whoever looks for repeated slots."""
        self.recording_id: U32 = np.zeros(rows, np.uint32)
        """The stream's number in the recording; see `numbers`."""
        self._names: list[str | None] = [None] * rows
        self._slots_by_name: dict[str, int] = {}

    @property
    def open_count(self) -> int:
        """How many streams are open, those that are closing included."""
        return len(self._slots_by_name)

    def name(self, slot: int) -> str:
        """The name of an open stream."""
        name = self._names[slot]
        assert name is not None, f"slot {slot} is free"
        return name

    def find(self, name: str) -> int | None:
        """The slot of the open stream of that name."""
        return self._slots_by_name.get(name)

    def find_all(self, names: Sequence[str]) -> I64:
        """The slots of the open streams of those names, the scratch slot where there is none: int64 [N]."""
        return np.array([self._slots_by_name.get(name, SCRATCH_SLOT) for name in names], np.int64)

    def open(self, names: Sequence[str], owner: int, now_ns: int, first_seqs: I64 | None = None) -> tuple[I64, I32]:
        """Open streams for one owner, whose first frames are of `first_seqs`, int64 [N], or 0.

        Returns:
            slots: int64 [N], the scratch slot where refused.
            codes: int32 [N], 0 or `NAME_IN_USE` or `TOO_MANY_STREAMS`.
        """
        slots = np.full(len(names), SCRATCH_SLOT, np.int64)
        codes = np.zeros(len(names), np.int32)
        fresh: dict[str, int] = {}
        for index, name in enumerate(names):
            if name in fresh or name in self._slots_by_name:
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
            self._slots_by_name[name] = slot
        first = 0 if first_seqs is None else first_seqs[codes == 0]
        self.owner[granted] = owner
        self.owned[owner] += len(granted)
        self.first_seq[granted] = first
        self.next_seq[granted] = first
        self.step_seq[granted] = first
        self.acked[granted] = first
        self.pending[granted] = 0
        self.closing[granted] = False
        self.lost[granted] = False
        self.renumbered[granted] = False
        self.last_active_ns[granted] = now_ns
        self._first_generation[granted] = self.slots.generations(granted)
        self._new_epochs(granted, None)
        self.granted_to[granted] = 0
        return slots, codes

    def numbers(self, slots: I64) -> I64:
        """The streams' numbers in the recording: int64 [N]."""
        return self.recording_id[slots].astype(np.int64)

    def openings(self, slots: I64) -> U32:
        """Which opening of its slot each open stream is, uint32 [N]: another number for the slot's next stream."""
        numbers: U32 = self._first_generation[slots]
        return numbers

    def hand_over(
        self, slots: I64, owner: int, now_ns: int, former_epochs: U64 | None = None, arrival: int = 0
    ) -> None:
        """Give streams to another owner: new epochs, and their handles so far are fenced.

        Args:
            slots: int64 [N], distinct.
            owner: who gets them.
            now_ns: any monotonic clock.
            former_epochs: uint64 [N], the epoch that the new owner holds of each, 0 where it holds none; None for 0.
            arrival: connections arrive in the order of these numbers, from 1; that of the new owner's.
        """
        self.slots.renew(slots)
        self._move(slots, owner)
        self._new_epochs(slots, former_epochs)
        self.granted_to[slots] = arrival
        self.renumbered[slots] = False
        self.last_active_ns[slots] = now_ns

    def park(self, slots: I64, now_ns: int) -> None:
        """The connection of these streams is gone; they wait to be resumed."""
        self._move(slots, self.parked)
        self.last_active_ns[slots] = now_ns

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
        """Forget streams whose frames are all answered; their slots may be given out again."""
        assert not self.pending[slots].any(), "a stream with pending frames may not be released"
        for slot in slots.tolist():
            del self._slots_by_name[self.name(slot)]
            self._names[slot] = None
        np.subtract.at(self.owned, self.owner[slots], _ONE)
        self.owner[slots] = NO_OWNER
        self.closing[slots] = False
        self.slots.release(slots)

    def resolve(self, handles: U64, owner: int | I32) -> tuple[I64, I32]:
        """Slots of the handles that `owner` may use, one for all or int32 [N].

        Returns:
            slots: int64 [N].
            codes: int32 [N], 0 or `UNKNOWN_STREAM`, `FENCED` or `FOREIGN_STREAM`.
        """
        slots, current = self.slots.resolve(handles)
        codes = np.zeros(len(slots), np.int32)
        usable = current & (self.owner[slots] == owner) & ~self.closing[slots]
        if np.count_nonzero(usable) < len(usable):
            slots = self.slots.named(handles)
            open_now = (self.owner[slots] != NO_OWNER) & ~self.closing[slots]
            codes[~(current & open_now)] = Code.UNKNOWN_STREAM
            codes[current & open_now & (self.owner[slots] != owner)] = Code.FOREIGN_STREAM
            codes[open_now & self._is_former(handles, slots)] = Code.FENCED
        return slots, codes

    def _is_former(self, handles: U64, slots: I64) -> Bool:
        """Whether handles are of a former ownership of the very stream that their slot holds now."""
        first, now = self._first_generation[slots], self.slots.generations(slots)
        age = (handles >> np.uint64(32)).astype(np.uint32) - first  # modulo 2^32, as generations count
        former: Bool = (age < now - first) & (slots != SCRATCH_SLOT)
        return former

    def admitted(self, slots: I64, lengths: I64, now_ns: int) -> None:
        """Frames were admitted: `lengths` int64 [N] of `slots`, which are distinct."""
        self.pending[slots] += lengths
        self.last_active_ns[slots] = now_ns

    def answered(self, slots: I64, lengths: I64, *, are_distinct: bool = False) -> None:
        """Frames are answered: `lengths` int64 [N] of `slots`, which may stand there several times if not distinct."""
        if are_distinct:
            self.pending[slots] -= lengths
        else:
            np.subtract.at(self.pending, slots, lengths.astype(np.int32))  # of another type: 20 times longer

    def owned_by(self, *owners: int) -> I64:
        """Slots of the owners' streams that are not closing already: int64 [N], rising."""
        is_theirs = np.zeros(self.parked + 2, np.bool_)  # the last one is `NO_OWNER`
        is_theirs[list(owners)] = True
        return np.flatnonzero(is_theirs[self.owner] & ~self.closing)

    def idle_since(self, before_ns: int) -> I64:
        """Slots of connected streams with nothing pending that were last active before that time: int64 [N]."""
        return self._silent(before_ns, (self.owner != NO_OWNER) & (self.owner != self.parked))

    def parked_since(self, before_ns: int) -> I64:
        """Slots of streams that were parked before that time: int64 [N]."""
        return self._silent(before_ns, self.owner == self.parked)

    def unused_since(self, before_ns: int) -> I64:
        """Slots of connected streams that were opened before that time and have never sent a frame: int64 [N]."""
        unused = (self.owner != NO_OWNER) & (self.owner != self.parked) & (self.next_seq == self.first_seq)
        return self._silent(before_ns, unused)

    def _silent(self, before_ns: int, among: Bool) -> I64:
        return np.flatnonzero(among & ~self.closing & (self.pending == 0) & (self.last_active_ns < before_ns))
