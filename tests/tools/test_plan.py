from __future__ import annotations

from collections import defaultdict

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instep_tools.plan import COHORT_STREAMS, OPEN_TOGETHER_S, Plan, cuts, plan_timed, plan_waves
from instep_tools.sequences import RecordedSequences

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=30)


def in_ns(seconds: list[float]) -> npt.NDArray[np.int64]:
    return np.round(np.array(seconds) * 1e9).astype(np.int64)


def sequences(lengths: list[int], times_s: list[float] | None = None) -> RecordedSequences:
    return RecordedSequences(
        names=tuple(f"s{number}" for number in range(len(lengths))),
        lengths=np.array(lengths),
        frames=np.zeros((sum(lengths), 1), np.float32),
        times_ns=None if times_s is None else in_ns(times_s),
    )


def carried_out(plan: Plan) -> tuple[dict[int, list[int]], int]:
    """The frames that each sequence sends, in order, and the most streams open at once."""
    sent: dict[int, list[int]] = defaultdict(list)
    due_s = 0.0
    closed: set[int] = set()
    open_now: dict[int, int] = {}
    most = 0
    for send in plan.sends:
        assert send.due_s >= due_s
        due_s = send.due_s
        assert send.cohort not in closed
        open_now[send.cohort] = len(plan.cohorts[send.cohort])
        most = max(most, sum(open_now.values()))
        members = plan.cohorts[send.cohort]
        assert send.flat.shape[1] == len(send.rows) == len(set(send.rows.tolist()))
        for row, frames in zip(send.rows, send.flat.T, strict=True):
            sent[int(members[row])] += frames.tolist()
        if send.last:
            closed.add(send.cohort)
            del open_now[send.cohort]
    assert closed == set(range(len(plan.cohorts)))
    return sent, most


def all_in_order(of: RecordedSequences) -> dict[int, list[int]]:
    return {row: list(range(start, start + of.lengths[row])) for row, start in enumerate(of.starts.tolist())}


@given(LENGTHS, st.integers(1, 40), st.integers(1, 50))
def test_fast_plans_send_all_in_order_within_the_limits(lengths: list[int], max_streams: int, max_frames: int) -> None:
    of = sequences(lengths)
    plan = plan_waves(of, max_streams, max_frames)
    sends = list(plan.sends)
    assert all(send.flat.size <= max_frames or len(send.flat) == 1 for send in sends)
    assert all(send.due_s == 0 for send in sends)
    sent, most = carried_out(Plan(of, plan.cohorts, iter(sends)))
    assert sent == all_in_order(of)
    assert most <= max_streams


def test_fast_plans_use_few_blocks() -> None:
    of = sequences([10] * 100)
    assert [send.flat.shape for send in plan_waves(of, 4096, 16_384).sends] == [(10, 100)]
    assert [send.flat.shape for send in plan_waves(of, 4096, 400).sends] == [(4, 100), (4, 100), (2, 100)]
    of = sequences([2] * (COHORT_STREAMS + 1))
    assert [len(cohort) for cohort in plan_waves(of, 4096, 16_384).cohorts] == [COHORT_STREAMS, 1]


@given(LENGTHS, st.integers(1, 40))
def test_a_rate_gives_every_stream_a_frame_a_period(lengths: list[int], max_streams: int) -> None:
    of = sequences(lengths)
    plan = plan_waves(of, max_streams, 1, rate_hz=50.0)
    sends = list(plan.sends)
    sent, most = carried_out(Plan(of, plan.cohorts, iter(sends)))
    assert sent == all_in_order(of)
    assert most <= max_streams
    dues: dict[int, list[float]] = defaultdict(list)
    for send in sends:
        for row in send.rows:
            dues[int(plan.cohorts[send.cohort][row])].append(send.due_s)
    for times in dues.values():
        np.testing.assert_allclose(np.diff(times), 1 / 50)


def test_what_does_not_fit_begins_when_the_others_have_ended() -> None:
    plan = plan_waves(sequences([2, 3, 1]), max_streams=2, max_block_frames=1, rate_hz=10.0)
    assert [(send.due_s, send.cohort, send.rows.tolist()) for send in plan.sends] == [
        (0.0, 0, [0, 1]),
        (0.1, 0, [0, 1]),
        (0.2, 0, [1]),
        (0.3, 1, [0]),
    ]


@given(
    st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=8), min_size=1, max_size=12),
    st.sampled_from([0.5, 1.0, 4.0]),
)
def test_timed_plans_keep_the_times_and_the_order(ticks: list[list[int]], speed: float) -> None:
    times_s = [tick / 2 + 3.0 for stream in ticks for tick in sorted(stream)]
    of = sequences([len(stream) for stream in ticks], times_s)
    plan = plan_timed(of, speed)
    sends = list(plan.sends)
    assert carried_out(Plan(of, plan.cohorts, iter(sends)))[0] == all_in_order(of)
    for send in sends:
        assert send.flat.shape[0] == 1
        np.testing.assert_allclose([(times_s[flat] - min(times_s)) / speed for flat in send.flat[0]], send.due_s)


def test_frames_of_one_moment_travel_together() -> None:
    of = sequences([2, 2, 2], [0, 1, 0, 1, 0, 2])
    shapes = [(send.due_s, send.rows.tolist()) for send in plan_timed(of, 1.0).sends]
    assert shapes == [(0, [0, 1, 2]), (1, [0, 1]), (2, [2])]


def test_streams_that_open_later_are_opened_later() -> None:
    late = OPEN_TOGETHER_S * 2
    of = sequences([1, 1, 1], [2 * late, 0.0, 0.1])
    plan = plan_timed(of, 1.0)
    assert [cohort.tolist() for cohort in plan.cohorts] == [[1, 2], [0]]
    assert plan_timed(of, 4.0).cohorts[0].tolist() == [1, 2, 0]


def test_without_times_there_is_nothing_to_keep() -> None:
    with pytest.raises(ValueError, match="no times"):
        plan_timed(sequences([1]), 1.0)


def test_cuts_keep_to_the_shortest_stream_and_the_largest_block() -> None:
    found = [(steps.tolist(), rows.tolist()) for steps, rows in cuts(np.array([5, 9]), max_frames=6)]
    assert found == [([0, 1, 2], [0, 1]), ([3, 4], [0, 1]), ([5, 6, 7, 8], [1])]
