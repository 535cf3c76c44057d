"""Going on with a recording as an engine of a few lines would."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from instep.recording.records import RecordedEvent
from instep.recording.recovery import Recovered
from instep.recording.segments import Mark
from tests.support.scribe import F32, Step
from tests.support.states import floats_of

LAYERS, SIZE = 2, 4


@dataclass
class Replayed:
    """What the open streams are afterwards."""

    states: dict[int, F32] = field(default_factory=dict)
    seqs: dict[int, int] = field(default_factory=dict)
    unanswered: int = 0
    """Frames that were stepped again and had no outputs."""


def replay(recovered: Recovered, step: Step) -> Replayed:
    """Step again what has to be; states are [LAYERS, SIZE]."""
    zeros = np.zeros((LAYERS, SIZE), np.float32)
    found = Replayed()
    for stream in recovered.load(recovered.names):
        found.states[stream.stream] = zeros if stream.state is None else floats_of(stream.state[None], LAYERS, SIZE)[0]
        found.seqs[stream.stream] = stream.seq
    for segment in recovered.segments():
        frames, resets = segment.frames, list(segment.marks)
        for at in range(len(frames)):
            while resets and resets[0].position < frames.positions[at]:
                _reset(found, resets.pop(0))
            number = int(frames.streams[at])
            assert found.seqs[number] == frames.seqs[at]
            y, after = step(frames.x[at : at + 1], np.ascontiguousarray(found.states[number][:, None]))
            if not frames.answered[at]:
                found.unanswered += 1
            else:
                assert y[0].tobytes() == frames.y[at].tobytes()
            found.states[number] = np.ascontiguousarray(after[:, 0])
            found.seqs[number] += 1
        for mark in resets:
            _reset(found, mark)
    return found


def _reset(found: Replayed, mark: Mark) -> None:
    assert isinstance(mark, RecordedEvent)
    assert mark.stream is not None
    assert found.seqs[mark.stream] == mark.seq
    zeros = np.zeros((LAYERS, SIZE), np.float32)
    found.states[mark.stream] = zeros if mark.state is None else floats_of(mark.state[None], LAYERS, SIZE)[0]
