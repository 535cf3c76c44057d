"""What going on with a recording costs, and that it does not grow with the recording's age."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
from instep.server.recovery import go_on

from instep.recording.writer import RecordingWriter
from tests.support.rows import open_stream
from tests.support.story import FEATURES, new_engine, story_header

MANY = 20_000_000
"""Streams that opened in the life of a recording, of which three are left."""
NUMBERS = [MANY, 7, MANY - 5]


def test_memory_is_for_the_streams_that_are_there_and_not_for_all_that_ever_were(tmp_path: Path) -> None:
    path, header = tmp_path / "r.instep", story_header()
    writer = RecordingWriter.create(path, header)
    for number in NUMBERS:
        open_stream(writer, number, f"s{number}", 1000, 0, 1, None)
    for seq, streams in enumerate(([7, MANY - 5, MANY], [MANY, 7])):
        count = len(streams)
        x = np.full((count, FEATURES), seq + 1, np.float32)
        writer.add_inputs(1, header.buckets[0], np.array(streams, np.uint32), np.full(count, seq, np.uint64), x)
    writer.commit()
    writer.abandon()
    engine = new_engine()
    tracemalloc.start()
    writer, recovery = go_on(path, story_header(), *engine, accept_numerics_change=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    writer.abandon()
    assert peak < MANY, "a byte for each"
    assert (recovery.streams, recovery.frames, recovery.last_stream) == (3, 5, MANY)
    table, _, _ = engine
    seqs = {name: int(table.step_seq[table.find(name)]) for name in (f"s{number}" for number in NUMBERS)}
    assert seqs == {f"s{MANY}": 2, "s7": 2, f"s{MANY - 5}": 1}
