"""Gathering: what goes on in the next file, a part at a time, while no stream steps."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress

import numpy as np

from instep.core.rings import Rings
from instep.core.streams import NO_OWNER, StreamTable
from instep.core.typing import I64, Bool
from instep.recording.states import StateRows
from instep.server.snapshots import Extents, extents


@dataclass(frozen=True, slots=True)
class _Part:
    slots: I64
    streams: I64
    names: list[str]
    rows: StateRows


@dataclass(frozen=True, slots=True)
class Gathered:
    """All open streams at one moment, with their states."""

    slots: I64
    """int64 [N], in the order of the streams' numbers, which rise."""
    names: list[str]
    parts: list[StateRows]
    """Theirs, in that order: N states in all parts together."""


class Gathering:
    """Collects the states of all open streams, and the frames that belong to them.

    Streams may end and begin meanwhile, be given other states and other owners. What the client has may grow, so more
    frames are gathered than it still needs, which does no harm. No stream may step.

    Args:
        table: the streams.
        rings: their frames.
    """

    def __init__(self, table: StreamTable, rings: Rings) -> None:
        self._table = table
        self._rings = rings
        self._read: I64 = np.zeros(len(table.owner), np.int64)
        """By slot, the number of the stream whose state is here as it is; 0 for none."""
        self._part = np.full(len(table.owner), -1, np.int32)
        self._place = np.zeros(len(table.owner), np.int32)
        """By slot, where the state of its stream lies, also while another one has to be read."""
        self._left: I64 = np.zeros(0, np.int64)
        self._left_streams: I64 = np.zeros(0, np.int64)
        self._parts: list[_Part] = []

    def forget(self, slots: I64) -> None:
        """The streams were given other states: int64 [N]."""
        self._read[slots] = 0

    def next_slots(self, most: int) -> I64:
        """Slots of streams whose states are to be read next: int64 [≤ most], none when all are here."""
        table = self._table
        # A stream that has begun in such a slot meanwhile has a higher number than all of these: it comes later.
        is_same = self._are_open(self._left, self._left_streams)
        self._left, self._left_streams = self._left[is_same], self._left_streams[is_same]
        if not len(self._left):
            open_now = np.flatnonzero(table.owner != NO_OWNER)
            missing = open_now[self._read[open_now] != table.recording_id[open_now]]
            self._left = missing[np.argsort(table.recording_id[missing], kind="stable")]
            self._left_streams = table.numbers(self._left)
        slots = self._left[:most]
        self._left, self._left_streams = self._left[most:], self._left_streams[most:]
        return slots

    def extents(self, slots: I64) -> Extents:
        """What belongs to the states of these streams; none of them steps."""
        return extents(self._table, self._rings, slots)

    def add(self, slots: I64, rows: StateRows) -> None:
        """States were read: int64 [N], of the streams that `rows` tells, which may be gone from there."""
        rows_of, here = rows.streams, self._are_open(slots, rows.streams)
        again = here & (self._part[slots] >= 0)
        for at in np.flatnonzero(again).tolist():
            again[at] = self._holds(int(slots[at]), int(rows_of[at]))
        for at in np.flatnonzero(again).tolist():
            slot = slots[at]
            self._parts[self._part[slot]].rows.states[self._place[slot]] = rows.states[at]
        fresh = here & ~again
        if fresh.any():
            chosen = slots[fresh]
            names = [self._table.name(slot) for slot in chosen.tolist()]
            self._part[chosen], self._place[chosen] = len(self._parts), np.arange(len(chosen))
            self._parts.append(_Part(chosen, rows_of[fresh], names, rows.only(fresh)))
        self._read[slots[here]] = rows_of[here]

    def all(self) -> Gathered:
        """The streams that are open now, all of which are here."""
        slots: list[I64] = [np.zeros(0, np.int64)]
        names: list[str] = []
        parts: list[StateRows] = []
        for part in self._parts:
            is_open = self._are_open(part.slots, part.streams)
            slots.append(part.slots[is_open])
            names.extend(compress(part.names, is_open.tolist()))
            parts.append(part.rows.only(is_open))
        return Gathered(np.concatenate(slots), names, parts)

    def _are_open(self, slots: I64, streams: I64) -> Bool:
        table = self._table
        there: Bool = (table.recording_id[slots] == streams) & (table.owner[slots] != NO_OWNER)
        return there

    def _holds(self, slot: int, stream: int) -> bool:
        return bool(self._parts[self._part[slot]].streams[self._place[slot]] == stream)
