from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instep.core.pending import NONE, PendingFrames

STREAMS = 5
CAPACITY = 40


def append(
    pending: PendingFrames, slots: list[int], lengths: list[int], first: int = 0
) -> tuple[list[int], list[list[int]]]:
    timesteps = max(lengths)
    x = np.arange(first, first + timesteps * len(slots), dtype=np.float32).reshape(timesteps, len(slots), 1)
    rows, ready = pending.append(np.array(slots), np.array(lengths), x, block=0)
    return ready.tolist(), rows.tolist()


def test_frames_come_out_in_the_order_they_went_in() -> None:
    pending = PendingFrames(CAPACITY, STREAMS, 1, 1)
    assert append(pending, [1, 2], [2, 1])[0] == [1, 2]
    assert append(pending, [1], [1], first=100)[0] == []
    assert pending.x[pending.take(np.array([1, 2])), 0].tolist() == [0, 1]
    assert pending.done(np.array([1, 2])).tolist() == [1]
    assert pending.x[pending.take(np.array([1])), 0].tolist() == [2]
    assert pending.done(np.array([1])).tolist() == [1]
    assert pending.x[pending.take(np.array([1])), 0].tolist() == [100]
    assert pending.done(np.array([1])).tolist() == []


def test_a_stream_that_steps_is_not_ready_until_it_is_done() -> None:
    pending = PendingFrames(CAPACITY, STREAMS, 1, 1)
    append(pending, [1], [1])
    pending.take(np.array([1]))
    assert append(pending, [1, 2], [1, 1])[0] == [2]
    with pytest.raises(AssertionError, match="stepping"):
        pending.take(np.array([1]))
    assert pending.done(np.array([1])).tolist() == [1]


def test_frames_that_were_not_admitted_have_no_row() -> None:
    pending = PendingFrames(CAPACITY, STREAMS, 1, 1)
    ready, rows = append(pending, [1, 2, 3], [2, 0, 1])
    assert ready == [1, 3]
    assert [[row == NONE for row in line] for line in rows] == [[False, True, False], [False, True, True]]
    assert pending.free_count == CAPACITY - 3


def test_the_block_is_kept_with_the_frame() -> None:
    pending = PendingFrames(CAPACITY, STREAMS, 1, 1)
    rows, _ = pending.append(np.array([4]), np.array([3]), np.zeros((3, 1, 1), np.float32), block=9)
    assert pending.block[rows[:, 0]].tolist() == [9, 9, 9]


def test_taking_everything_of_some_streams_leaves_the_others() -> None:
    pending = PendingFrames(CAPACITY, STREAMS, 1, 1)
    append(pending, [1, 2], [3, 3])
    rows, slots = pending.take_all(np.array([1, 3]))
    assert pending.x[rows, 0].tolist() == [0, 2, 4]
    assert slots.tolist() == [1, 1, 1]
    pending.take(np.array([2]))
    assert pending.done(np.array([1, 2])).tolist() == [2]
    assert append(pending, [1], [1])[0] == [1]


def test_what_is_not_there_is_not_taken() -> None:
    pending = PendingFrames(CAPACITY, STREAMS, 1, 1)
    with pytest.raises(AssertionError, match="without pending"):
        pending.take(np.array([1]))
    with pytest.raises(AssertionError, match="no room"):
        append(pending, [1], [CAPACITY + 1])


@given(
    st.lists(
        st.one_of(
            st.lists(
                st.tuples(st.integers(1, STREAMS), st.integers(0, 3)),
                min_size=1,
                max_size=STREAMS,
                unique_by=lambda c: c[0],
            ),
            st.just("take"),
        ),
        max_size=60,
    )
)
def test_queues_behave_like_one_deque_a_stream(steps: list[list[tuple[int, int]] | str]) -> None:
    pending = PendingFrames(CAPACITY, STREAMS, 1, 1)
    truth: dict[int, deque[float]] = {slot: deque() for slot in range(1, STREAMS + 1)}
    counter = 0.0
    for step in steps:
        if isinstance(step, str):
            slots = np.array([slot for slot, queue in truth.items() if queue], np.int64)
            rows = pending.take(slots)
            assert pending.x[rows, 0].tolist() == [truth[slot].popleft() for slot in slots.tolist()]
            assert pending.done(slots).tolist() == [slot for slot in slots.tolist() if truth[slot]]
            pending.free(rows)
            continue
        if sum(length for _, length in step) > pending.free_count:
            continue
        was_empty = [slot for slot, length in step if not truth[slot] and length]
        timesteps = max(1, max(length for _, length in step))
        x = np.full((timesteps, len(step), 1), -1, np.float32)
        for column, (slot, length) in enumerate(step):
            for timestep in range(length):
                x[timestep, column] = counter
                truth[slot].append(counter)
                counter += 1
        slots, lengths = (np.array(part, np.int64) for part in zip(*step, strict=True))
        _, ready = pending.append(slots, lengths, x, block=0)
        assert ready.tolist() == was_empty
    assert pending.free_count == CAPACITY - sum(len(queue) for queue in truth.values())
