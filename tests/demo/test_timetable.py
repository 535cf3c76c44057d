from __future__ import annotations

import numpy as np
import pytest

from instep.demo.timetable import BURST_FRAMES, FASTEST_S, SLOWEST_S, WINDOW_S, Part, most_at_once, timetable

LENGTHS = [7 + index % 23 for index in range(370)]


def test_everybody_sends_every_frame_within_the_window() -> None:
    parts = timetable(LENGTHS)
    assert [len(part.due_s) for part in parts] == LENGTHS
    for part in parts:
        assert part.due_s[0] >= 0
        assert (np.diff(part.due_s) >= 0).all()
    assert max(part.due_s[-1] for part in parts) <= max(WINDOW_S, max(LENGTHS) * SLOWEST_S)


def test_speeds_differ_and_starts_are_staggered() -> None:
    steady = [part.due_s for part in timetable(LENGTHS) if part.chunk == 1]
    periods = np.array([due_s[1] - due_s[0] for due_s in steady])
    for due_s, period in zip(steady, periods, strict=True):
        np.testing.assert_allclose(np.diff(due_s), period)
    assert FASTEST_S - 1e-9 <= periods.min() < 0.01
    assert SLOWEST_S + 1e-9 >= periods.max() > 0.24
    assert len({due_s[0] for due_s in steady}) == len(steady)


def test_a_fifth_sends_in_chunks_when_their_last_frame_is_there() -> None:
    bursty = [part for part in timetable(LENGTHS) if part.chunk != 1]
    assert len(bursty) == 74
    for part in bursty:
        assert part.chunk == BURST_FRAMES
        firsts = part.due_s[::BURST_FRAMES]
        for first, due_s in zip(firsts, np.split(part.due_s, range(4, len(part.due_s), 4)), strict=True):
            assert (due_s == first).all()
        whole = np.diff(firsts)[: len(part.due_s) // BURST_FRAMES - 1]
        np.testing.assert_allclose(whole, whole[:1].repeat(len(whole)))


def test_it_is_the_same_each_time_and_scales_with_the_speed() -> None:
    for once, again, fast in zip(timetable(LENGTHS), timetable(LENGTHS), timetable(LENGTHS, speed=4.0), strict=True):
        assert once.due_s.tolist() == again.due_s.tolist()
        np.testing.assert_allclose(fast.due_s * 4, once.due_s)
        assert once.chunk == fast.chunk


@pytest.mark.parametrize(
    ("spans", "most"),
    [
        ([(0.0, 1.0)], 1),
        ([(0.0, 1.0), (2.0, 3.0)], 1),
        ([(0.0, 1.0), (1.0, 3.0)], 2),
        ([(0.0, 9.0), (1.0, 2.0), (3.0, 4.0), (3.5, 5.0)], 3),
    ],
)
def test_most_at_once(spans: list[tuple[float, float]], most: int) -> None:
    assert most_at_once([Part(due_s=np.array(span), chunk=1) for span in spans]) == most
