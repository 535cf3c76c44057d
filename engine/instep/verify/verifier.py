"""Verification: replay whole recordings in three ways and compare with what was served.

1. **Stepped**: frame by frame in buckets of the engine's, from the recorded initial state, streams side by side.
2. **Whole sequence**: one call over all frames of a stream, as in the first experiment; the network as it is served.
   (A sequence too long for memory goes in several calls, the state carried.)
3. **float64 reference**: written independently, from the original weights; it bounds the true error (see `bound`).

Bits must be equal in 1 and 2 where the engine had certified that they are and this machine is certified to do the same;
otherwise they must be within twice the bound, since each side may be off by one. A machine that looks like the one that
recorded is presumed to do the same, since bits that are equal need no certificate. With the first that is not, the
presumption ends: the machine is certified, and the file checked again from its beginning. Being within the bound of the
reference is required always. Final states are compared in 1 and 3. Every frame of a stream must be there, once and in
order. Where a stream's state was reset, it is checked from there as one of its own. Frames whose outputs were not
recorded, because the engine was killed as it computed them, are replayed but not compared.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import Final, Literal, TypeAlias

import numpy as np

from instep.core.typing import I64
from instep.models.gru.network import GruNetwork
from instep.models.model import Model
from instep.models.numerics import threads_as_here
from instep.recording.reader import RecordingReader
from instep.recording.schema import RecordingHeader
from instep.recording.select import find_streams, select_streams
from instep.recording.sequences import SequenceIndex
from instep.runtime.cores import usable_cores
from instep.verify.check import ChunkCheck
from instep.verify.chunks import Chunk, plan_chunks
from instep.verify.conditions import Conditions, device_for, find_conditions, presume_conditions, recorded_threads
from instep.verify.errors import CannotVerify, Refuted
from instep.verify.networks import Networks
from instep.verify.report import ULP_BINS, Report, StreamReport, Way, joined
from instep.verify.suspects import Suspect, check_without_frames
from instep.verify.ways import Ways

Stage: TypeAlias = Literal["reading", "replaying"]
STAGES: Final[tuple[Stage, ...]] = ("reading", "replaying")
Progress: TypeAlias = Callable[[Stage, float], None]
"""Called with what is being done and the share (0 to 1) of it that is done."""

MOST_AT_ONCE: Final = 4
"""Threads that compute at most. More than there are cores would only take their caches from each other."""
AHEAD: Final = 2
"""Chunks that are computed or wait for it beside the one that is to be finished next."""
LEAST_SHARE: Final = 64
"""Streams are shared out among threads down to so many a chunk: fewer would cost more than they gain."""
CALL_BYTES: Final = 96 * 2**20
"""What the gates of whole sequences in one call would take in float64, about; they are in float32. Every thread may be
at such a call."""


def verify(
    reader: RecordingReader,
    model: Model,
    wanted: Sequence[str],
    on_progress: Progress,
) -> Report:
    """Check every stream of a recording, or those of some names or numbers.

    Args:
        reader: the recording.
        model: what it should be an output of; whether it is the one that the header names is the caller's to check.
        wanted: names and numbers; none for all streams.
        on_progress: see `Progress`.

    Raises:
        CannotVerify: when there is nothing to check.
        RecordingError: when the recording is damaged.
        NoSuchStream: when it is not, but has no such stream.
    """
    with (
        recorded_threads(reader.header),
        ThreadPoolExecutor(_threads(), "instep-verify", threads_as_here()) as pool,
    ):
        reader.check_positions()
        reader.check_states()
        headers = [engine.header for engine in reader.engines]
        # The networks are made while the recording is read.
        presumed = pool.submit(_ways, model, headers, presume_conditions)
        verification = _Verification(reader, model, wanted, on_progress)
        ways = presumed.result()
        try:
            return verification.run(ways, pool)
        except Refuted:
            pass  # and go on outside, where nothing holds on to what was computed
        on_progress("replaying", 0)
        return verification.run(_ways(model, headers, find_conditions), pool)


class _Verification:
    def __init__(self, reader: RecordingReader, model: Model, wanted: Sequence[str], on_progress: Progress) -> None:
        self._began = time.monotonic()
        self._reader = reader
        self._model = model
        self._on_progress = on_progress
        self._index = SequenceIndex(
            reader, lambda share: on_progress("reading", share), lambda streams: find_streams(streams, wanted)
        )
        if not self._index.frames_present:
            raise CannotVerify(f"{reader.path} holds no frames: nothing was recorded, so nothing can be verified")
        select_streams(self._index.streams, wanted)
        chosen = set(self._index.kept.tolist())
        self._of_stream: dict[int, list[int]] = {row: [] for row in chosen}
        for at, stretch in enumerate(self._index.stretches):
            if stretch.row in chosen:
                self._of_stream[stretch.row].append(at)
        self._stretches: I64 = np.array(sorted(at for of in self._of_stream.values() for at in of), np.int64)
        compared = self._index.frames[self._stretches] > self._index.unanswered[self._stretches]
        if not compared.any() and self._index.defects.keys().isdisjoint(chosen):
            who = f"stream {wanted[0]!r} has no" if len(wanted) == 1 else f"none of the {len(wanted)} streams has"
            raise CannotVerify(
                f"{who if wanted else 'the recording has no'} frames with outputs: there is nothing to verify"
            )
        if self._index.frames[self._stretches].any():
            self._sequences = self._index.sequences(self._stretches)
        header = reader.header
        self._widest = max(header.features, header.outputs, 3 * header.state_size)

    def run(self, ways: Ways, pool: Executor) -> Report:
        parts: dict[int, StreamReport] = {}
        ulps: dict[Way, I64] = {way: np.zeros(ULP_BINS, np.int64) for way in ("stepped", "whole sequence")}
        total, done = int(self._index.frames[self._stretches].sum()), 0
        chunks = self._chunks(ways.conditions.buckets) if total else iter(())
        with closing(self._checks(ways, chunks, pool)) as checks:
            for chunk, check in checks:
                parts.update(zip(chunk.rows.tolist(), check.finish(), strict=True))
                for comparison in (check.stepped, check.whole):
                    ulps[comparison.way] += comparison.ulps
                done += int(chunk.lengths.sum())
                self._on_progress("replaying", done / total)
        for at in self._stretches.tolist():
            if at not in parts:
                parts[at] = check_without_frames(self._suspect(at))
        return Report(
            file=self._reader.path,
            model_name=self._model.name,
            fingerprint=self._model.fingerprint,
            streams=tuple(joined([parts[at] for at in self._of_stream[row]]) for row in self._index.kept.tolist()),
            finished=self._reader.finished,
            notes=(*ways.conditions.step_notes, *ways.conditions.whole_notes),
            buckets=ways.conditions.buckets,
            ulps=ulps,
            seconds=time.monotonic() - self._began,
        )

    def _chunks(self, buckets: tuple[int, ...]) -> Iterator[Chunk]:
        """All frames once, in bounded pieces."""
        most_frames = max(CALL_BYTES // (8 * self._widest), 1)
        lengths = self._index.frames[self._stretches]
        first_seqs: I64 = np.array([stretch.first_seq for stretch in self._index.stretches], np.int64)
        share = max(len(lengths) // _threads(), LEAST_SHARE)
        for members in plan_chunks(lengths, min(buckets[-1], share), buckets[0]):
            yield Chunk(self._sequences, first_seqs, members, most_frames)

    def _checks(
        self, ways: Ways, chunks: Iterator[Chunk], pool: Executor
    ) -> Generator[tuple[Chunk, ChunkCheck], None, None]:
        """Each chunk to finish, in order, some of those after it begun."""
        begun: deque[tuple[Chunk, ChunkCheck]] = deque()
        at_least = True
        try:
            while True:
                for chunk in islice(chunks, AHEAD + 1 - len(begun)):
                    suspects = [self._suspect(row) for row in chunk.rows.tolist()]
                    begun.append((chunk, ChunkCheck(ways, chunk, suspects, pool, at_least=at_least)))
                if not begun:
                    break
                yield begun[0]
                _, finished = begun.popleft()
                # A network whose errors grow in some streams does so in others.
                at_least = at_least and not finished.needed_bound
        finally:
            for _, check in begun:
                check.stop()

    def _suspect(self, at: int) -> Suspect:
        stretch = self._index.stretches[at]
        # What is wrong with a stream is wrong where its frames end.
        is_last = at == self._of_stream[stretch.row][-1]
        defect = self._index.defects.get(stretch.row) if is_last else None
        info, unanswered = self._index.streams[stretch.row], int(self._index.unanswered[at])
        return Suspect(info, stretch, unanswered, defect)


def _threads() -> int:
    return min(usable_cores(), MOST_AT_ONCE)


def _ways(
    model: Model, headers: list[RecordingHeader], find: Callable[[Sequence[RecordingHeader], GruNetwork], Conditions]
) -> Ways:
    device = device_for(headers[0])
    network = GruNetwork(model, device)
    conditions = find(headers, network)
    return Ways(
        networks=Networks([network] * _threads()),
        truth=network.reference(np.float64),
        rounded=network.reference(np.float32),
        conditions=conditions,
    )
