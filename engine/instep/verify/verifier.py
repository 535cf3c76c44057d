"""Verification: replay a whole recording with three checkers and compare with what was served.

1. **Stepped**: frame by frame in the engine's buckets, from the recorded initial state, streams side by side.
2. **Whole sequence**: one call over all frames of a stream, as in the first experiment, by the network as it is served.
   (A sequence too long for memory goes in several calls, the state carried.) A kind of model may have no such call.
3. **float64 reference**: written independently, from the original weights; it bounds the true error (see `bound`). That
   of a graph is the served graph in float64, which bounds what rounding does, and the report says so. A kind may have
   none: then equal bits decide, and where bits need not be equal and are too far apart, the stream is not checked.

This machine is certified first. Bits must be equal in 1 and 2 where the engine had certified that they are and this
machine certifies the same; otherwise they must be within twice the bound, since each side may be off by one. In 3, they
must always be within the bound. Where frames or states are too large for the bound to mean anything (see `bound`),
equal bits are enough, and the report names the first such frame; where bits need not be equal either, the stream counts
as not checked.

Final states and those of checkpoints are compared in 1 and 3. Every frame of a stream must be there, once and
in order, and so must every state of a checkpoint. A stream is checked anew from every reset of its state. Frames
whose outputs were not recorded, because the engine was killed while it computed them, are replayed but not compared.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import groupby, islice
from operator import attrgetter
from threading import Event
from typing import Final, Literal, TypeAlias

import numpy as np

from instep.core.typing import I64
from instep.models.base import RecurrentModel, Reference
from instep.models.model import Model
from instep.models.numerics import threads_as_here
from instep.recording.inspection import how_it_ends, where_it_begins
from instep.recording.reader import RecordingReader
from instep.recording.schema import RecordingHeader
from instep.runtime.executor import usable_cores
from instep.verify.checkers import CHECK_LIMITS, Checkers, CheckLimits
from instep.verify.checkpoints import StoredCheckpoints
from instep.verify.chunk_check import ChunkCheck
from instep.verify.chunks import Chunk, plan_chunks
from instep.verify.conditions import Conditions, find_conditions, recorded_network, recorded_threads
from instep.verify.report import Checker, ReferenceKind, Report, StreamReport, join_reports
from instep.verify.stream_checks import StreamChecks

Stage: TypeAlias = Literal["reading", "replaying"]
STAGES: Final[tuple[Stage, ...]] = ("reading", "replaying")
Progress: TypeAlias = Callable[[Stage, float], None]
"""Called with the stage and the share (0 to 1) of it that is done."""
Certify: TypeAlias = Callable[[Sequence[RecordingHeader], RecurrentModel], Conditions]

MOST_THREADS: Final = 4
"""More threads, even on more cores, would only take their caches from each other."""
AHEAD: Final = 2
"""Chunks that are computed or queued while the one before them is finished."""
LEAST_SHARE: Final = 64
"""Streams are shared out among threads, but a chunk of fewer than this would cost more than it gains."""


def verify(
    reader: RecordingReader,
    model: Model,
    wanted: Sequence[str],
    on_progress: Progress,
    certify: Certify = find_conditions,
    limits: CheckLimits = CHECK_LIMITS,
) -> Report:
    """Check every stream of a recording, or those of some names or numbers.

    Args:
        reader: the recording, just opened.
        model: the recorded model; the caller compares it with the one that the header names.
        wanted: names and numbers; none for all streams.
        on_progress: see `Progress`.
        certify: finds out whether bits must be equal on this machine.
        limits: of what is computed at once.

    Raises:
        CannotVerify: when there is nothing to check.
        RecordingError: when the recording is damaged.
        NoSuchStream: when it has no such stream.
    """
    began = time.monotonic()
    stopped = Event()
    with (
        recorded_threads(reader.header),
        ThreadPoolExecutor(_threads(), "instep-verify", threads_as_here()) as pool,
    ):
        try:
            checkpoints = StoredCheckpoints(reader)
            reader.check_positions()
            headers = [engine.header for engine in reader.engines]
            made = pool.submit(make_checkers, model, headers, certify, stopped, limits)  # while it is read
            initial = model.state.initial(1)[0]
            streams = StreamChecks(reader, wanted, checkpoints, initial, lambda share: on_progress("reading", share))
            streams.require_outputs(wanted)
            checkers = made.result()
            parts, elements = _check(checkers, streams, pool, lambda share: on_progress("replaying", share))
        finally:
            stopped.set()
    conditions = checkers.conditions
    return Report(
        file=reader.path,
        model_name=model.name,
        fingerprint=model.fingerprint,
        streams=tuple(join_reports(list(of_stream)) for _, of_stream in groupby(parts, key=attrgetter("stream"))),
        ending=how_it_ends(reader),
        finished=reader.finished,
        trimmed=where_it_begins(reader),
        notes=(*conditions.step_notes, *conditions.whole_notes),
        buckets=conditions.buckets,
        seconds=time.monotonic() - began,
        elements=elements,
        whole_sequence=conditions.has_whole,
        reference=_kind_of(checkers.truth),
    )


def make_checkers(
    model: Model,
    headers: Sequence[RecordingHeader],
    certify: Certify,
    stopped: Event,
    limits: CheckLimits = CHECK_LIMITS,
) -> Checkers:
    """Build the network, and certify it for recordings of these engines; the first one names the device."""
    network = recorded_network(model, headers[0])
    conditions = certify(headers, network)
    references = network.reference(np.float64), network.reference(np.float32)
    truth, rounded = references if None not in references else (None, None)
    return Checkers(network, truth, rounded, conditions, stopped, limits)


def _kind_of(truth: Reference | None) -> ReferenceKind:
    return "none" if truth is None else "independent" if truth.independent else "same graph"


def _check(
    checkers: Checkers, streams: StreamChecks, pool: Executor, on_progress: Callable[[float], None]
) -> tuple[list[StreamReport], dict[Checker, int]]:
    """The report on every check, in order, and how many elements each of the two replays compared."""
    reports: dict[int, StreamReport] = {
        at: check.report_without_frames() for at, check in enumerate(streams.checks) if not check.frames
    }
    elements: dict[Checker, int] = {"stepped": 0, "whole sequence": 0}
    chunks = _chunks(checkers, streams)
    total, done = sum(check.frames for check in streams.checks), 0
    begun: deque[tuple[Chunk, ChunkCheck]] = deque()
    while True:
        for chunk in islice(chunks, AHEAD + 1 - len(begun)):
            checks = [streams.checks[row] for row in chunk.rows.tolist()]
            begun.append((chunk, ChunkCheck(checkers, chunk, checks, pool)))
        if not begun:
            return [reports[at] for at in range(len(streams.checks))], elements
        chunk, check = begun.popleft()
        reports.update(zip(chunk.rows.tolist(), check.finish(), strict=True))
        for comparison in (check.stepped, check.whole):
            elements[comparison.checker] += comparison.elements
        done += int(chunk.lengths.sum())
        on_progress(done / total)


def _chunks(checkers: Checkers, streams: StreamChecks) -> Iterator[Chunk]:
    """All frames once, in bounded pieces."""
    sequences, buckets = streams.sequences, checkers.conditions.buckets
    if sequences is not None:
        in_between = 3 * checkers.network.state.row_bytes // 4  # more than the gates of recurrent layers
        widest = max(sequences.x.shape[1], sequences.y.shape[1], in_between)
        most_frames = max(checkers.limits.call_bytes // (8 * widest), 1)
        first_seqs: I64 = np.array([check.first_seq for check in streams.checks], np.int64)
        share = max(len(first_seqs) // _threads(), LEAST_SHARE)
        for rows in plan_chunks(sequences.lengths, min(buckets[-1], share), buckets[0]):
            yield Chunk(sequences, first_seqs, rows, most_frames)


def _threads() -> int:
    return min(usable_cores(), MOST_THREADS)
