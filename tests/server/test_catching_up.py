"""When a replay has caught up with the frames that arrive, and when it never will."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instep.server.models import CatchingUp
from instep.server.preparation import CannotServe


def times_until_over(took_s: Iterable[float], frames: int = 1) -> int:
    """How many times are replayed that take so long."""
    catching_up = CatchingUp()
    return next(number for number, each in enumerate(took_s, start=1) if catching_up.is_over(frames, each))


@pytest.mark.parametrize(
    ("took_s", "times"),
    [
        ([0.005], 1),
        ([30.0, 3.0, 0.3, 0.03, 0.01], 5),
        ([30.0, 3.0, 0.3, 0.2], 4),  # a fifth one would hardly be shorter
        ([0.7, 0.7, 0.4], 3),
        ([8.0, 6.0, 4.5, 3.4, 2.5, 1.9, 1.4, 1.1, 0.8, 0.6, 0.45], 11),  # slowly, but it gets there
        ([2.0, 0.6, 0.9, 1.7, 0.8, 0.5], 6),  # with a machine that is busy meanwhile
        ([1.0, 1.0, 1.0, 1.0, 0.89, 1.0, 1.0, 1.0, 0.5], 9),
        ([0.2, 0.2], 2),
    ],
)
def test_it_goes_on_as_long_as_it_gets_nearer(took_s: list[float], times: int) -> None:
    assert times_until_over(chain(took_s, repeat(1e9))) == times


@pytest.mark.parametrize("took_s", [[0.6] * 5, [10.0, 9.5, *[0.6] * 5], [0.3, 0.1, *[0.6] * 4], [2.0, 1.0] * 3])
def test_it_gives_up_where_it_gets_no_nearer(took_s: list[float]) -> None:
    with pytest.raises(CannotServe, match="as quickly as they are replayed"):
        times_until_over(took_s)


def test_without_frames_it_has_caught_up_however_long_that_takes() -> None:
    assert times_until_over(repeat(3.0), frames=0) == 2, "the first time, some may have arrived meanwhile"


@given(st.lists(st.floats(0.0, 1e4), min_size=1))
def test_it_ends_with_little_to_do_or_gives_up(took_s: list[float]) -> None:
    try:
        times = times_until_over(chain(took_s, repeat(took_s[-1])))
    except CannotServe:
        return
    assert took_s[min(times, len(took_s)) - 1] <= 0.5, "what is left is done while nothing is received"
