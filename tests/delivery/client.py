"""A client as the protocol describes it: it keeps what is not answered, sends it again, and resumes what it lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from instep_client.protocol import wire
from instep_client.protocol.wire import HAVE_ALL, Code, Kind, Message
from tests.delivery.lives import Asked, Is, Lane, Life, require
from tests.delivery.network import Connection, Network
from tests.delivery.truth import Truth, is_fenced_rightly
from tests.support.states import rows_of
from tests.support.step_messages import parts, step_header

NAMES = ("a", "b")
COPY = "c"
"""The name of every copy."""


class ModelClient:
    """One client of all streams.

    Args:
        number: which.
        truth: who is told what was asked, and knows which answers are right.
        network: the way to the server.
    """

    def __init__(self, number: int, truth: Truth, network: Network) -> None:
        self.number = number
        self.lanes = {name: Lane(name) for name in (*NAMES, COPY)}
        self._truth = truth
        self._network = network
        self._request = 0
        self.connection: Connection
        self._connect()

    # ── Asking ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def reconnect(self) -> None:
        """Leave the connection for a new one and resume everything there."""
        self.connection.is_left = True
        self._connect()
        for lane in self.lanes.values():
            if lane.state is Is.OPENING:
                self.open([lane])
            elif lane.state in (Is.FORKING, Is.TAKING):
                self.take_over(lane)
        resumed = [lane for lane in self.lanes.values() if lane.state in (Is.OPEN, Is.RESUMING, Is.CLOSING)]
        if resumed:
            self._resume(resumed, [lane.have for lane in resumed], takes_over=False)

    def open(self, lanes: Sequence[Lane]) -> None:
        names = [lane.name for lane in lanes]
        request = self._ask(Asked(Kind.OPEN, names), (len(names), 0, 0), [wire.pack_names(names), b"", b""])
        for lane in lanes:
            self._lanes_anew(lane, Is.OPENING, request)

    def fork(self, lane: Lane) -> None:
        """Ask for a copy, whatever is pending."""
        copy = self.lanes[COPY]
        if lane.state is Is.OPEN and copy.state is Is.NOTHING:
            asked = Asked(Kind.FORK, [COPY], [_life(lane)], [lane.handle])
            request = self._ask(asked, (1,), [_handle(lane), wire.pack_names([COPY])])
            self._lanes_anew(copy, Is.FORKING, request)

    def take_over(self, lane: Lane) -> None:
        have = lane.have if lane.was_set_back else HAVE_ALL
        self._resume([lane], [have], takes_over=True)

    def _resume(self, lanes: Sequence[Lane], have: list[int], *, takes_over: bool) -> None:
        names = [lane.name for lane in lanes]
        claims = np.array([(outputs, lane.epoch) for outputs, lane in zip(have, lanes, strict=True)], wire.CLAIM)
        asked = Asked(Kind.RESUME, names, have=have, takes_over=takes_over)
        request = self._ask(asked, (len(names), int(takes_over)), [wire.pack_names(names), claims.tobytes()])
        for lane in lanes:
            lane.request, lane.state = request, Is.TAKING if takes_over else Is.RESUMING

    def send(self, lanes: Sequence[Lane], timesteps: int, *, anew: bool, politely: bool) -> None:
        """One block of the next frames of these streams.

        Args:
            lanes: some are open.
            timesteps: frames of each, at most.
            anew: begin with the first unanswered one, and send nothing new.
            politely: stay within the window.
        """
        lanes = [lane for lane in lanes if lane.state is Is.OPEN]
        for lane in lanes:
            if anew:
                lane.cursor = lane.have
                timesteps = min(timesteps, len(lane.line) - lane.cursor)
            if politely:
                timesteps = min(timesteps, lane.have + self._truth.window - lane.cursor)
        if timesteps < 1 or not lanes:
            return
        first_seqs = [lane.cursor for lane in lanes]
        for lane in lanes:
            lane.cursor += timesteps
            while len(lane.line) < lane.cursor:
                lane.line.append(next(self._truth.values))
        self._step(lanes, first_seqs, timesteps)

    def contradict(self, lane: Lane) -> None:
        """Send the newest frame that was answered again, with another value."""
        if lane.state is Is.OPEN and lane.have:
            self._step([lane], [lane.have - 1], 1, value=next(self._truth.values))

    def read_states(self, lanes: Sequence[Lane]) -> None:
        """Ask for the states of those that are open, whatever is pending; `Truth` judges the reply."""
        lanes = [lane for lane in lanes if lane.state is Is.OPEN]
        if lanes:
            asked = Asked(Kind.READ_STATE, [lane.name for lane in lanes], [_life(lane) for lane in lanes])
            self._ask(asked, (len(lanes), 0), [b"".join(map(_handle, lanes))])

    def reset(self, lane: Lane, state: int) -> None:
        """Ask for another state, 0 for the initial one, though frames may be unanswered."""
        if lane.state is Is.OPEN and lane.new_state is None:
            lane.new_state = state
            self._reset(lane, state)

    def _reset(self, lane: Lane, state: int) -> None:
        asked = Asked(Kind.RESET, [lane.name], [_life(lane)], [lane.handle], lines=[lane.line], states=[state])
        states = rows_of([[state]]).tobytes() if state else b""
        self._ask(asked, (1, int(state > 0)), [_handle(lane), states])

    def close(self, lane: Lane) -> None:
        """Close a stream, though frames of it may be unanswered."""
        if lane.state is Is.OPEN:
            closings = np.array([(lane.handle, lane.have)], wire.CLOSING).tobytes()
            asked = Asked(Kind.CLOSE, [lane.name], [_life(lane)], [lane.handle], have=[lane.have])
            lane.request = self._ask(asked, (1,), [closings])
            lane.state = Is.CLOSING

    def _step(self, lanes: Sequence[Lane], first_seqs: list[int], timesteps: int, value: int | None = None) -> None:
        acked = [lane.have if value is None else first for lane, first in zip(lanes, first_seqs, strict=True)]
        columns = np.array(
            [(lane.handle, seq, ack) for lane, seq, ack in zip(lanes, first_seqs, acked, strict=True)], wire.COLUMN
        )
        x = np.array(
            [lane.line.xs[seq : seq + timesteps] for lane, seq in zip(lanes, first_seqs, strict=True)], np.float32
        ).T
        if value is not None:
            x = np.full_like(x, value)
        asked = Asked(
            Kind.STEP,
            [lane.name for lane in lanes],
            [_life(lane) for lane in lanes],
            [lane.handle for lane in lanes],
            [lane.epoch for lane in lanes],
            [lane.line for lane in lanes],
            first_seqs,
            acked,
            timesteps,
            is_conflict=value is not None,
        )
        self._ask(asked, (timesteps, len(lanes), 1), [columns.tobytes(), x.tobytes()])

    def _connect(self) -> None:
        self.connection = self._network.connect(self.number)
        self._post(Kind.HELLO, 0, (wire.PROTOCOL_VERSION, "", ""), [])

    def _ask(self, asked: Asked, fields: tuple[Any, ...], frames: list[bytes]) -> int:
        self._request += 1
        self._truth.asked[self.number, self._request] = asked
        self._post(asked.kind, self._request, fields, frames)
        return self._request

    def _post(self, kind: Kind, request: int, fields: tuple[Any, ...], frames: list[bytes]) -> None:
        if self.connection.is_cut:
            return
        if kind is Kind.STEP:
            columns, x = frames
            self.connection.to_server.append([step_header(request, *fields) + columns, x])
        else:
            self.connection.to_server.append([wire.pack_header(kind, request, *fields), *frames])

    def _lanes_anew(self, lane: Lane, state: Is, request: int = 0) -> None:
        self.lanes[lane.name] = Lane(lane.name, state, request)

    # ── Being answered ─────────────────────────────────────────────────────────────────────────────────────────────

    def receive(self, message: Message) -> None:
        """One message of the connection."""
        (kind, request, *fields), arrays = parts([bytes(frame) for frame in message])
        asked = self._truth.asked.get((self.number, request))
        if kind == Kind.PING:
            self._post(Kind.PONG, request, (), [])
        elif kind == Kind.ERROR:
            self._refused(Code(fields[0]))
        elif kind == Kind.EVICTED:
            self._evicted(Code(fields[1]), np.frombuffer(arrays[0], "<u8").tolist())
        elif kind == Kind.WOKEN:
            self._woken(*(np.frombuffer(array, "<u8").tolist() for array in arrays))
        elif asked is None:
            pass
        elif kind == Kind.STEPPED:
            self._stepped(asked, arrays[1])
        elif kind in (Kind.OPENED, Kind.RESUMED):
            self._granted(request, asked, message)
        elif kind == Kind.CHANGED:
            self._changed(asked, message)
        elif kind == Kind.CLOSED:
            self._closed(request, asked, message)

    def _refused(self, code: Code) -> None:
        require(code in (Code.HELLO_FIRST, Code.BUSY), f"a message was refused: {code.name}")
        if code is Code.HELLO_FIRST:
            self.reconnect()

    def _evicted(self, code: Code, handles: list[int]) -> None:
        for lane in list(self.lanes.values()):
            if lane.handle in handles and lane.state not in (Is.NOTHING, Is.OPENING):
                if code is Code.HIBERNATED:
                    self._truth.seen.add(code.name)
                    lane.is_waking = True
                else:
                    self._told(lane, code)

    def _woken(self, former: list[int], handles: list[int]) -> None:
        for lane in self.lanes.values():
            if lane.handle in former and lane.state in (Is.OPEN, Is.CLOSING, Is.RESUMING):
                self._truth.seen.add("woken")
                lane.handle, lane.is_waking = handles[former.index(lane.handle)], False

    def _is_renewed(self, lane: Lane, code: Code, former: int) -> bool:
        """Whether a refusal means only that the stream has slept, and the request has to be sent again.

        Where the word of its sleep or its new handle was lost, the stream is resumed.
        """
        if code is not Code.UNKNOWN_STREAM or lane.life is None or not lane.life.has_slept:
            return False
        if lane.handle == former and not lane.is_waking and lane.state in (Is.OPEN, Is.CLOSING):
            self._resume([lane], [lane.have], takes_over=False)
        return True

    def _stepped(self, asked: Asked, entries: bytes) -> None:
        good = [asked.timesteps] * len(asked.names)
        failures = np.frombuffer(entries, wire.FAILURE)
        for failure in failures:
            good[int(failure["column"])] = int(failure["timestep"])
        for column, name in enumerate(asked.names):
            lane = self.lanes[name]
            if lane.line is asked.lines[column]:
                first = asked.first_seqs[column]
                lane.later.update(range(first, first + good[column]))
                while lane.have in lane.later:
                    lane.later.discard(lane.have)
                    lane.have += 1
                lane.cursor = max(lane.cursor, lane.have)
        for failure in failures:
            column, code = int(failure["column"]), Code(int(failure["code"]))
            lane = self.lanes[asked.names[column]]
            if lane.line is not asked.lines[column] or lane.state is not Is.OPEN:
                continue
            if asked.is_conflict and code in (Code.CONFLICT, Code.SEQ_REPEATED):
                continue
            if self._is_renewed(lane, code, asked.handles[column]):
                lane.cursor = lane.have
                continue
            self._step_refused(lane, code, int(failure["expected_seq"]))

    def _step_refused(self, lane: Lane, code: Code, expected_seq: int) -> None:
        if code in (Code.SEQ_GAP, Code.WINDOW_FULL, Code.STEP_FAILED):
            lane.cursor = max(lane.have, min(lane.cursor, expected_seq))
        elif code is not Code.SEQ_REPEATED:  # that one is answered when it is sent again later
            self._told(lane, code)

    def _granted(self, request: int, asked: Asked, message: Message) -> None:
        failures = {int(entry["column"]): entry for entry in np.frombuffer(message[2], wire.FAILURE)}
        for column, grant in enumerate(np.frombuffer(message[1], wire.GRANT)):
            lane = self.lanes[asked.names[column]]
            handle, epoch, next_seq = (int(value) for value in grant)
            is_mine = lane.request == request and lane.state in (Is.OPENING, Is.FORKING, Is.RESUMING, Is.TAKING)
            if handle:
                is_newer = epoch > lane.epoch and lane.state is Is.OPEN and asked.kind is Kind.RESUME
                if is_mine or is_newer:
                    self._adopt(lane, asked, handle, epoch, next_seq)
            elif is_mine and asked.kind is Kind.FORK:
                self._fork_refused(lane, Code(int(failures[column]["code"])), asked.lives[column])
            elif is_mine:
                self._told(lane, Code(int(failures[column]["code"])))

    def _fork_refused(self, lane: Lane, code: Code, original: Life) -> None:
        if code is Code.NAME_IN_USE:
            self._told(lane, code)
            return
        is_known = code in (Code.UNKNOWN_STREAM, Code.FENCED, Code.STATE_LOST)
        is_right = original.has_slept or is_fenced_rightly(self._truth, original)
        require(is_known and is_right, f"a copy was refused with {code.name} for no reason")
        self._lanes_anew(lane, Is.NOTHING)

    def _adopt(self, lane: Lane, asked: Asked, handle: int, epoch: int, next_seq: int) -> None:
        life = next(life for life in self._truth.lives.values() if epoch in life.lines)
        line, former = life.lines[epoch], lane.line
        if not asked.takes_over and asked.kind is Kind.RESUME:
            require(former.xs[:next_seq] == line.xs[:next_seq], "a stream was resumed that somebody else went on with")
            require(lane.have <= next_seq, "a stream was set back without a word")
            if len(line) == next_seq:
                for x in former.xs[next_seq:]:
                    line.append(x)
        else:
            lane.have = next_seq if not lane.was_set_back else min(lane.have, next_seq)
            lane.later = set()
        lane.state, lane.handle, lane.epoch, lane.life, lane.line = Is.OPEN, handle, epoch, life, line
        lane.is_waking = False
        lane.later = {seq for seq in lane.later if seq > lane.have}
        lane.cursor = lane.have
        lane.was_set_back = False
        if lane.new_state is not None:  # before any frame
            self._reset(lane, lane.new_state)

    def _changed(self, asked: Asked, message: Message) -> None:
        lane = self.lanes[asked.names[0]]
        if lane.line is not asked.lines[0] or lane.new_state != asked.states[0] or lane.state is not Is.OPEN:
            return
        failures = np.frombuffer(message[1], wire.FAILURE)
        code = Code(int(failures[0]["code"])) if len(failures) else None
        if code is None or code is Code.FRAMES_PENDING:
            lane.new_state = None
            self._truth.seen.add("reset too early" if code else "reset")
        elif not self._is_renewed(lane, code, asked.handles[0]):
            self._told(lane, code)
        elif lane.state is Is.OPEN:
            self._reset(lane, lane.new_state)

    def _closed(self, request: int, asked: Asked, message: Message) -> None:
        lane = self.lanes[asked.names[0]]
        if lane.request != request or lane.state is not Is.CLOSING:
            return
        failures = np.frombuffer(message[2], wire.FAILURE)
        if len(failures):
            code = Code(int(failures[0]["code"]))
            if code is Code.FRAMES_PENDING:
                self._truth.seen.add("closed too early")
                lane.state = Is.OPEN
                return
            if not self._is_renewed(lane, code, asked.handles[0]):
                self._told(lane, code)
            elif lane.state is Is.CLOSING:
                lane.state = Is.OPEN
                self.close(lane)
            return
        state = np.frombuffer(message[1], "<f4")[0]
        require(state == lane.line.states[asked.have[0]], "a stream was closed of which not all outputs had come")
        self._truth.seen.add("closed")
        self._lanes_anew(lane, Is.NOTHING)

    def _told(self, lane: Lane, code: Code) -> None:
        """The server does not go on with a stream; whether it may say so."""
        truth, life = self._truth, lane.life
        truth.seen.add(code.name)
        if code in (Code.UNKNOWN_STREAM, Code.EXPIRED, Code.STATE_LOST):
            is_right = life is None or life.has_ended or truth.is_lossy
            self._lanes_anew(lane, Is.NOTHING)
        elif code is Code.NAME_IN_USE:
            is_right = lane.state in (Is.OPENING, Is.FORKING)
            lane.state = Is.REFUSED
        elif code is Code.FENCED:
            is_right = is_fenced_rightly(truth, life)
            lane.state = Is.REFUSED
        elif code is Code.DATA_LOSS:
            is_right = truth.is_lossy
            lane.state, lane.was_set_back = Is.REFUSED, True
        elif code is Code.OUTPUTS_GONE:
            is_right = truth.is_lossy or life is None or life.is_contended
            lane.state = Is.REFUSED
            lane.was_set_back = False
        else:
            is_right = False
        if lane.state is Is.REFUSED:
            lane.new_state, lane.is_waking = None, False
        require(is_right, f"a client was told {code.name} for no reason")


def _handle(lane: Lane) -> bytes:
    return np.array([lane.handle], "<u8").tobytes()


def _life(lane: Lane) -> Life:
    assert lane.life is not None
    return lane.life
