from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from instep.core.tables import READY_SINCE_NS
from tests.support.core_streams import CoreStreams, Sent, check_invariants, frames, ints

STREAMS = 200
PER_ORIGIN = 50


class Queues:
    """200 streams, of which each of four origins has 50; slot 1 is the first of origin 0."""

    def __init__(self, window: int = 1) -> None:
        self.core = CoreStreams(window, STREAMS, max_pending=1000, credit=1000)
        for origin in range(4):
            self.core.open(*(f"{origin}.{place}" for place in range(PER_ORIGIN)), owner=origin)

    def add(self, *slots: int, timesteps: int = 1, now_ns: int = 0) -> None:
        """A frame of each of these streams, one message for each."""
        messages = []
        for slot in slots:
            seq = int(self.core.table.next_seq[slot])
            columns = [(self.core.handles(ints(slot))[0], seq, int(self.core.table.step_seq[slot]))]
            origin = int(self.core.table.owner[slot])
            messages.append(Sent(columns, frames([1.0] * timesteps), origin, arrived_ns=now_ns))
        codes = self.core.admit(*messages)
        assert not any(codes)

    def batch(self, max_batch_size: int) -> list[int]:
        """The next batch, stepped and answered at once."""
        batch = self.core.step(max_batch_size)
        self.core.answer()
        taken: list[int] = batch.slots.tolist()
        assert len(taken) == len(set(taken))
        return taken


def test_whatever_is_ready_is_taken() -> None:
    queues = Queues()
    queues.add(1, 2)
    assert queues.batch(4) == [1, 2]
    assert queues.batch(4) == []


def test_streams_of_one_origin_step_first_in_first_out() -> None:
    queues = Queues()
    queues.add(5, 3, 1, 6, 4, 2)
    assert [queues.batch(2) for _ in range(3)] == [[5, 3], [1, 6], [4, 2]]


def test_an_origin_that_floods_waits_behind_its_own_frames() -> None:
    queues = Queues()
    queues.add(*range(1, 51))
    assert queues.batch(4) == [1, 2, 3, 4]
    queues.add(150)
    assert 150 in queues.batch(4)


def test_busy_origins_take_turns() -> None:
    queues = Queues()
    queues.add(*range(1, 51))
    queues.add(*range(51, 101))
    queues.add(*range(101, 104))
    assert queues.batch(5) == [1, 51, 101, 2, 52]
    assert queues.batch(5) == [102, 3, 53, 103, 4]  # the turn goes on where it was
    assert queues.batch(4) == [54, 5, 55, 6]


def test_an_origin_that_was_alone_owes_nothing_to_one_that_joins() -> None:
    queues = Queues()
    for _ in range(100):
        queues.add(1, 2, 3, 4)
        queues.batch(4)
    queues.add(*range(1, 21))
    queues.add(*range(101, 121))
    assert sum(slot > 100 for slot in queues.batch(4) + queues.batch(4)) == 4


def test_a_stream_that_has_more_frames_goes_to_the_end_of_its_queue() -> None:
    queues = Queues(window=4)
    queues.add(1, timesteps=2)
    queues.add(2, 3)
    assert [queues.batch(1) for _ in range(4)] == [[1], [2], [3], [1]]


def test_a_stream_in_a_run_is_in_no_other_batch() -> None:
    queues = Queues(window=4)
    queues.add(1, timesteps=2)
    first = queues.core.begin()
    queues.add(1)
    assert queues.core.begin().slots.tolist() == []
    queues.core.finish(first)
    assert queues.batch(4) == [1]


def test_a_held_stream_loses_its_turn_and_has_it_again_when_it_is_released() -> None:
    queues = Queues()
    queues.add(1, 2)
    queues.core.hold(1, 2)
    queues.core.hold(1)
    assert queues.batch(4) == []
    assert queues.core.ready == 0
    queues.core.release(1, 2)
    assert queues.batch(4) == [2]
    queues.core.release(1)
    assert queues.batch(4) == [1]


def test_a_stream_that_is_released_before_its_turn_is_queued_once() -> None:
    queues = Queues()
    queues.add(1, 2)
    queues.core.hold(1)
    queues.core.release(1)
    check_invariants(queues.core)
    assert queues.batch(4) == [1, 2]


def test_a_stream_may_be_held_by_more_operations_than_fit_into_a_byte() -> None:
    queues = Queues()
    queues.add(1)
    for _ in range(256):
        queues.core.hold(1)
    assert queues.batch(4) == []
    for _ in range(256):
        assert queues.core.ready == 0
        queues.core.release(1)
    assert queues.batch(4) == [1]


def test_a_run_takes_several_frames_of_each_stream_as_far_as_all_of_them_have_frames() -> None:
    queues = Queues(window=4)
    queues.add(1, timesteps=3)
    queues.add(2, timesteps=2)
    batch = queues.core.begin(max_steps=8)
    assert (batch.slots.tolist(), batch.rows.shape) == ([1, 2], (2, 2))
    queues.core.finish(batch)
    batch = queues.core.begin(max_steps=8)
    assert (batch.slots.tolist(), batch.rows.shape) == ([1], (1, 1))


def test_a_batch_waits_since_its_first_frame_arrived() -> None:
    queues = Queues()
    queues.add(1, now_ns=1000)
    queues.add(2, now_ns=1060)
    assert queues.core.tables.counts[READY_SINCE_NS] == 1000
    queues.batch(4)
    queues.add(3, now_ns=2000)
    assert queues.core.tables.counts[READY_SINCE_NS] == 2000


def test_a_ready_stream_that_is_handed_over_steps_once_in_the_turn_of_its_former_owner() -> None:
    queues = Queues()
    queues.add(1, 2, 51, 52)
    queues.core.table.hand_over(ints(1), 1, now_ns=0)
    check_invariants(queues.core)
    assert queues.batch(10) == [1, 51, 2, 52]
    queues.add(51, 1, 2)
    assert queues.batch(10) == [51, 2, 1]


def test_the_next_stream_of_a_slot_that_is_still_queued_steps_once() -> None:
    core = CoreStreams(max_streams=1)
    (former,) = core.open("former")
    core.send((former, 0, 0), x=frames([1]))
    core.fail(ints(1))
    core.answer()
    core.table.release(ints(1))
    (following,) = core.open("following", owner=2)
    core.admit(Sent([(following, 0, 0)], frames([1, 2]), origin=2))
    check_invariants(core)
    assert [core.step().slots.tolist() for _ in range(3)] == [[1], [1], []]
    check_invariants(core)


@given(
    st.lists(st.one_of(st.tuples(st.integers(0, 3), st.integers(1, 40)), st.just("step")), max_size=30),
    st.integers(1, 9),
)
def test_every_ready_stream_is_taken_exactly_once_and_no_batch_is_too_large(
    events: list[tuple[int, int] | str], max_batch_size: int
) -> None:
    queues = Queues()
    ready: set[int] = set()
    for event in [*events, *["step"] * 200]:
        if isinstance(event, str):
            taken = queues.batch(max_batch_size)
            assert len(taken) == min(max_batch_size, len(ready))
            assert set(taken) <= ready
            shares = [sum((slot - 1) // PER_ORIGIN == origin for slot in taken) for origin in range(4)]
            left = [sum((slot - 1) // PER_ORIGIN == origin for slot in ready - set(taken)) for origin in range(4)]
            for share, rest in zip(shares, left, strict=True):
                assert not rest or share >= max(shares) - 1  # whoever waits had an equal share
            ready -= set(taken)
            if not ready:
                continue
        else:
            origin, count = event
            first = 1 + PER_ORIGIN * origin
            slots = [slot for slot in range(first, first + PER_ORIGIN) if slot not in ready][:count]
            if slots:
                queues.add(*slots)
                ready |= set(slots)
    assert not ready
