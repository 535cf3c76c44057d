"""What a client may ask, one method a verb: check every field, then tell the engine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from instep.core.admission import RepeatedStream, resolve_distinct
from instep.core.typing import F32, I32, I64, U64, Bool
from instep.server import replies
from instep.server.burst import Burst, Step, apart
from instep.server.clients import Client, ClientTable
from instep.server.engine import Engine
from instep.server.lifecycle import Lifecycle
from instep.server.limits import EffectiveLimits
from instep.server.postbox import Postbox
from instep.server.refusal import Refusal
from instep.server.statistics import Statistics
from instep.server.step_messages import StepMessages
from instep.server.tap import Tap
from instep_client.protocol import wire
from instep_client.protocol.errors import MalformedMessage
from instep_client.protocol.wire import Code, Header, Kind, ServerInfo

_BUSY_RETRY_US = 2000


class Verbs:
    """Reads messages, refuses what is wrong with them, hands the rest to the engine.

    Args:
        engine: frames.
        lifecycle: streams.
        tap: whether what is admitted can still be recorded.
        clients: connections.
        postbox: where answers go.
        info: what WELCOME says.
        limits: what is taken.
        statistics: what is counted.
    """

    def __init__(
        self,
        engine: Engine,
        lifecycle: Lifecycle,
        tap: Tap,
        clients: ClientTable,
        postbox: Postbox,
        info: ServerInfo,
        limits: EffectiveLimits,
        statistics: Statistics,
    ) -> None:
        self._engine = engine
        self._lifecycle = lifecycle
        self._tap = tap
        self._clients = clients
        self._postbox = postbox
        self._info = info
        self._limits = limits
        self._statistics = statistics
        self._steps = StepMessages(info.features, limits.max_block_frames)
        self._burst = Burst(engine.rings, engine.blocks, limits.credit_frames)
        self.draining = False
        """While True, nothing new is admitted."""
        self._verbs: dict[Kind, Callable[[Client, Header, list[bytes]], None]] = {
            Kind.OPEN: self._open,
            Kind.CLOSE: self._close,
            Kind.PING: self._ping,
            Kind.PONG: self._pong,
            Kind.STATS: self._stats,
            Kind.RESUME: self._resume,
            Kind.READ_STATE: self._read_state,
            Kind.RESET: self._reset,
            Kind.FORK: self._fork,
        }

    def take(self, routing_id: bytes, frames: list[bytes]) -> bool:
        """One message of one connection; whatever it holds, the answer is a message and never an exception.

        Returns:
            Whether it was only gathered, as a STEP is that is good by itself, until `admit_taken` or something else.
        """
        request = 0
        client = self._clients.by_routing_id(routing_id)
        if client is not None:
            client.last_heard_ns = time.monotonic_ns()
        try:
            if client is not None and (step := self._steps.alike(client, frames)) is not None:
                request = step.request
                return self._gather(step)
            if frames == [b""] and client is None:  # ZMQ_PROBE_ROUTER
                self._answer_refused(routing_id, request, Refusal(Code.HELLO_FIRST))
                return False  # it is no message that was refused: every client's connection begins with one
            kind, request, _ = header = wire.unpack_header(frames)
            if kind is Kind.STEP and client is not None:
                return self._gather(self._steps.read(client, header, frames))
            self.admit_taken()
            if kind is Kind.HELLO:
                self._hello(routing_id, client, header)
            elif client is None:
                raise Refusal(Code.HELLO_FIRST)
            else:
                verb = self._verbs.get(kind)
                if verb is None:
                    raise MalformedMessage(f"{kind.name} is the server's to say")
                verb(client, header, frames)
        except MalformedMessage as error:
            self._refuse(routing_id, request, Refusal(Code.MALFORMED, str(error)))
        except Refusal as refusal:
            self._refuse(routing_id, request, refusal)
        except RepeatedStream:
            self._refuse(routing_id, request, Refusal(Code.REPEATED_STREAM))
        except RecursionError:  # a value nested a thousand deep cannot even be shown in a sentence
            self._refuse(routing_id, request, Refusal(Code.MALFORMED, "the header is nested too deep"))
        return False

    @property
    def taken_blocks(self) -> int:
        """How many STEP messages are gathered."""
        return len(self._burst)

    def admit_if_due(self) -> None:
        """As `admit_taken`, unless they would only wait for the run under way: more may join them until its end."""
        if not self._engine.would_wait(self._burst.columns):
            self.admit_taken()

    def admit_taken(self) -> None:
        """Hand the STEP messages that were gathered to the engine."""
        if not len(self._burst):
            return
        steps = self._burst.take()
        try:
            self._engine.admit(steps)
        except RepeatedStream:
            for piece in apart(steps):
                self._admit_piece(piece)

    def _admit_piece(self, steps: list[Step]) -> None:
        try:
            self._engine.admit(steps)
        except RepeatedStream:  # one message, that a stream stands in twice
            self._refuse(steps[0].client.routing_id, steps[0].request, Refusal(Code.REPEATED_STREAM))

    def _refuse(self, routing_id: bytes, request: int, refusal: Refusal) -> None:
        self._statistics.refused_messages_total += 1
        self._answer_refused(routing_id, request, refusal)

    def _answer_refused(self, routing_id: bytes, request: int, refusal: Refusal) -> None:
        self.admit_taken()  # what came before it is answered before it
        message = replies.error(request, refusal.code, str(refusal), refusal.retry_after_us)
        client = self._clients.by_routing_id(routing_id)
        if client is None:
            self._postbox.send_unknown(routing_id, message)
        else:
            self._postbox.send(client, message, time.monotonic_ns())

    def _hello(self, routing_id: bytes, client: Client | None, header: Header) -> None:
        version, name = header.fields
        if version != wire.PROTOCOL_VERSION:
            raise Refusal(Code.WRONG_VERSION, f"the client speaks {version!r:.20}")
        if type(name) is not str:
            raise MalformedMessage("the client's name must be text")
        if routing_id[0] != 0:
            raise MalformedMessage("set no routing id (ZMQ_IDENTITY): the server names connections itself")
        now_ns = time.monotonic_ns()
        if client is None:
            self._refuse_what_is_new()
            client = self._clients.add(routing_id, now_ns)
            if client is None:
                raise Refusal(Code.BUSY, "limits.max_connections connections are open", 1_000_000)
        self._postbox.send(client, replies.welcome(header.request, self._info), now_ns)

    def _open(self, client: Client, header: Header, frames: list[bytes]) -> None:
        count = wire.count_field(header.fields[0], "N", wire.MAX_BLOCK_STREAMS)
        names = wire.unpack_names(frames[1], count)
        states = self._states(header.fields[1], frames[2], count)
        first_seqs = self._first_seqs(header.fields[2], frames[3], count)
        self._refuse_what_is_new()
        codes = np.array([0 if wire.name_is_good(name) else Code.BAD_NAME for name in names], np.int32)
        if states is not None:
            codes[(codes == 0) & ~np.isfinite(states).all(axis=(1, 2))] = Code.NOT_FINITE
        good = codes == 0
        states = None if states is None else states[good]
        self._open_good(client, header.request, names, codes, states, None if first_seqs is None else first_seqs[good])

    def _open_good(
        self, client: Client, request: int, names: list[str], codes: I32, states: F32 | None, first_seqs: I64 | None
    ) -> None:
        """Open the streams of the names whose code is 0, from states and seqs that are of those alone, and answer."""
        good = codes == 0
        grants = np.zeros(len(names), wire.GRANT)

        def opened(granted: wire.GrantArray, refused: I32) -> None:
            grants[good] = granted
            codes[good] = refused
            message = replies.opened(request, grants, codes, self._info.durability)
            self._postbox.send(client, message, time.monotonic_ns())

        good_names = [name for name, is_good in zip(names, good.tolist(), strict=True) if is_good]
        self._lifecycle.open(client, good_names, states, first_seqs, opened)

    def _first_seqs(self, has_seqs: Any, frame: bytes, count: int) -> I64 | None:
        if not wire.count_field(has_seqs, "has_seqs", 1, at_least=0):
            if len(frame):
                raise MalformedMessage("the header says that no first seqs follow, their frame is not empty")
            return None
        seqs: U64 = wire.array_frame(frame, "<u8", (count,), "first seqs")
        if int(seqs.max()) >= 2**62:
            raise MalformedMessage("a first seq must be below 2^62")
        return seqs.astype(np.int64)

    @property
    def _is_ready(self) -> bool:
        return not (self.draining or self._tap.has_failed)

    def _refuse_what_is_new(self) -> None:
        if not self._is_ready:
            raise Refusal(Code.SHUTTING_DOWN, "its recording has failed" if self._tap.has_failed else "")

    def _resume(self, client: Client, header: Header, frames: list[bytes]) -> None:
        count = wire.count_field(header.fields[0], "N", wire.MAX_BLOCK_STREAMS)
        take_over = wire.count_field(header.fields[1], "take_over", 1, at_least=0)
        names = wire.unpack_names(frames[1], count)
        claims = wire.array_frame(frames[2], wire.CLAIM, (count,), "claims")
        self._refuse_what_is_new()
        if len(set(names)) < count:
            raise Refusal(Code.REPEATED_STREAM)

        def resumed(grants: wire.GrantArray, codes: I32, expected_seq: I64) -> None:
            message = replies.resumed(header.request, grants, codes, expected_seq, self._info.durability)
            self._postbox.send(client, message, time.monotonic_ns())

        self._lifecycle.resume(client, names, claims["have"], claims["epoch"], bool(take_over), resumed)

    def _read_state(self, client: Client, header: Header, frames: list[bytes]) -> None:
        count = self._count_with_states(header.fields[0])
        if not wire.count_field(header.fields[1], "by_name", 1, at_least=0):
            slots, codes = self._own(client, frames[1], count)
            self._show(client, header.request, slots, codes)
            return
        names = wire.unpack_names(frames[1], count)
        if len(set(names)) < count:
            raise Refusal(Code.REPEATED_STREAM)

        def found(slots: I64, codes: I32) -> None:
            if codes.all():  # what is shown of streams waits for all that this could
                self._lifecycle.when_all_is_durable(lambda: self._show(client, header.request, slots, codes))
            else:
                self._show(client, header.request, slots, codes)

        self._lifecycle.find(names, found)

    def _show(self, client: Client, request: int, slots: I64, codes: I32) -> None:
        """Answer with the states of the slots whose code is 0."""
        count, good = len(slots), codes == 0

        def read(next_seqs: I64, found: F32, lost: Bool) -> None:
            seqs, states = np.zeros(count, np.int64), np.full(self._state_shape(count), np.nan, np.float32)
            seqs[good], states[good] = next_seqs, found
            codes[good] = np.where(lost, Code.STATE_LOST, 0)
            self._postbox.send(client, replies.state_read(request, seqs, states, codes), time.monotonic_ns())

        if good.any():
            self._lifecycle.read_state(slots[good], read)
        else:
            read(np.empty(0, np.int64), np.empty(self._state_shape(0), np.float32), np.empty(0, np.bool_))

    def _reset(self, client: Client, header: Header, frames: list[bytes]) -> None:
        count = wire.count_field(header.fields[0], "N", wire.MAX_BLOCK_STREAMS)
        states = self._states(header.fields[1], frames[2], count)
        slots, codes = self._own(client, frames[1], count)
        self._refuse_what_is_new()
        codes[(codes == 0) & (self._engine.table.pending[slots] > 0)] = Code.FRAMES_PENDING
        if states is not None:
            codes[(codes == 0) & ~np.isfinite(states).all(axis=(1, 2))] = Code.NOT_FINITE
        good = codes == 0

        def changed(is_done: bool) -> None:
            if not is_done:
                codes[good] = Code.STEP_FAILED
            self._postbox.send(client, replies.changed(header.request, codes), time.monotonic_ns())

        if good.any():
            self._lifecycle.reset(slots[good], None if states is None else states[good], changed)
        else:
            changed(True)

    def _fork(self, client: Client, header: Header, frames: list[bytes]) -> None:
        count = self._count_with_states(header.fields[0])
        names = wire.unpack_names(frames[2], count)
        slots, codes = self._own(client, frames[1], count)
        self._refuse_what_is_new()
        codes[(codes == 0) & ~np.array([wire.name_is_good(name) for name in names])] = Code.BAD_NAME
        good = codes == 0

        def read(next_seqs: I64, states: F32, lost: Bool) -> None:
            if self._clients.by_number(client.number) is not client:
                return  # gone meanwhile; its number may be another's now
            codes[np.flatnonzero(good)[lost]] = Code.STATE_LOST
            self._open_good(client, header.request, names, codes, states[~lost], next_seqs[~lost])

        if good.any():
            self._lifecycle.read_state(slots[good], read)
        else:
            self._open_good(client, header.request, names, codes, None, None)

    def _own(self, client: Client, frame: bytes, count: int) -> tuple[I64, I32]:
        handles: U64 = wire.array_frame(frame, "<u8", (count,), "handles")
        return resolve_distinct(self._engine.table, client.number, handles)

    def _state_shape(self, count: int) -> tuple[int, int, int]:
        return (count, self._info.state_layers, self._info.state_size)

    def _count_with_states(self, field: Any) -> int:
        count = wire.count_field(field, "N", wire.MAX_BLOCK_STREAMS)
        if math.prod(self._state_shape(count)) * 4 > self._limits.max_message_bytes:
            raise Refusal(Code.TOO_LARGE, "their states do not fit into one message")
        return count

    def _states(self, has_states: Any, frame: bytes, count: int) -> F32 | None:
        if not wire.count_field(has_states, "has_states", 1, at_least=0):
            if len(frame):
                raise MalformedMessage("the header says that no states follow, the states frame is not empty")
            return None
        shape = self._state_shape(count)
        size = math.prod(shape) * 4
        if len(frame) != size:
            raise Refusal(Code.WRONG_SHAPE, f"states must be float32 {list(shape)}, {size} bytes")
        states: F32 = wire.array_frame(frame, "<f4", shape, "states")
        return states

    def _gather(self, step: Step) -> bool:
        """Gather a message; whether nothing else was done."""
        self._refuse_what_is_new()
        if self._burst.takes(step):
            return True
        self.admit_taken()  # frames of what was gathered may be refused, and leave room
        if not self._burst.takes(step):
            self._statistics.busy_total += 1
            raise Refusal(Code.BUSY, retry_after_us=_BUSY_RETRY_US)
        return False

    def _close(self, client: Client, header: Header, frames: list[bytes]) -> None:
        count = self._count_with_states(header.fields[0])
        slots, codes = self._own(client, frames[1], count)
        good = codes == 0

        def closed(final: F32, lost: Bool) -> None:
            states = np.full(self._state_shape(count), np.nan, np.float32)
            states[good] = final
            codes[good] = np.where(lost, Code.STATE_LOST, 0)
            self._postbox.send(client, replies.closed(header.request, states, codes), time.monotonic_ns())

        if good.any():
            self._lifecycle.close(slots[good], "closed", closed)
        else:
            closed(np.empty(self._state_shape(0), np.float32), np.empty(0, np.bool_))

    def _ping(self, client: Client, header: Header, _: list[bytes]) -> None:
        self._postbox.send(client, replies.pong(header.request), time.monotonic_ns())

    def _pong(self, client: Client, header: Header, _: list[bytes]) -> None:
        self._postbox.has_read(client, header.request, time.monotonic_ns())

    def _stats(self, client: Client, header: Header, _: list[bytes]) -> None:
        values = {
            "ready": float(self._is_ready),
            **self._statistics.snapshot(),
            "streams_open": float(self._engine.table.open_count),
            "connections": float(len(self._clients)),
            "streams_parked": float(self._engine.table.owned[self._engine.table.parked]),
            "frames_pending": float(self._engine.rings.pending_count),
        }
        self._postbox.send(client, replies.statistics(header.request, values), time.monotonic_ns())
