"""The state of a recorded stream before any of its frames, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Final, Literal, TypeAlias

import numpy as np

from instep.core.typing import F32, U8, Bool
from instep.models.model import Model
from instep.recording.errors import RecordingError
from instep.recording.reader import RecordingReader
from instep.recording.records import StreamInfo
from instep.verify.checkpoints import StoredCheckpoints
from instep.verify.recorded_model import recorded_network, why_not_bits
from instep.verify.replay import replay_stepped
from instep.verify.stream_checks import StreamCheck, StreamChecks
from instep_tools.words import counted

Origin: TypeAlias = Literal["opening", "checkpoint", "reset"]

_AT_ONCE: Final = 4096
"""Frames that are stepped before their outputs are compared."""


class NoSuchMoment(RecordingError):
    """A recording does not hold the frames that were asked for; the message says which it holds."""


class NotExact(RecordingError):
    """The recorded bits are not, or need not be, those that stepping again gives; the message says why."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A stream before one of its frames."""

    info: StreamInfo
    seq: int
    """Of the frame."""
    state: U8
    """uint8 [row_bytes]."""
    origin: Origin
    """The row that recorded the state from which this one was computed."""
    origin_seq: int
    """The frame that it is before."""
    compared: int
    """Count of frames since then with recorded outputs: they came out again, bit for bit."""
    first_seq: int
    """The first frame of this opening that is recorded."""
    openings: int
    """Count of openings of this name; this is the newest one that has the frame."""

    @property
    def replayed(self) -> int:
        """Frames stepped since the recorded state."""
        return self.seq - self.origin_seq


@dataclass(frozen=True, slots=True)
class PastFrames:
    """Consecutive frames of a stream."""

    first_seq: int
    x: F32
    """float32 [N, features]."""
    y: F32
    """float32 [N, outputs], as recorded."""
    answered: Bool
    """bool [N]: False where the outputs were not recorded."""


class Past:
    """The frames and states of every opening of one stream, read once.

    Args:
        reader: the recording, just opened.
        model: the recorded one.
        word: name or number of the stream.
        on_progress: called with the share (0 to 1) of the recording that was read.

    Raises:
        NoSuchStream: when there is no such stream.
        RecordingError: when the recording is damaged.
    """

    def __init__(self, reader: RecordingReader, model: Model, word: str, on_progress: Callable[[float], None]) -> None:
        checkpoints = StoredCheckpoints(reader)
        reader.check_positions()
        initial = model.state.initial(1)[0]
        streams = StreamChecks(reader, [word], checkpoints, initial, on_progress)
        self._word = word
        self._reader = reader
        self._sequences = streams.sequences
        self._openings = [list(checks) for _, checks in groupby(streams.checks, attrgetter("info.stream"))]
        self._notes = why_not_bits([engine.header for engine in reader.engines])
        self._network = recorded_network(model)

    def before(self, seq: int | None = None) -> Moment:
        """The stream before a frame, after a reset or write that took place there; None for after its last frame.

        Raises:
            NoSuchMoment: when the frame is not recorded.
            NotExact: when frames must be stepped and that need not give, or does not give, the recorded bits.
            RecordingError: when frames are missing before it.
        """
        checks, at = self._find(seq)
        check = checks[at]
        seq = check.next_seq if seq is None else seq
        state, compared = self._step(check, check.initial_state, check.first_seq, seq)
        origin: Origin = "checkpoint"
        if at == 0:
            origin = "checkpoint" if self._is_trimmed(check.info) else "opening"
        elif check.stretch != checks[at - 1].stretch:
            origin = "reset"
        return Moment(
            check.info, seq, state, origin, check.first_seq, compared, checks[0].first_seq, len(self._openings)
        )

    def states(self, first: int, end: int) -> tuple[PastFrames, U8]:
        """Frames `first` to `end` - 1 of one opening, and the state after each, uint8 [N, row_bytes].

        Raises:
            as `before`.
        """
        checks, at = self._find(first, end)
        state, _ = self._step(checks[at], checks[at].initial_state, checks[at].first_seq, first)
        after = np.empty((end - first, len(state)), np.uint8)
        spans, seq = [], first
        for check in checks[at:]:
            stop = min(end, check.next_seq)
            if check.first_seq > first:
                state = check.initial_state
            if seq < stop:
                self._step(check, state, seq, stop, after[seq - first : stop - first])
                spans.append(self._span(check, seq, stop))
                seq = stop
        return _joined(spans), after

    def since(self, seq: int) -> PastFrames:
        """The frames from one on, up to the end of the stream or to the next reset of its state."""
        checks, at = self._find(seq)
        same = [check for check in checks[at:] if check.stretch == checks[at].stretch]
        return _joined([self._span(check, max(seq, check.first_seq), check.next_seq) for check in same])

    def _find(self, seq: int | None, upto: int = 0) -> tuple[list[StreamCheck], int]:
        """The newest opening with the frames from `seq` to `upto`, which may begin one after its last one.

        None for its end. Also which of its checks begins last, at or before the frame.
        """
        for checks in reversed(self._openings):
            if seq is None:
                break
            if checks[0].first_seq <= seq <= checks[-1].next_seq and upto <= checks[-1].next_seq:
                return checks, max(at for at, check in enumerate(checks) if check.first_seq <= seq)
        checks = self._openings[-1]
        first, end, info = checks[0].first_seq, checks[-1].next_seq, checks[0].info
        problems = [problem for check in checks for problem in check.problems]
        if seq is None and not problems:
            return checks, len(checks) - 1
        if seq is None:
            raise NoSuchMoment(
                f"the last frame of stream {self._word!r} cannot be used: {problems[0]}; ask for a seq from {first} "
                f"to {end}"
            )
        missing = max(seq, upto) if seq >= first else seq
        if missing > end:
            why = f"its recorded frames end before frame {end}"
            if problems:
                why = f"{problems[0]}; what follows cannot be used"
        elif self._is_trimmed(info):
            why = f"the history before frame {first} was deleted (recording.keep_bytes, keep_s)"
        else:
            why = f"it was opened to begin with frame {first}"
        raise NoSuchMoment(
            f"stream {self._word!r} has no frame {missing} here: {why}; ask for a seq from {first} to {end}"
        )

    def _is_trimmed(self, info: StreamInfo) -> bool:
        return info.opened_position <= self._reader.trimmed.position

    def _span(self, check: StreamCheck, first: int, end: int) -> PastFrames:
        sequences, header = self._sequences, self._reader.header
        if sequences is None:
            x, y = (np.zeros((0, width), np.float32) for width in (header.features, header.outputs))
            return PastFrames(first, x, y, np.zeros(0, np.bool_))
        places = sequences.order[check.start + first - check.first_seq :][: end - first]
        return PastFrames(first, sequences.x[places], sequences.y[places], sequences.answered[places])

    def _step(self, check: StreamCheck, state: U8, first: int, end: int, after: U8 | None = None) -> tuple[U8, int]:
        """The state before frame `end`, given that before `first`, and how many outputs were compared."""
        compared = 0
        if first < end and self._notes:
            raise NotExact(
                f"the state cannot be computed exactly: {'; '.join(self._notes)}. The one before frame "
                f"{check.first_seq} was recorded, and needs no computing"
            )
        for at in range(first, end, _AT_ONCE):
            stop = min(end, at + _AT_ONCE)
            span, kept = self._span(check, at, stop), None if after is None else after[at - first : stop - first, None]
            active = np.ones(stop - at, np.int64)
            y, states = replay_stepped(self._network, span.x[:, None], state[None], active, kept)
            state = states[0]
            differs = (y[:, 0].view(np.uint32) != span.y.view(np.uint32)).any(axis=1) & span.answered
            if differs.any():
                raise NotExact(
                    f"stepping frame {at + int(np.argmax(differs))} of stream {self._word!r} again gives other outputs "
                    "than were recorded, so a state computed from it would be another one: `instep verify` says more"
                )
            compared += int(span.answered.sum())
        return state, compared


def _joined(spans: list[PastFrames]) -> PastFrames:
    x, y = np.concatenate([span.x for span in spans]), np.concatenate([span.y for span in spans])
    return PastFrames(spans[0].first_seq, x, y, np.concatenate([span.answered for span in spans]))


def in_words(moment: Moment) -> str:
    """Where the state comes from, as the end of a sentence."""
    recorded = (
        "the opening" if moment.origin == "opening" else f"the {moment.origin} before frame {moment.origin_seq:,}"
    )
    if not moment.replayed:
        return f"as recorded by {recorded}"
    unheard = moment.replayed - moment.compared
    agree = "their outputs equal the recorded ones, bit for bit"
    if unheard:
        agree = f"{counted(unheard, 'output')} were not recorded, the others equal theirs, bit for bit"
    return f"from {recorded}, with {counted(moment.replayed, 'frame')} stepped again; {agree}"
