"""Going on with a recording as an engine of a few lines would."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from instep.recording.records import StateReset
from instep.recording.recovery import Recovered
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
    for item in recovered.replay():
        if isinstance(item, StateReset):
            assert found.seqs[item.stream] == item.seq
            found.states[item.stream] = zeros if item.state is None else floats_of(item.state[None], LAYERS, SIZE)[0]
            continue
        batch = item.batch
        h = np.zeros((LAYERS, len(batch.x), SIZE), np.float32)
        applied = np.flatnonzero(item.applies).tolist()
        for row in applied:
            h[:, row] = found.states[int(batch.streams[row])]
        y, after = step(batch.x, h)
        for row in applied:
            stream_id = int(batch.streams[row])
            assert found.seqs[stream_id] == batch.seqs[row]
            if batch.y is None:
                found.unanswered += 1
            else:
                assert y[row].tobytes() == batch.y[row].tobytes()
            found.states[stream_id] = np.ascontiguousarray(after[:, row])
            found.seqs[stream_id] += 1
    return found
