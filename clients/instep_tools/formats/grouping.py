"""Rows of a table as sequences: by stream, in order, cut where a state was set."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from instep_client.protocol.state_spec import StateSpec
from instep_client.protocol.wire import F32
from instep_client.states import State, as_state
from instep_tools.formats.table import TableHeader
from instep_tools.problems import BadFile
from instep_tools.sequences import I64, RecordedSequences
from instep_tools.words import counted


def sequences_of(
    path: Path,
    names: Sequence[str],
    stream_ids: Sequence[int] | None,
    seqs: I64 | None,
    times_ns: I64 | None,
    x: F32,
    y: F32 | None,
    header: TableHeader,
) -> RecordedSequences:
    """The rows of a table as sequences, one for each opening of a stream and each reset of its state.

    Frames whose outputs are all NaN have none.

    Raises:
        BadFile: when a frame of a stream is missing, or is there twice.
    """
    index: dict[tuple[str, int], int] = {}
    ids = [0] * len(names) if stream_ids is None else stream_ids
    codes = np.array([index.setdefault(key, len(index)) for key in zip(names, ids, strict=True)], np.int64)
    y = None if y is None or not y.shape[1] else y
    answered = None if y is None else np.asarray(~np.isnan(y).all(axis=1))
    return grouped(path, list(index), codes, seqs, times_ns, x, y, answered, header)[0]


def grouped(
    path: Path,
    streams: Sequence[tuple[str, int]],
    codes: I64,
    seqs: I64 | None,
    times_ns: I64 | None,
    x: F32,
    y: F32 | None,
    answered: npt.NDArray[np.bool_] | None,
    header: TableHeader,
) -> tuple[RecordedSequences, list[tuple[int, int]]]:
    """As `sequences_of`, with the number of each one's stream and the seq of its first frame.

    `streams` are names and numbers; `codes`, [N], says which of them each row is of, and `answered`, [N], whether it
    has an output, None for all.
    """
    order = np.argsort(codes, kind="stable") if seqs is None else np.lexsort((seqs, codes))
    counts = np.bincount(codes, minlength=len(streams))
    starts = np.cumsum(counts) - counts
    firsts = np.zeros(len(streams), np.int64) if seqs is None else seqs[order[starts]]
    if seqs is not None:
        _check_seqs(path, streams, codes[order], seqs[order], firsts[codes[order]] - starts[codes[order]])
    given = {(state.stream_id, state.seq): state.row for state in header.states}
    begins_of: dict[int, list[int]] = defaultdict(list)
    for stream_id, seq in sorted(given):
        begins_of[stream_id].append(seq)
    found: list[str] = []
    keys: list[tuple[int, int]] = []
    lengths: list[int] = []
    initial: dict[int, State] = {}
    known = np.ones(len(codes), np.bool_)
    for (name, stream_id), start, count, first in zip(streams, starts, counts, firsts.tolist(), strict=True):
        begins = [first, *(seq for seq in begins_of[stream_id] if first < seq < first + count)]
        for begin, end in pairwise([*begins, first + int(count)]):
            row = given.get((stream_id, begin))
            if row is not None and header.spec is not None:
                initial[len(found)] = _state(path, row, header.spec)
            elif begin > 0 and (stream_id, begin) not in given:
                known[start + begin - first : start + end - first] = False
            found.append(name)
            keys.append((stream_id, begin))
            lengths.append(end - begin)
    comparable = known if answered is None else known & answered[order]
    unknown = len(np.unique(codes[order][~known]))
    sequences = RecordedSequences(
        names=tuple(found),
        lengths=np.array(lengths, np.int64),
        frames=x[order],
        outputs=None if y is None else y[order],
        answered=None if comparable.all() else comparable,
        times_ns=None if times_ns is None else times_ns[order],
        initial_states=initial,
        fingerprint=header.about.get("fingerprint"),
        model=header.about.get("model"),
        notes=_notes(unknown),
    )
    return sequences, keys


def _notes(unknown: int) -> tuple[str, ...]:
    if not unknown:
        return ()
    begin = "begins" if unknown == 1 else "begin"
    return (
        f"{counted(unknown, 'stream')} {begin} after the first frame, and the file does not hold the state there: "
        "the outputs cannot be compared",
    )


def _check_seqs(path: Path, streams: Sequence[tuple[str, int]], codes: I64, seqs: I64, offsets: I64) -> None:
    wrong = np.flatnonzero(seqs != offsets + np.arange(len(seqs)))
    if len(wrong):
        at = int(wrong[0])
        name, expected = streams[codes[at]][0], int(offsets[at]) + at
        raise BadFile(
            f"{path}: stream {name!r} has frame {seqs[at]} where frame {expected} belongs: a stream must hold all its "
            "frames to be sent again"
        )


def _state(path: Path, row: bytes, spec: StateSpec) -> State:
    if len(row) != spec.row_bytes:
        raise BadFile(f"{path} is damaged: a state has {len(row)} bytes instead of {spec.row_bytes}")
    return as_state(np.frombuffer(row, np.uint8).reshape(1, -1), spec, single=True)
