"""Verification: replay whole recordings in three ways and compare with what was served.

1. **Stepped**: frame by frame in a certified bucket, from the recorded initial state. Streams are replayed side by
   side: rows are certified to be independent of each other.
2. **Whole sequence**: one call over all frames of a stream, as in the first experiment; the network as it is served.
   (A sequence too long for memory goes in several calls, the state carried.)
3. **float64 reference**: written independently, from the original weights; it bounds the true error (see `bound`).

Bits must be equal in 1 and 2 where the engine had certified that they are and this machine computes as the engine's
did; otherwise they must be within twice the bound, since each side may be off by one. Being within the bound of the
reference is required always. Final states are compared in 1 and 3. Every frame of a stream must be there, once and in
order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Final, Literal, TypeAlias

import numpy as np

from instep.core.typing import I64
from instep.model.folder import Model
from instep.model.network import Network
from instep.recording.reader import RecordingReader
from instep.recording.sequences import SequenceIndex
from instep.verify.check import ChunkCheck, Suspect, Ways, check_without_frames
from instep.verify.chunks import Chunk, plan_chunks
from instep.verify.conditions import device_for, find_conditions, recorded_threads
from instep.verify.errors import CannotVerify
from instep.verify.reference import Reference
from instep.verify.report import ULP_BINS, Report, StreamReport, Way
from instep.verify.select import select_streams

Stage: TypeAlias = Literal["reading", "replaying"]
STAGES: Final[tuple[Stage, ...]] = ("reading", "replaying")
Progress: TypeAlias = Callable[[Stage, float], None]
"""Called with what is being done and the share (0 to 1) of it that is done."""

CHUNK_BYTES: Final = 64 * 2**20
"""The largest array computed at once, about."""


def verify(reader: RecordingReader, model: Model, stream: str | None, on_progress: Progress) -> Report:
    """Check every stream of a recording, or those of one name or number.

    Args:
        reader: the recording.
        model: what it should be an output of; whether it is the one that the header names is the caller's to check.
        stream: a name, a number, or None.
        on_progress: see `Progress`.

    Raises:
        CannotVerify: when there is nothing to check.
        RecordingError: when the recording is damaged.
    """
    with recorded_threads(reader.header):
        return _Verification(reader, model, stream, on_progress).run()


class _Verification:
    def __init__(self, reader: RecordingReader, model: Model, stream: str | None, on_progress: Progress) -> None:
        self._began = time.monotonic()
        self._reader = reader
        self._model = model
        self._on_progress = on_progress
        reader.check_positions()
        self._index = SequenceIndex(reader, lambda share: on_progress("reading", share))
        if not self._index.frames_present:
            raise CannotVerify(f"{reader.path} holds no frames: nothing was recorded, so nothing can be verified")
        self._rows = select_streams(self._index.streams, stream)
        if not self._index.frames[self._rows].any() and self._index.defects.keys().isdisjoint(self._rows.tolist()):
            raise CannotVerify(f"stream {stream!r} has no frames: there is nothing to verify in it")
        header = reader.header
        self._widest = max(header.features, header.outputs, 3 * header.state_size)
        self._ulps: dict[Way, I64] = {
            "stepped": np.zeros(ULP_BINS, np.int64),
            "whole sequence": np.zeros(ULP_BINS, np.int64),
        }

    def run(self) -> Report:
        ways = self._ways()
        reports: dict[int, StreamReport] = {}
        total, done = int(self._index.frames[self._rows].sum()), 0
        with ThreadPoolExecutor(4, "instep-verify") as pool:
            for chunk in self._chunks(ways.conditions.buckets):
                for row, report in zip(chunk.rows.tolist(), self._check(ways, chunk, pool), strict=True):
                    reports[row] = report
                    done += report.frames
                self._on_progress("replaying", done / total)
        return Report(
            file=self._reader.path,
            model_name=self._model.name,
            fingerprint=self._model.fingerprint,
            streams=tuple(
                reports[row] if row in reports else check_without_frames(self._suspect(row))
                for row in self._rows.tolist()
            ),
            finished=self._reader.finished,
            notes=(*ways.conditions.step_notes, *ways.conditions.whole_notes),
            buckets=ways.conditions.buckets,
            ulps=self._ulps,
            seconds=time.monotonic() - self._began,
        )

    def _ways(self) -> Ways:
        device = device_for(self._reader.header)
        network = Network(self._model, device)
        description = self._model.description.model_dump(mode="json")
        weights = {name: tensor.numpy() for name, tensor in self._model.weights.items()}
        return Ways(
            stepped=network,
            whole=Network(self._model, device),
            truth=Reference(description, weights, np.float64),
            rounded=Reference(description, weights, np.float32),
            conditions=find_conditions(self._reader.header, network),
        )

    def _chunks(self, buckets: tuple[int, ...]) -> Iterator[Chunk]:
        """All frames once, in bounded pieces."""
        most_frames = max(CHUNK_BYTES // (8 * self._widest), 1)
        sequences, lengths = self._index.load(self._rows), self._index.frames[self._rows]
        for members in plan_chunks(lengths, buckets[-1], buckets[0], most_frames):
            yield Chunk(sequences, members, most_frames)

    def _check(self, ways: Ways, chunk: Chunk, pool: Executor) -> list[StreamReport]:
        check = ChunkCheck(ways, chunk, [self._suspect(row) for row in chunk.rows.tolist()], pool)
        reports = check.run()
        for comparison in (check.stepped, check.whole):
            self._ulps[comparison.way] += comparison.ulps
        return reports

    def _suspect(self, row: int) -> Suspect:
        return Suspect(self._index.streams[row], self._index.defects.get(row))
