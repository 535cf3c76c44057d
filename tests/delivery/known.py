"""Streams from their opening to their end: what clients have sent on them, and how far the server has got with each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import numpy as np

from instep.core.tables import NO_OWNER
from instep.streaming.api import Origin
from tests.delivery.disk import Disk
from tests.delivery.lives import Asked, Life, Line, require
from tests.delivery.network import Connection, Network
from tests.delivery.node import Node

SLOT = 0xFFFF_FFFF
"""The bits of a handle that say which slot it is of."""


class Known:
    """Follows every stream, also through crashes, and finds it in the server.

    Args:
        disk: what is durable.
        network: which client has which connection.
        window: frames that a stream may have unacknowledged.
    """

    def __init__(self, disk: Disk, network: Network, window: int) -> None:
        self.disk = disk
        self.network = network
        self.window = window
        self.node: Node | None = None
        self.asked: dict[tuple[int, int], Asked] = {}
        self.lives: dict[int, Life] = {}
        self._shown: dict[int, list[Line]] = {}
        """By lives, what the answer to a READ_STATE may tell: the stream as it was when the request was taken."""
        self._copied: dict[str, list[Line]] = {}
        """By the names of copies, what each may begin with: likewise."""
        self.owner_of_epoch: dict[int, tuple[int, int]] = {}
        self.is_lossy = False
        """Whether a crash so far may have taken back what clients were told."""
        self.values = count(1)
        self._noted: tuple[object, ...] = ()
        """Which streams the server had, and in which state, when they were last looked at."""
        self.seen: set[str] = set()
        """What has happened so far, in words, for whoever counts what examples reach."""

    def note_changes(self) -> None:
        """Streams that the server has opened or ended since this was last called, which is after every callback."""
        if self.node is None:
            return
        table = self.node.table
        columns = [column.tobytes() for column in (table.recording_id, table.owner, table.closing, table.lost)]
        found = (*columns, *self.node.hibernation)
        if found != self._noted:
            self._noted = found
            self.note_openings()
            self._note_ends()

    def note_openings(self) -> None:
        """Streams that the server has opened."""
        node = self.node
        if node is None:
            return
        for number, slot in self._present(node).items():
            if number not in self.lives:
                origin = node.origins[int(node.table.owner[slot])]
                assert origin is not None
                name, line = node.table.name(slot), self._first_line(slot)
                self.lives[number] = Life(number, name, line, node.client_of(origin), acked=line.first)

    def _first_line(self, slot: int) -> Line:
        """What a stream begins with that was opened just now."""
        assert self.node is not None
        originals = self._copied.get(self.node.table.name(slot))
        if originals is None:
            return Line()
        first, state = int(self.node.table.first_seq[slot]), int(self.node.states(np.array([slot]))[0])
        is_right = is_in(originals, first, state)
        require(is_right, "a copy begins in a state that its original did not have")
        self.seen.add("forked")
        return Line(first, state)

    def _note_ends(self) -> None:
        """Streams that the server has ended, or is about to."""
        node = self.node
        if node is None:
            return
        lives = [life for life in self.lives.values() if not life.has_ended]
        if not lives:
            return
        present, ending = self._present(node), (node.table.closing | node.table.lost).tolist()
        for life in lives:
            slot = present.get(life.number)
            if slot is None and self._is_asleep(life):
                self.seen.add("hibernated")
                life.has_slept = True
            elif slot is None or ending[slot]:
                life.has_ended = True

    def _present(self, node: Node) -> dict[int, int]:
        """The slots of all open streams, by number."""
        table = node.table
        streams = zip(table.recording_id.tolist(), table.owner.tolist(), strict=True)
        return {number: slot for slot, (number, owner) in enumerate(streams) if owner != NO_OWNER}

    def resume_arrives(self, connection: Connection, asked: Asked, *, is_copy: bool) -> None:
        """The server is about to take a RESUME."""
        for life in self._open_lives(asked.names):
            life.is_contended |= is_copy or connection.is_left or connection.owner != life.holder

    def before_resume(self, names: Sequence[str], have: Sequence[int]) -> None:
        """The server is about to decide on a RESUME."""
        assert self.node is not None
        for name, outputs in zip(names, have, strict=True):
            for life in self._open_lives([name]):
                life.claimed = max(life.claimed, min(outputs, int(self.node.table.next_seq[self._slot(life)])))

    def before_reset(self, origin: Origin, handles: Sequence[int], states: Sequence[int]) -> None:
        """The server is about to decide on a RESET, which counts from the frame on that it expects next."""
        for handle, state in zip(handles, states, strict=True):
            life = self._owned(origin, handle)
            if life is not None and not self._pending(life):
                seq, epoch, _ = self._stand(life) or (0, 0, 0)
                life.lines[epoch].reset(seq, state)
                life.changed.add(state)
                if life.number in self._shown:  # a READ_STATE may still wait for another of its streams
                    self._shown[life.number].append(life.lines[epoch].cut(len(life.lines[epoch])))

    def before_read(self, origin: Origin, handles: Sequence[int], copies: Sequence[str]) -> None:
        """The server is about to decide on a READ_STATE, or on a FORK with names of copies: it shows what is."""
        for index, handle in enumerate(handles):
            life = self._owned(origin, handle)
            if life is not None:
                _, epoch, _ = self._stand(life) or (0, 0, 0)
                line = life.lines[epoch].cut(len(life.lines[epoch]))
                if copies:
                    self._copied.setdefault(copies[index], []).append(line)
                else:
                    self._shown.setdefault(life.number, []).append(line)

    def _owned(self, origin: Origin, handle: int) -> Life | None:
        """The stream that the owner of this handle may change."""
        assert self.node is not None
        table, slot = self.node.table, handle & SLOT
        is_right = table.owner[slot] == origin.number and not table.closing[slot]
        return (
            self.lives[int(table.recording_id[slot])]
            if is_right and handle == table.slots.handles(np.array([slot]))[0]
            else None
        )

    def _pending(self, life: Life) -> bool:
        assert self.node is not None
        return bool(self.node.table.unanswered[self._slot(life)])

    def _open_lives(self, names: Sequence[str]) -> list[Life]:
        assert self.node is not None
        slots = [slot for slot in map(self.node.slot_of, names) if slot is not None]
        awake = [self.lives[int(self.node.table.recording_id[slot])] for slot in slots]
        return awake + [life for life in self.lives.values() if life.name in names and self._is_asleep(life)]

    def _stand(self, life: Life) -> tuple[int, int, int] | None:
        slot = self._slot(life)
        if slot is None:
            return None
        table = self.node.table if self.node else None
        assert table is not None
        return int(table.next_seq[slot]), int(table.epoch[slot]), int(table.acked[slot])

    def _is_asleep(self, life: Life) -> bool:
        """Whether it hibernates, or is about to wake or to end."""
        assert self.node is not None
        newest = max((each for each in self.lives.values() if each.name == life.name), key=number_of)
        return life is newest and life.name in self.node.hibernation

    def _slot(self, life: Life) -> int | None:
        assert self.node is not None
        slot = self.node.slot_of(life.name)
        if slot is None or int(self.node.table.recording_id[slot]) != life.number:
            return None
        return slot

    def crashed(self, *, may_lose: bool) -> None:
        """The server is gone. What a lossy crash took back is not held against it afterwards."""
        self.node = None
        self._noted = ()
        self._copied.clear()
        self._shown.clear()
        self.is_lossy |= may_lose
        left = self.disk.next_seqs()
        opened = {row[2] for row in self.disk.image["openings"].values()}
        for number, life in list(self.lives.items()):
            if number not in opened:
                del self.lives[number]  # its number is given again
            elif number in left:
                life.has_ended = False
                if may_lose and any(seq >= left[number] for seq in life.given):
                    self.seen.add("given outputs were lost")
                    life.given = {seq: y for seq, y in life.given.items() if seq < left[number]}
                if may_lose:
                    life.acked, life.claimed = min(life.acked, left[number]), min(life.claimed, left[number])
                self._take_from_disk(life, left[number], may_lose=may_lose)

    def _take_from_disk(self, life: Life, length: int, *, may_lose: bool) -> None:
        """That a step failed may be forgotten, too: its frame counts again then, whatever came instead of it."""
        line = life.line
        xs, resets = line.xs, {seq: state for stream, seq, state in self.disk.resets if stream == life.number}
        if may_lose:
            frames = [self.disk.frames[life.number, seq] for seq in range(line.first, length)]
            on_disk = [*xs[: line.first], *(int(np.frombuffer(frame, "<f4")[0]) for frame in frames)]
            xs = xs if xs[:length] == on_disk else on_disk
        if resets != line.resets:
            self.seen.add("a RESET was undone")
        if (xs, resets) != (line.xs, line.resets):
            life.line = line.cut(line.first)
            life.line.fill(xs[line.first :], resets)


def is_in(lines: list[Line], seq: int, state: int) -> bool:
    """Whether the state before a frame is that of any of these lines."""
    return any(seq < len(line.states) and line.states[seq] == state for line in lines)


def number_of(life: Life) -> int:
    """For sorting: the newest life of a name has the highest number."""
    return life.number
