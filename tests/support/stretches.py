"""What a recording holds of each stream, from one known state to the next."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from instep.core.typing import F32, U8
from instep.recording.reader import RecordingReader
from instep.recording.segments import Opened, segments
from instep.replay.replay import NoStates, Replay


@dataclass
class Stretch:
    stream: int
    name: str
    first_seq: int
    initial_state: U8 | None
    x: F32
    y: F32
    """Of the frames that have outputs, which come first."""


def stretches_of(path: Path) -> list[Stretch]:
    """All frames, those of one stream in order; nothing is missing."""
    with RecordingReader(path) as reader:
        replay = Replay(NoStates(reader.header.state_spec), reader, ignore_until=reader.trimmed_until)
        names, states = dict[int, str](), dict[int, U8 | None]()
        for info in reader.streams() if reader.trimmed.position else ():
            if info.opened_position <= reader.trimmed.position:
                replay.add(info.stream, info.first_seq, info.initial_state)
                names[info.stream], states[info.stream] = info.name, info.initial_state
        (segment,) = segments(reader, segment_bytes=2**40)
    names |= {mark.stream: mark.name for mark in segment.marks if isinstance(mark, Opened)}
    stretches = replay.plan(segment)
    assert not stretches.defects
    found = []
    for at, stream in enumerate(stretches.streams.tolist()):
        own = stretches.order[stretches.starts[at] :][: stretches.lengths[at]]
        answered = own[: int(segment.frames.answered[own].sum())]
        state = stretches.given.get(at, states.get(stream))
        frames = (segment.frames.x[own], segment.frames.y[answered])
        found.append(Stretch(stream, names[stream], int(stretches.first_seqs[at]), state, *frames))
    return found
