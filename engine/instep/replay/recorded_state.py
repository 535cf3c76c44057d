"""The exact state of a recorded stream before any of its frames, to be shown, saved, or continued on a server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from rich.console import Console
from rich.text import Text

from instep.core.typing import U8
from instep.models.model import Model
from instep.recording.commands import write_json
from instep.recording.errors import RecordingError
from instep.recording.reader import RecordingReader
from instep.recording.records import RecordedEvent, StreamInfo, openings_of
from instep.recording.schema import RESET_EVENT, RecordingHeader
from instep.recording.segments import Segment, segments
from instep.replay.recorded_model import recorded_model, recorded_network, why_not_bits
from instep.replay.replay import LAST, Replay, StateTable, differ
from instep_client.protocol.errors import InvalidInput
from instep_client.states import StreamSnapshot, as_state
from instep_tools.connect import Target
from instep_tools.pacing import Stop
from instep_tools.problems import CommandProblem, Exit, check_new
from instep_tools.running import run_command
from instep_tools.state import leaving, plain, restored, save_new, state_lines, tell_parked
from instep_tools.terminal import Terminal
from instep_tools.words import counted, folded

Origin: TypeAlias = Literal["opening", "checkpoint", "reset"]


class NoSuchMoment(RecordingError):
    """A recording does not have the requested frame; the message says which it has."""


class NotExact(RecordingError):
    """The state cannot be computed to the bit; the message gives the reason."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A stream before one of its frames."""

    info: StreamInfo
    seq: int
    """The seq of the frame."""
    state: U8
    """uint8 [row_bytes]."""
    origin: Origin
    """The row with the recorded state from which this one was computed."""
    origin_seq: int
    """The seq of the frame that follows that recorded state."""
    compared: int
    """The number of frames since then whose recorded outputs were reproduced, bit for bit."""
    openings: int
    """The number of openings of this name; this is the newest one that has the frame."""

    @property
    def replayed(self) -> int:
        """The number of frames stepped since the recorded state."""
        return self.seq - self.origin_seq

    def in_words(self) -> str:
        """A phrase about the origin of the state, to end a sentence with."""
        recorded = "the opening" if self.origin == "opening" else f"the {self.origin} before frame {self.origin_seq:,}"
        if not self.replayed:
            return f"as recorded by {recorded}"
        unheard = self.replayed - self.compared
        agree = "their outputs equal the recorded ones, bit for bit"
        if unheard:
            agree = f"{counted(unheard, 'output')} were not recorded, the others equal theirs, bit for bit"
        return f"from {recorded}, with {counted(self.replayed, 'frame')} stepped again; {agree}"


class Past:
    """All openings of one stream; states are computed from the newest recorded state before a frame.

    Args:
        reader: the recording.
        model: the recorded one.
        word: name or number of the stream.

    Raises:
        NoSuchStream: when there is no such stream.
        RecordingError: from every method, when the recording is damaged.
    """

    def __init__(self, reader: RecordingReader, model: Model, word: str) -> None:
        self._openings = openings_of(reader.streams(), word)
        self._word = word
        self._reader = reader
        self._notes = why_not_bits([engine.header for engine in reader.engines])
        self._network = recorded_network(model)

    def before(self, seq: int | None = None) -> Moment:
        """The stream before a frame and after any reset there; None means after the last frame.

        Raises:
            NoSuchMoment: when the frame is not recorded, or frames are missing before it.
            NotExact: when frames must be stepped, and bits are not promised or differ from the recorded ones.
        """
        for info in reversed(self._openings):
            if seq is None or info.first_seq <= seq <= (seq if info.frames is None else info.frames):
                found = self._walk(info, seq)
                if seq is None or found.seq == seq:
                    return found
        raise self._no_such(seq or 0, self._walk(self._openings[-1], None))

    def _walk(self, info: StreamInfo, seq: int | None) -> Moment:
        """Step an opening up to a frame, or to its end if that comes first."""
        position, origin, origin_seq, state = self._recorded_before(info, seq)
        replay, number = Replay(StateTable(self._network), self._reader), info.stream
        replay.add(number, origin_seq, state)
        reached, wrong = origin_seq, None
        compared: list[int] = []
        for segment in self._segments(info, position):
            later = segment.frames.positions[segment.frames.seqs >= (LAST if seq is None else seq)]
            end = int(later[0]) if len(later) else LAST
            frames = segment.frames.only(segment.frames.positions < end)
            resets = [reset for reset in _resets(segment) if origin_seq <= (reset.seq or 0) and reset.position < end]
            stretches = replay.plan(Segment(frames, resets, segment.position))
            for defect in stretches.defects:
                if seq is None or defect.next_seq < seq:
                    raise NoSuchMoment(
                        f"stream {self._word!r} cannot be followed further: {defect.sentence}; ask for a seq from "
                        f"{info.first_seq} to {defect.next_seq}"
                    )
            y, _ = replay.step(stretches)
            reached += int(stretches.lengths.sum())
            for reset in resets:
                origin, origin_seq, wrong, compared = "reset", reset.seq or 0, None, []
            of_origin = (frames.seqs >= origin_seq) & frames.answered
            compared.append(int(of_origin.sum()))
            differs = frames.seqs[of_origin & differ(y, frames.y)]
            wrong = int(differs[0]) if wrong is None and len(differs) else wrong
            if len(later):
                break
        if reached > origin_seq and self._notes:
            raise NotExact(
                f"the state cannot be computed exactly: {'; '.join(self._notes)}. The one before frame {origin_seq} "
                "was recorded, and needs no computing"
            )
        if wrong is not None:
            raise NotExact(
                f"stepping frame {wrong} of stream {self._word!r} again gives other outputs than were recorded, so a "
                "state computed from it would be another one: `instep verify` says more"
            )
        return Moment(info, reached, replay.state(number), origin, origin_seq, sum(compared), len(self._openings))

    def _segments(self, info: StreamInfo, position: int) -> Iterator[Segment]:
        for segment in segments(self._reader, position + 1):
            yield segment.only(np.array([info.stream]))

    def _recorded_before(self, info: StreamInfo, seq: int | None) -> tuple[int, Origin, int, U8 | None]:
        """The newest recorded state before a frame: its position, kind of row, seq, and state."""
        trimmed = self._reader.trimmed.position
        is_trimmed = info.opened_position <= trimmed
        rows = map(self._reader.stream_state, self._reader.rows("states", info.stream, info.stream))
        stored = [row for row in rows if row.position > trimmed and (seq is None or row.seq <= seq)]
        if stored:
            newest = max(stored, key=lambda row: (row.seq, row.position))
            return newest.position, "checkpoint", newest.seq, newest.state
        begin = trimmed if is_trimmed else info.opened_position
        return begin, "checkpoint" if is_trimmed else "opening", info.first_seq, info.initial_state

    def _no_such(self, seq: int, last: Moment) -> NoSuchMoment:
        info = last.info
        if seq > last.seq:
            why = f"its recorded frames end before frame {last.seq}"
        elif info.opened_position <= self._reader.trimmed.position:
            why = f"the history before frame {info.first_seq} was deleted (recording.keep_bytes, keep_s)"
        else:
            why = f"it was opened to begin with frame {info.first_seq}"
        return NoSuchMoment(
            f"stream {self._word!r} has no frame {seq} here: {why}; ask for a seq from {info.first_seq} to {last.seq}"
        )


def _resets(segment: Segment) -> list[RecordedEvent]:
    return [mark for mark in segment.marks if isinstance(mark, RecordedEvent) and mark.kind == RESET_EVENT]


def show_state(
    file: Path,
    stream: str,
    seq: int | None,
    folder: Path | None,
    output: Path | None,
    console: Console,
    *,
    json: bool,
) -> None:
    """Show a recorded stream's state before a frame (by default after the last), and save it if requested.

    Raises:
        RecordingError, CannotVerify, CommandProblem: when the exact state cannot be computed, or a file not be written.
    """
    if output is not None:
        check_new(output, "--output")
    moment, header = _moment(file, stream, seq, folder)
    taken = _snapshot(moment, header)
    if output is not None:
        save_new(taken, output, "--output")
    if json:
        write_json(
            {
                "file": str(file),
                "stream": moment.info.name,
                "number": moment.info.stream,
                "seq": moment.seq,
                "model": taken.model,
                "fingerprint": taken.fingerprint,
                "origin": moment.origin,
                "origin_seq": moment.origin_seq,
                "replayed_frames": moment.replayed,
                "compared_frames": moment.compared,
                "state": plain(taken.state),
                "output": None if output is None else str(output),
            }
        )
        return
    leaves = ", ".join(f"{leaf.name} {leaf.dtype} {list(leaf.shape)}" for leaf in header.state_spec.leaves)
    several = f", the newest of {moment.openings} of this name," if moment.openings > 1 else ""
    about = f"stream {moment.info.stream} ({moment.info.name!r}){several} before frame {moment.seq}: {leaves}"
    results = [moment.in_words(), f"saved in {output}" if output is not None else ""]
    for line in [*folded(about), *state_lines(taken.state, header.state_spec)]:
        console.print(Text(line), soft_wrap=True, highlight=False)
    for line in folded("; ".join(filter(None, results))):
        console.print(Text(line, "bold green"), soft_wrap=True, highlight=False)


def _moment(file: Path, stream: str, seq: int | None, folder: Path | None) -> tuple[Moment, RecordingHeader]:
    with RecordingReader(file) as reader:
        return Past(reader, recorded_model(reader.header, folder), stream).before(seq), reader.header


def _snapshot(moment: Moment, header: RecordingHeader) -> StreamSnapshot:
    state = as_state(moment.state[None], header.state_spec, single=True)
    return StreamSnapshot(moment.info.name, moment.seq, state, header.model_fingerprint, header.model_name)


def open_stream(
    file: Path, stream: str, seq: int | None, folder: Path | None, name: str, target: Target, *, json: bool
) -> int:
    """Open a stream on a running server that continues from a recorded frame, and leave it parked.

    Returns:
        The exit status: 0; 2 on failure; 130 after Ctrl-C.

    Raises:
        RecordingError, CannotVerify: when the exact state cannot be computed.
    """
    moment, header = _moment(file, stream, seq, folder)
    opened = partial(_open, file, name, target, moment, _snapshot(moment, header))
    return run_command(opened, Terminal(json), drains=False)


async def _open(
    file: Path,
    name: str,
    target: Target,
    moment: Moment,
    taken: StreamSnapshot,
    terminal: Terminal,
    stop: Stop,
) -> Exit:
    async with leaving(target, "open", terminal, stop) as client:
        info = client.info
        try:
            taken.check(info)
        except InvalidInput as error:
            raise CommandProblem(f"{file}: {error}; name another model of the server with --model") from None
        stream = await restored(client, taken, name, "--open")
        about: dict[str, Any] = {
            "file": str(file),
            "of": moment.info.name,
            "from_seq": moment.seq,
            "origin": moment.origin,
            "origin_seq": moment.origin_seq,
            "replayed_frames": moment.replayed,
        }
        terminal.note(f"the state before frame {moment.seq}: {moment.in_words()}")
        tell_parked(terminal, f"{name!r} continues from {moment.info.name!r} in {file}", stream, info, about)
    return Exit.OK
