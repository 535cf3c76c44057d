"""The plan of a replay: recordings cut into blocks of frames, with times and the streams to open.

Streams are opened in cohorts, each of which is one group of the client. A plan is made before anything is sent; it
consists of numbers, and uses neither clock nor server.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from instep_client.protocol.wire import ServerInfo
from instep_tools.problems import CommandProblem
from instep_tools.sequences import F64, I64, RecordedSequences

Rows = npt.NDArray[np.intp]

COHORT_STREAMS: Final = 1024
"""The most streams opened together; more would not make the batches better."""

OPEN_TOGETHER_S: Final = 0.25
"""Streams that open within this time are opened together, at the time of the first."""


@dataclass(frozen=True, slots=True)
class Send:
    """One block: `steps` frames of each of some streams of a cohort."""

    due_s: float
    """The send time in seconds after the start; 0 for as soon as possible."""
    cohort: int
    rows: Rows
    """[N], indices of the streams in the cohort."""
    flat: I64
    """[steps, N], indices of the frames in `RecordedSequences.frames`."""
    last: bool
    """Whether it is the last block of its cohort, after which the streams may be closed."""


@dataclass(frozen=True)
class Plan:
    """All sends of a replay, in order."""

    sequences: RecordedSequences
    cohorts: tuple[Rows, ...]
    """The sequences that each cohort opens."""
    sends: Iterator[Send]
    """Sorted by `due_s`; a cohort is opened before its first send and closed after its last."""


def cuts(lengths: I64, max_frames: int) -> Iterator[tuple[I64, Rows]]:
    """Cut streams of different lengths into blocks in which every stream has every timestep.

    Args:
        lengths: [N], the number of frames of each stream.
        max_frames: the most frames in a block of more than one timestep.

    Yields:
        The timesteps of each block, [T], and the indices of its streams.
    """
    first, longest = 0, int(lengths.max())
    while first < longest:
        rows = np.flatnonzero(lengths > first)
        count = min(int(lengths[rows].min()) - first, max(1, max_frames // len(rows)))
        yield np.arange(first, first + count), rows
        first += count


def plan_waves(
    sequences: RecordedSequences, max_streams: int, max_block_frames: int, rate_hz: float = math.inf
) -> Plan:
    """Plan one cohort after another: as fast as possible in the largest blocks, or at a rate.

    Args:
        sequences: the sequences to send.
        max_streams: the most streams open at once.
        max_block_frames: the most frames in a block of more than one timestep.
        rate_hz: frames per second for each stream, in blocks of one timestep.
    """
    size = min(max_streams, COHORT_STREAMS)
    cohorts = tuple(np.arange(first, min(first + size, len(sequences))) for first in range(0, len(sequences), size))

    def sends() -> Iterator[Send]:
        begin = 0
        for cohort, members in enumerate(cohorts):
            starts, longest = sequences.starts[members], int(sequences.lengths[members].max())
            for steps, rows in cuts(sequences.lengths[members], max_block_frames):
                due_s, is_last = (begin + int(steps[0])) / rate_hz, int(steps[-1]) + 1 == longest
                yield Send(due_s, cohort, rows, starts[rows] + steps[:, None], is_last)
            begin += longest

    return Plan(sequences, cohorts, sends())


def plan_timed(sequences: RecordedSequences, speed: float) -> Plan:
    """Plan every frame at its recorded time, `speed` times as fast; equal times of a cohort share a block."""
    times_ns = sequences.times_ns
    if times_ns is None:
        raise ValueError("the sequences have no times")
    times_s: F64 = (times_ns - times_ns.min()) / 1e9
    cohorts = _opened_together(times_s[sequences.starts], OPEN_TOGETHER_S * speed)
    cohort_of = np.empty(len(sequences), np.intp)
    place_of = np.empty(len(sequences), np.intp)
    for cohort, members in enumerate(cohorts):
        cohort_of[members] = cohort
        place_of[members] = np.arange(len(members))
    sequence_of = np.repeat(np.arange(len(sequences)), sequences.lengths)
    left = [int(sequences.lengths[members].sum()) for members in cohorts]

    def sends() -> Iterator[Send]:
        for flat in _same_moment(times_s, sequence_of, cohort_of):
            cohort = int(cohort_of[sequence_of[flat[0]]])
            left[cohort] -= len(flat)
            rows = place_of[sequence_of[flat]]
            due_s = float(times_s[flat[0]]) / speed
            yield Send(due_s, cohort, rows, flat[None, :], left[cohort] == 0)

    return Plan(sequences, cohorts, sends())


def make_plan(
    sequences: RecordedSequences, speed: float | None, rate_hz: float | None, info: ServerInfo, file: Path
) -> Plan:
    """Make the plan of a replay.

    Args:
        sequences: the sequences to send.
        speed: the factor on real time; infinite for as fast as possible; None for real time if times are known, else
            infinite.
        rate_hz: frames per second for each stream, which replace the times of the frames.
        info: the server's limits.
        file: for error messages.

    Raises:
        CommandProblem: when times are needed and the file has none.
    """
    timed = rate_hz is not None or sequences.times_ns is not None
    if speed is not None and math.isfinite(speed) and not timed:
        raise CommandProblem(f"{file} does not know when its frames were sent: give --rate, or --speed max")
    speed = (1.0 if timed else math.inf) if speed is None else speed
    if math.isinf(speed):
        return plan_waves(sequences, info.max_streams, min(info.max_block_frames, info.credit_frames))
    if rate_hz is not None:
        return plan_waves(sequences, info.max_streams, 1, rate_hz * speed)
    return plan_timed(sequences, speed)


def check_fits(file: Path, sequences: RecordedSequences, info: ServerInfo) -> None:
    """Raise CommandProblem unless frames have as many values as the model expects."""
    if sequences.features == info.features:
        return
    is_of_another = sequences.model not in (None, info.model) and sequences.fingerprint not in (None, info.fingerprint)
    of = f" was recorded with the model {sequences.model!r} and" if is_of_another else ""
    cure = ""
    if is_of_another:
        cure = f"; connect to a server of {sequences.model!r}, by --endpoint or --model"
    elif sequences.features > info.features:
        cure = "; choose columns with --columns"
    raise CommandProblem(
        f"{file}{of} has {sequences.features} numbers a frame, the model {info.model!r} takes {info.features}{cure}"
    )


def distinct(names: Sequence[str]) -> list[str]:
    """Distinct names for streams that are open together: the second of a name is called NAME-2, and so on."""
    found: dict[str, None] = {}
    for name in names:
        new = next(each for number in count(1) if (each := name if number == 1 else f"{name}-{number}") not in found)
        found[new] = None
    return list(found)


def _opened_together(opened_s: F64, within_s: float) -> tuple[Rows, ...]:
    """The sequences in order of opening, split where a cohort is full or the next one opens too late for it."""
    order = np.argsort(opened_s, kind="stable")
    cohorts: list[Rows] = []
    first = 0
    while first < len(order):
        end = int(np.searchsorted(opened_s[order], opened_s[order[first]] + within_s, side="right"))
        end = min(end, first + COHORT_STREAMS)
        cohorts.append(order[first:end])
        first = end
    return tuple(cohorts)


def _same_moment(times_s: F64, sequence_of: Rows, cohort_of: Rows) -> Iterator[I64]:
    """Groups of flat indices in order of time, each for one time and cohort, with a stream at most once."""
    order = np.lexsort((np.arange(len(times_s)), cohort_of[sequence_of], times_s))
    cohorts = cohort_of[sequence_of[order]]
    changes = (np.diff(times_s[order]) != 0) | (np.diff(cohorts) != 0)
    for flat in np.split(order, np.flatnonzero(changes) + 1):
        while len(flat):  # frames of one stream with the same time follow each other
            _, once = np.unique(sequence_of[flat], return_index=True)
            once.sort()
            yield flat[once]
            flat = np.delete(flat, once)
