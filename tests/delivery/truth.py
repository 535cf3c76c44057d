"""What outputs must be, and what the server may say: kept from what clients sent and were told, never from its state.

A `Line` is a stream's frames in order as one ownership sees them. A grant with the next seq k begins a new line: the
former one up to k, and what its owner sends from there on. So every output that any client may ever see is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import numpy as np

from instep.core.tables import NO_OWNER, rows_of
from instep.streaming.api import Origin
from instep_client.protocol import wire
from instep_client.protocol.wire import Kind, Message
from tests.delivery.disk import Disk
from tests.delivery.lives import Asked, Life, Line, require
from tests.delivery.network import Connection, Network
from tests.delivery.node import Node
from tests.support.states import floats_of
from tests.support.step_messages import parts

_SLOT = 0xFFFF_FFFF


class Truth:
    """Judges every message that leaves the server, and the server after every step.

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
        self.seen: set[str] = set()
        """What has happened so far, in words, for whoever counts what examples reach."""

    # ── What leaves the server ─────────────────────────────────────────────────────────────────────────────────────

    def leaves(self, connection: Connection, message: Message) -> None:
        """A message was handed to the network."""
        self.note_openings()
        (kind, request, *_), arrays = parts([bytes(frame) for frame in message])
        asked = self.asked.get((connection.owner, request))
        if kind == Kind.STEPPED and asked is not None:
            self._outputs_leave(asked, *arrays)
        elif kind in (Kind.OPENED, Kind.RESUMED) and asked is not None:
            self._grants_leave(connection.owner, asked, message)
        elif kind == Kind.STATE_READ and asked is not None:
            self._state_leaves(asked, *arrays)
        elif kind == Kind.CHANGED and asked is not None:
            self._change_leaves(asked, *arrays)

    def _outputs_leave(self, asked: Asked, outputs: bytes, failures: bytes) -> None:
        good = [asked.timesteps] * len(asked.names)
        for failure in np.frombuffer(failures, wire.FAILURE):
            good[int(failure["column"])] = int(failure["timestep"])
        y = np.frombuffer(outputs, "<f4").reshape(asked.timesteps, len(asked.names))
        for column, length in enumerate(good):
            life, line, first = asked.lives[column], asked.lines[column], asked.first_seqs[column]
            require(not (length and asked.is_conflict), f"frame {first} was answered for other inputs")
            require(np.isnan(y[length:, column]).all(), "a frame that was refused has an output")
            for timestep in range(length):
                seq = first + timestep
                expected = line.outputs[seq]
                require(y[timestep, column] == expected, f"the output of frame {seq} is not that of frames 0 to {seq}")
                require(life.given.setdefault(seq, expected) == expected, f"frame {seq} has two outputs")
                if self.disk.durability != "memory":
                    x = np.float32(line.xs[seq]).tobytes()
                    require(
                        self.disk.frames.get((life.number, seq)) == x,
                        f"the output of frame {seq} left before its inputs were durable",
                    )

    def _state_leaves(self, asked: Asked, next_seqs: bytes, states: bytes, failures: bytes) -> None:
        refused = np.frombuffer(failures, wire.FAILURE)["column"]
        told = zip(asked.lives, np.frombuffer(next_seqs, "<i8"), np.frombuffer(states, "<f4"), strict=True)
        for life, next_seq, state in (each for column, each in enumerate(told) if column not in refused):
            self.seen.add("a state was read")
            is_right = _is_in(self._shown.get(life.number, []), int(next_seq), int(state))
            require(is_right, f"the state before frame {next_seq} is another")
            if self.disk.durability != "memory":
                durable = all((life.number, seq) in self.disk.frames for seq in range(life.line.first, next_seq))
                require(durable, "a state was told before its frames were durable")

    def _change_leaves(self, asked: Asked, failures: bytes) -> None:
        if failures:
            return
        (life,), (state,) = asked.lives, asked.states
        self.seen.add("reset")
        require(state in life.changed, "a client was told of a RESET that was not done")
        if self.disk.durability != "memory":
            is_durable = any(row[0] == life.number and row[2] == state for row in self.disk.resets)
            require(is_durable, "a client was told of a RESET before it was durable")

    def _grants_leave(self, client: int, asked: Asked, message: Message) -> None:
        assert self.node is not None
        for column, grant in enumerate(np.frombuffer(message[1], wire.GRANT)):
            handle, epoch, next_seq = (int(value) for value in grant)
            if handle == 0:
                continue
            life = self._granted_life(handle, asked.names[column])
            require(life.name == asked.names[column], "another stream than the one asked for was given")
            if asked.kind is Kind.RESUME and not asked.takes_over:
                require(asked.have[column] <= next_seq, "a client has outputs the server does not know of")
            self._grant_leaves(life, client, epoch, next_seq)
            if asked.kind is Kind.RESUME:
                life.acked = max(life.acked, min(asked.have[column], next_seq))

    def _granted_life(self, handle: int, name: str) -> Life:
        """Which life a handle is of: that in its slot, or one that has ended while the answer waited to be durable."""
        assert self.node is not None
        slot, generation = handle & _SLOT, handle >> 32
        present = self.lives[int(self.node.table.recording_id[slot])]
        if generation >= int(self.node.table.incarnations(np.array([slot]))[0]):
            return present
        return max((life for life in self.lives.values() if life.name == name and life is not present), key=_number)

    def _grant_leaves(self, life: Life, client: int, epoch: int, next_seq: int) -> None:
        if self.disk.durability != "memory":
            require(epoch in self.disk.epochs, "an epoch was given before it was durable")
        require(
            self.owner_of_epoch.setdefault(epoch, (client, life.number)) == (client, life.number),
            "an epoch was given to two owners",
        )
        require(next_seq <= len(life.line), "the server expects a frame after one that nobody sent")
        require(all(seq < next_seq for seq in life.given), "the stream was set back behind outputs that were given")
        if epoch in life.lines:
            return
        line = life.lines[epoch] = life.line.cut(next_seq)
        if epoch > life.epoch:  # the answer to an opening may come after a takeover
            life.line, life.epoch, life.holder = line, epoch, client
        if next_seq:
            self.seen.add("resumed after frames")

    # ── What the server takes ──────────────────────────────────────────────────────────────────────────────────────

    def before_steps(self, taken: list[Asked]) -> list[tuple[Life, tuple[int, int, int] | None]]:
        """Where the streams stand whose senders are all fenced, before these STEPs are admitted together."""
        senders = [
            (life, life.epoch != epoch)
            for asked in taken
            for life, epoch in zip(asked.lives, asked.epochs, strict=True)
        ]
        owned = [life for life, is_fenced in senders if not is_fenced]
        return [(life, self._stand(life)) for life, _ in senders if all(life is not other for other in owned)]

    def after_steps(self, taken: list[Asked], before: list[tuple[Life, tuple[int, int, int] | None]]) -> None:
        """They are admitted: fenced senders have changed nothing."""
        for life, stood in before:
            self.seen.add("a fenced owner sends")
            require(self._stand(life) == stood, "a fenced owner changed the stream")
        for asked in taken:
            for life, epoch, acked in zip(asked.lives, asked.epochs, asked.acked, strict=True):
                stands = self._stand(life)
                if life.epoch == epoch and stands is not None:
                    life.acked = max(life.acked, min(acked, stands[2]))

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
        is_right = _is_in(originals, first, state)
        require(is_right, "a copy begins in a state that its original did not have")
        self.seen.add("forked")
        return Line(first, state)

    def note_ends(self) -> None:
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
        """The slots of all open streams, by number. As lists: this is asked after every callback."""
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
        table, slot = self.node.table, handle & _SLOT
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
        newest = max((each for each in self.lives.values() if each.name == life.name), key=_number)
        return life is newest and life.name in self.node.hibernation

    def _slot(self, life: Life) -> int | None:
        assert self.node is not None
        slot = self.node.slot_of(life.name)
        if slot is None or int(self.node.table.recording_id[slot]) != life.number:
            return None
        return slot

    # ── The server itself ──────────────────────────────────────────────────────────────────────────────────────────

    def check_names(self) -> None:
        """Each open stream is found by its name."""
        node = self.node
        if node is None:
            return
        present = self._present(node)
        for life in self.lives.values():
            if life.number in present:
                found = int(node.table.find([life.name])[0])
                require(found == present[life.number], f"the stream {life.name} is open, and its name leads to {found}")

    def check_frame_buffer(self) -> None:
        """The window is kept, and all that may be asked for again is in the frame buffer."""
        node = self.node
        if node is None:
            return
        table, tables = node.table, node.tables
        for slot in node.open_slots():
            next_seq, step_seq = int(table.next_seq[slot]), int(table.step_seq[slot])
            life = self.lives.get(int(table.recording_id[slot]))
            if next_seq == 0 or life is None:
                continue
            acked = max(life.acked, min(life.claimed, int(table.acked[slot])))
            require(next_seq <= acked + self.window, "more frames than the window were taken")
            require(next_seq <= len(life.line), "a frame was taken that nobody sent")
            first = min(acked, step_seq)
            rows = rows_of(tables, np.full(next_seq - first, slot), np.arange(first, next_seq))
            for seq, row in enumerate(rows.tolist(), first):
                require(tables.x[row, 0] == life.line.xs[seq], f"the frame buffer has lost the inputs of frame {seq}")
                if seq < step_seq:
                    require(
                        tables.y[row, 0] == life.line.outputs[seq],
                        f"the frame buffer has lost the output of frame {seq}",
                    )

    def crashed(self, *, may_lose: bool) -> None:
        """The server is gone. What a lossy crash took back is not held against it afterwards."""
        self.node = None
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

    def started(self, node: Node, expected: dict[int, int]) -> None:
        """A server has started on what was durable: every stream stands where its durable frames end, to the bit."""
        self.node = node
        slots = node.open_slots()
        states = node.states(np.array(slots, np.int64))
        found = {
            int(node.table.recording_id[slot]): (int(node.table.next_seq[slot]), state)
            for slot, state in zip(slots, states, strict=True)
        }
        for stream in node.asleep():
            state = 0 if stream.state is None else floats_of(stream.state[None], 1)[0, 0]
            found[stream.stream] = (stream.seq, state)
        require(expected.keys() == found.keys(), "streams are missing")
        for number, (seq, state) in found.items():
            life = self.lives[number]
            require(seq == expected[number], "a stream does not stand where its durable frames end")
            require(seq <= len(life.line), "a stream holds frames that nobody sent")
            require(state == life.line.states[seq], "a stream came back with another state")


def _is_in(lines: list[Line], seq: int, state: int) -> bool:
    return any(seq < len(line.states) and line.states[seq] == state for line in lines)


def is_fenced_rightly(truth: Truth, life: Life | None) -> bool:
    """Whether FENCED may be said to somebody who had this stream."""
    return life is None or life.is_contended or life.has_ended or truth.is_lossy


def _number(life: Life) -> int:
    return life.number
