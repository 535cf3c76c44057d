"""What outputs must be, and what the server may say: kept from what clients sent and were told, never from its state.

A `Line` is a stream's frames in order as one ownership sees them. A grant with the next seq k begins a new line: the
former one up to k, and what its owner sends from there on. So every output that any client may ever see is known.
"""

from __future__ import annotations

import numpy as np

from instep.core.tables import rows_of
from instep_client.protocol import wire
from instep_client.protocol.wire import Kind, Message
from tests.delivery.known import SLOT, Known, is_in, number_of
from tests.delivery.lives import Asked, Life, require
from tests.delivery.network import Connection
from tests.delivery.node import Node
from tests.support.states import floats_of
from tests.support.step_messages import parts


class Truth(Known):
    """Judges every message that leaves the server, and the server after every step."""

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
            is_right = is_in(self._shown.get(life.number, []), int(next_seq), int(state))
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
        slot, generation = handle & SLOT, handle >> 32
        present = self.lives[int(self.node.table.recording_id[slot])]
        if generation >= int(self.node.table.incarnations(np.array([slot]))[0]):
            return present
        return max((life for life in self.lives.values() if life.name == name and life is not present), key=number_of)

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
            rows = rows_of(tables, np.array(slot), np.arange(first, next_seq))
            x, y = tables.x[rows, 0].tolist(), tables.y[rows[: step_seq - first], 0].tolist()
            lost = f"the frame buffer has lost some of frames {first} to {next_seq - 1}"
            require(x == life.line.xs[first:next_seq], f"{lost}: their inputs")
            require(y == life.line.outputs[first:step_seq], f"{lost}: their outputs")

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


def is_fenced_rightly(truth: Truth, life: Life | None) -> bool:
    """Whether FENCED may be said to somebody who had this stream."""
    return life is None or life.is_contended or life.has_ended or truth.is_lossy
