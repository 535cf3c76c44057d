from __future__ import annotations

from collections import defaultdict

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from instep_tools.plan import COHORT_STREAMS, OPEN_TOGETHER_S, Plan, Send, plan_timed, plan_waves
from instep_tools.sequences import RecordedSequences

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=30)


def sequences(lengths: list[int], times_s: list[float] | None = None) -> RecordedSequences:
    return RecordedSequences(
        names=tuple(f"s{number}" for number in range(len(lengths))),
        lengths=np.array(lengths),
        frames=np.zeros((sum(lengths), 1), np.float32),
        times_ns=None if times_s is None else np.round(np.array(times_s) * 1e9).astype(np.int64),
    )


def carried_out(plan: Plan, sends: list[Send]) -> int:
    """Check that each sequence sends its frames in order while it is open; the most streams open at once."""
    sent: dict[int, list[int]] = defaultdict(list)
    due_s, most = 0.0, 0
    closed: set[int] = set()
    open_now: dict[int, int] = {}
    for send in sends:
        assert send.due_s >= due_s
        assert send.cohort not in closed
        due_s, members = send.due_s, plan.cohorts[send.cohort]
        open_now[send.cohort] = len(members)
        most = max(most, sum(open_now.values()))
        assert send.flat.shape[1] == len(send.rows) == len(set(send.rows.tolist()))
        for row, frames in zip(send.rows, send.flat.T, strict=True):
            sent[int(members[row])] += frames.tolist()
        if send.last:
            closed.add(send.cohort)
            del open_now[send.cohort]
    assert closed == set(range(len(plan.cohorts)))
    of = plan.sequences
    assert sent == {row: list(range(start, start + of.lengths[row])) for row, start in enumerate(of.starts.tolist())}
    return most


@given(LENGTHS, st.integers(1, 40), st.integers(1, 50))
def test_fast_plans_send_all_in_order_within_the_limits(lengths: list[int], max_streams: int, max_frames: int) -> None:
    plan = plan_waves(sequences(lengths), max_streams, max_frames)
    sends = list(plan.sends)
    assert all(send.flat.size <= max_frames or len(send.flat) == 1 for send in sends)
    assert all(send.due_s == 0 for send in sends)
    assert carried_out(plan, sends) <= max_streams


def test_fast_plans_use_few_blocks() -> None:
    of = sequences([10] * 100)
    assert [send.flat.shape for send in plan_waves(of, 4096, 16_384).sends] == [(10, 100)]
    assert [send.flat.shape for send in plan_waves(of, 4096, 400).sends] == [(4, 100), (4, 100), (2, 100)]
    of = sequences([2] * (COHORT_STREAMS + 1))
    assert [len(cohort) for cohort in plan_waves(of, 4096, 16_384).cohorts] == [COHORT_STREAMS, 1]


@given(LENGTHS, st.integers(1, 40))
def test_a_rate_gives_every_stream_a_frame_a_period(lengths: list[int], max_streams: int) -> None:
    plan = plan_waves(sequences(lengths), max_streams, 1, rate_hz=50.0)
    sends = list(plan.sends)
    assert carried_out(plan, sends) <= max_streams
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
    plan = plan_timed(sequences([len(stream) for stream in ticks], times_s), speed)
    sends = list(plan.sends)
    carried_out(plan, sends)
    for send in sends:
        assert send.flat.shape[0] == 1
        np.testing.assert_allclose([(times_s[flat] - min(times_s)) / speed for flat in send.flat[0]], send.due_s)


def test_streams_that_open_later_are_opened_later() -> None:
    late = OPEN_TOGETHER_S * 2
    of = sequences([1, 1, 1], [2 * late, 0.0, 0.1])
    plan = plan_timed(of, 1.0)
    assert [cohort.tolist() for cohort in plan.cohorts] == [[1, 2], [0]]
    assert plan_timed(of, 4.0).cohorts[0].tolist() == [1, 2, 0]
