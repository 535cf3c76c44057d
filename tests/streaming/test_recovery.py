"""What continuing a recording costs, and what makes it impossible."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from instep.recording.errors import RecordingError
from instep.recording.reader import RecordingReader
from instep.recording.writer import RecordingWriter
from instep.server.recordings import recording_header
from tests.support.models import SMALL
from tests.support.rows import open_stream
from tests.support.running import config, prepared
from tests.support.streaming import InlineExecutor, random_frames, step, streaming

F = 5
MANY = 20_000_000
"""Streams that were opened in the life of a recording, of which three are left."""
NUMBERS = [MANY, 7, MANY - 5]


async def test_memory_is_for_the_streams_that_are_open_and_not_for_all_that_ever_were(tmp_path: Path) -> None:
    path = tmp_path / "r.instep"
    writer = RecordingWriter.create(path, recording_header(prepared(SMALL), config(recording={"file": path})))
    for number in NUMBERS:
        open_stream(writer, number, f"s{number}", 1000, 0, 1, None)
    for seq, streams in enumerate(([7, MANY - 5, MANY], [MANY, 7])):
        count = len(streams)
        x = np.full((count, F), seq + 1, np.float32)
        writer.add_inputs(1, np.array(streams, np.uint32), np.full(count, seq, np.uint64), x)
    writer.commit()
    writer.abandon()
    async with streaming(InlineExecutor) as kit:
        tracemalloc.start()
        recovery = kit.record(path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < MANY, "a byte for each"
        assert recovery is not None
        assert (recovery.streams, recovery.frames, recovery.last_stream) == (3, 5, MANY)
        read = await kit.frontend.ask(lambda: kit.operations.read_states([f"s{number}" for number in NUMBERS]))
        assert read.next_seqs.tolist() == [2, 2, 1]


async def test_more_streams_than_fit_are_refused_with_what_to_do(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "r.instep"
    async with streaming(InlineExecutor) as kit:
        kit.record(path)
        origin = kit.frontend.connect()
        handles = (await origin.open(list("abcd"))).handles
        await step(origin, handles, [0] * 4, random_frames(rng, 1, 4))
    async with streaming(InlineExecutor, max_streams=3) as kit:
        with pytest.raises(RecordingError, match=r"engine\.max_streams = 3"):
            kit.record(path)
    async with streaming(InlineExecutor) as kit:
        recovery = kit.record(path)
        assert recovery is not None, "the attempt has left it as it was"
        assert recovery.streams == 4


async def test_outputs_must_have_the_recorded_bits_only_where_every_engine_promises_them(tmp_path: Path) -> None:
    path = tmp_path / "r.instep"
    promised = recording_header(prepared(SMALL), config(recording={"file": path}))
    writer = RecordingWriter.create(path, replace(promised, arithmetic="torch 1.9 on cuda:0"))
    open_stream(writer, 1, "s", 1000, 0, 1, None)
    numbers, seqs, x = np.array([1], np.uint32), np.array([0], np.uint64), np.ones((1, F), np.float32)
    position = writer.add_inputs(1, numbers, seqs, x)
    writer.add_outputs(1, position, np.full((1, 8), 0.25, np.float32))
    writer.commit()
    writer.abandon()
    epochs = np.array([1000], np.uint64)
    for _ in range(2):  # the second time after an engine that promised them, and ended before it had a checkpoint
        async with streaming(InlineExecutor) as kit:
            recovery = kit.record(path)
            assert recovery is not None
            assert recovery.frames == 1
            origin = kit.frontend.connect()
            resumed = await origin.resume(["s"], np.array([0], np.uint64), epochs)
            epochs = resumed.epochs
            again = await step(origin, resumed.handles, [0], x[None])
            assert again.y.tolist() == [[[0.25] * 8]], "a frame that is repeated gets what was answered"
            assert kit.stats.frames_total == 0
    with RecordingReader(path) as reader:
        assert [engine.header.arithmetic for engine in reader.engines] == ["torch 1.9 on cuda:0", "portable-1"]
