"""Streams on their way between memory and the recording, as they are, to the bit."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from instep.core.streams import StreamTable
from instep.core.tables import WINDOW, Tables, rows_of
from instep.core.typing import I64, U8
from instep.recording.open_streams import OpenStream
from instep.recording.records import StateRows
from instep.runtime.stepper import StateAccess


def put_into_memory(tables: Tables, table: StreamTable, states: StateAccess, streams: Sequence[OpenStream]) -> I64:
    """Open streams in their states, with their frames in the frame buffer; parked, until somebody resumes them.

    Args:
        tables: the frame buffer.
        table: the streams.
        states: the states.
        streams: whose names are not in use.

    Returns:
        Their slots, int64 [≤ N]; the last ones are left out where there is no room for all.
    """
    streams = streams[: table.slots.free_count]
    first_seqs = np.array([stream.first_seq for stream in streams], np.int64)
    slots, codes = table.open([stream.name for stream in streams], table.parked, time.monotonic_ns(), first_seqs)
    assert not codes.any(), "a stream of this name is in memory already"
    table.recording_id[slots] = np.array([stream.stream for stream in streams], np.uint32)
    table.epoch[slots] = np.array([stream.epoch for stream in streams], np.uint64)
    table.former_epoch[slots] = np.array([stream.former_epoch for stream in streams], np.uint64)
    table.granted_seq[slots] = np.array([stream.granted_seq for stream in streams], np.int64)
    table.renumbered[slots] = np.array([stream.renumbered for stream in streams], np.bool_)
    table.step_seq[slots] = table.next_seq[slots] = np.array([stream.seq for stream in streams], np.int64)
    table.acked[slots] = np.array([stream.tail_seq for stream in streams], np.int64)
    for slot, stream in zip(slots.tolist(), streams, strict=True):
        _fill_frame_buffer(tables, slot, stream)
    try:
        _load(states, slots, streams)
    except BaseException:
        table.release(slots)
        raise
    return slots


def _load(states: StateAccess, slots: I64, streams: Sequence[OpenStream]) -> None:
    is_initial = np.array([stream.state is None for stream in streams], np.bool_)
    if is_initial.any():
        states.load(slots[is_initial], None)
    if not is_initial.all():
        rows = np.stack([stream.state for stream in streams if stream.state is not None])
        states.load(slots[~is_initial], rows)


def _fill_frame_buffer(tables: Tables, slot: int, stream: OpenStream) -> None:
    kept = min(stream.seq - stream.tail_seq, int(tables.counts[WINDOW]))  # the window may be smaller than it was
    if kept:
        rows = rows_of(tables, np.full(kept, slot), np.arange(stream.seq - kept, stream.seq))
        tables.x[rows], tables.y[rows] = stream.tail_x[-kept:], stream.tail_y[-kept:]


def state_rows(tables: Tables, table: StreamTable, slots: I64, states: U8) -> StateRows:
    """The states of open streams, [N, …], and the frames of each whose outputs its client may not have."""
    seqs = table.step_seq[slots]
    first = np.maximum(np.maximum(table.acked[slots], seqs - tables.counts[WINDOW]), table.first_seq[slots])
    counts = seqs - first
    offsets = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    tail = rows_of(tables, np.repeat(slots, counts), np.repeat(first, counts) + offsets)
    return StateRows(table.recording_ids(slots), seqs, states, first, tables.x[tail], tables.y[tail])
