"""The scheduler: at most one frame of a stream per step, oldest first within an origin, origins in turn.

Streams with a pending frame that are not in a run are ready. Each origin has a first-in-first-out queue of its ready
streams, and a batch takes one stream of each origin in turn (round robin). If all ready streams fit into a batch, it
takes all; otherwise the excess of an origin that floods waits behind its own frames.
"""

from __future__ import annotations

from instep.core.compiled import inlined, kernel
from instep.core.tables import NOTHING, READY, READY_SINCE_NS, ROUND_TAIL, STRIDE, WINDOW, Packed, Tables
from instep.core.typing import Int


@inlined
def push_ready(tables: Tables, slot: Int, since_ns: Int) -> None:
    """Append a stream to its owner's ready queue, unless it has no frame or may not step now."""
    counts, streams, origins = tables.counts, tables.streams, tables.origins
    may_step = streams["running"][slot] == 0 and streams["holds"][slot] == 0 and streams["queued"][slot] == 0
    if may_step and streams["next_seq"][slot] > streams["step_seq"][slot]:
        if counts[READY] == 0:
            counts[READY_SINCE_NS] = since_ns
        counts[READY] += 1
        streams["queued"][slot] = 1
        streams["next_ready"][slot] = NOTHING
        origin = streams["owner"][slot]
        if origins["ready_head"][origin] == NOTHING:
            origins["ready_head"][origin] = slot
            tail = counts[ROUND_TAIL]
            if tail == NOTHING:
                origins["next_origin"][origin] = origin
            else:
                origins["next_origin"][origin] = origins["next_origin"][tail]
                origins["next_origin"][tail] = origin
            counts[ROUND_TAIL] = origin
        else:
            streams["next_ready"][origins["ready_tail"][origin]] = slot
        origins["ready_tail"][origin] = slot


@kernel
def begin_run(packed: Packed, most_streams: int, max_steps: int) -> tuple[int, int]:
    """Choose the streams that step next, with an equal number of frames each, up to `max_steps`.

    Returns:
        size: B, the number of streams in `run_slots`; they are in a run until `finish_run` or `fail_run`.
        steps: the number of frames of each stream; `run_rows` has their rows, steps × B.
    """
    tables = Tables(*packed)
    counts, streams, origins, slots = tables.counts, tables.streams, tables.origins, tables.run_slots
    size, steps = 0, max_steps
    while counts[READY] and size < most_streams:
        tail = counts[ROUND_TAIL]
        origin = origins["next_origin"][tail]
        slot = origins["ready_head"][origin]
        origins["ready_head"][origin] = streams["next_ready"][slot]
        if origins["ready_head"][origin] != NOTHING:
            counts[ROUND_TAIL] = origin  # it has had its turn
        elif origin == tail:
            counts[ROUND_TAIL] = NOTHING
        else:
            origins["next_origin"][tail] = origins["next_origin"][origin]
        counts[READY] -= 1
        streams["queued"][slot] = 0
        # A held stream becomes ready again when it is released; the frames of another may have been taken out.
        if streams["holds"][slot] == 0 and streams["next_seq"][slot] > streams["step_seq"][slot]:
            streams["running"][slot] = 1
            steps = min(steps, streams["next_seq"][slot] - streams["step_seq"][slot])
            slots[size] = slot
            size += 1
    for place in range(size):
        slot = slots[place]
        for step in range(steps):
            row = (streams["step_seq"][slot] + step) % counts[WINDOW] * counts[STRIDE] + slot
            tables.run_rows[step * size + place] = row
    return size, steps
