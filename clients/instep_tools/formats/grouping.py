"""Groups rows of a table into sequences by stream, in order, split where a state was set."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from instep_client.protocol.wire import F32
from instep_client.states import State, as_state
from instep_tools.formats.columns import Roles, unit_ns
from instep_tools.formats.table import TableHeader
from instep_tools.problems import BadFile
from instep_tools.sequences import I64, RecordedSequences

Columns: TypeAlias = Mapping[str, npt.NDArray[Any]]
"""The columns of a table by name, each [rows]."""
CHOOSE: Final = "choose the frame's columns with --columns, and give --named if the first column names the stream"


def sequences_of(path: Path, columns: Columns, roles: Roles, header: TableHeader) -> RecordedSequences:
    """The rows as sequences: one for each opening of a stream and each reset of its state.

    A frame whose outputs are all NaN counts as one without outputs.

    Raises:
        BadFile: if a column has invalid values, or a frame of a stream is missing or repeated.
    """
    lengths_found = {len(column) for column in columns.values()}
    if len(lengths_found) > 1:
        raise BadFile(f"{path}: its columns have different lengths")
    if not roles.inputs or lengths_found == {0}:
        raise BadFile(f"{path} holds no frames")
    x, y = (_matrix(path, columns, names) for names in (roles.inputs, roles.outputs))
    streams = [path.stem] * len(x) if roles.stream is None else [str(name) for name in columns[roles.stream].tolist()]
    ids = [0] * len(x) if "stream_id" not in columns else _integers(path, columns, "stream_id").tolist()
    seqs = None if "seq" not in columns else _integers(path, columns, "seq")
    times_ns = None if roles.time is None else _times_ns(path, roles.time, columns[roles.time])
    index: dict[tuple[str, int], int] = {}
    codes = np.array([index.setdefault(key, len(index)) for key in zip(streams, ids, strict=True)], np.int64)
    order = np.argsort(codes, kind="stable") if seqs is None else np.lexsort((seqs, codes))
    given = {(state.stream_id, state.seq): state.row for state in header.states}
    starts: dict[int, list[int]] = defaultdict(list)
    for stream_id, seq in sorted(given):
        starts[stream_id].append(seq)
    names: list[str] = []
    lengths: list[int] = []
    states: dict[int, State] = {}
    is_known: list[bool] = []
    for (name, stream_id), rows in zip(index, np.split(order, np.cumsum(np.bincount(codes))[:-1]), strict=True):
        first = _first_seq(path, name, None if seqs is None else seqs[rows])
        end = first + len(rows)
        for begin, until in pairwise([first, *(seq for seq in starts[stream_id] if first < seq < end), end]):
            row = given.get((stream_id, begin))
            if row is not None:
                states[len(names)] = _state(path, row, header)
            is_known.append(begin == 0 or (stream_id, begin) in given)
            names.append(name)
            lengths.append(until - begin)
    answered = np.repeat(is_known, lengths) & ~np.isnan(y[order]).all(axis=1)
    return RecordedSequences(
        names=tuple(names),
        lengths=np.array(lengths, np.int64),
        frames=x[order],
        outputs=y[order] if roles.outputs else None,
        answered=None if answered.all() else answered,
        times_ns=None if times_ns is None else times_ns[order],
        initial_states=states,
        fingerprint=header.about.get("fingerprint"),
        model=header.about.get("model"),
    )


def _matrix(path: Path, columns: Columns, names: Sequence[str]) -> F32:
    values = np.empty((len(next(iter(columns.values()))), len(names)), np.float32)
    for at, name in enumerate(names):
        column = columns[name]
        if column.dtype.kind not in "fiu":
            raise BadFile(f"{path}: {CHOOSE}: {name!r} holds something other than numbers")
        with np.errstate(over="ignore"):  # becomes infinite, and is refused as such
            values[:, at] = column
    return values


def _integers(path: Path, columns: Columns, name: str) -> I64:
    if columns[name].dtype.kind not in "iu":
        raise BadFile(f"{path}: {name!r} must hold whole numbers, without gaps")
    return columns[name].astype(np.int64)


def _times_ns(path: Path, name: str, values: npt.NDArray[Any]) -> I64:
    if values.dtype.kind == "M" and not np.isnat(values).any():
        return values.astype("datetime64[ns]").astype(np.int64)
    unit = unit_ns(name)
    if values.dtype.kind in "iuf" and (np.abs(values.astype(np.float64) * unit) < 2**63).all():
        return np.round(values * unit).astype(np.int64)
    raise BadFile(f"{path}: {name!r} must hold times or numbers, without gaps")


def _first_seq(path: Path, name: str, seqs: I64 | None) -> int:
    if seqs is None:
        return 0
    wrong = np.flatnonzero(seqs != seqs[0] + np.arange(len(seqs)))
    if len(wrong):
        raise BadFile(
            f"{path}: stream {name!r} has frame {seqs[wrong[0]]} where frame {seqs[0] + wrong[0]} belongs: a stream "
            "can only be sent again with all its frames"
        )
    return int(seqs[0])


def _state(path: Path, row: bytes, header: TableHeader) -> State:
    if header.spec is None or len(row) != header.spec.row_bytes:
        raise BadFile(f"{path} is damaged: a state does not have the size of the model's")
    return as_state(np.frombuffer(row, np.uint8).reshape(1, -1), header.spec, single=True)
