import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from instep.core.scheduler import Scheduler

STREAMS = 200


def scheduler(max_batch_size: int = 4, max_queue_delay_ns: int = 0) -> Scheduler:
    return Scheduler(STREAMS, 10, max_batch_size, max_queue_delay_ns)


def add(rules: Scheduler, client: int, *slots: int, now_ns: int = 0) -> None:
    rules.add(np.array(slots), np.array([client], np.int32), now_ns)


def batch(rules: Scheduler) -> set[int]:
    taken = rules.next_batch().tolist()
    assert len(taken) == len(set(taken))
    return set(taken)


def test_whatever_is_ready_is_taken_as_soon_as_the_worker_is_free() -> None:
    rules = scheduler()
    add(rules, 0, 1, 2)
    assert rules.hold_ns(now_ns=0, open_count=100) == 0
    assert batch(rules) == {1, 2}
    assert batch(rules) == set()


def test_one_clients_streams_step_oldest_first() -> None:
    rules = scheduler(max_batch_size=2)
    for slot in range(1, 7):
        add(rules, 0, slot)
    assert [batch(rules) for _ in range(3)] == [{1, 2}, {3, 4}, {5, 6}]


def test_a_client_that_floods_waits_behind_its_own_frames() -> None:
    rules = scheduler(max_batch_size=4)
    add(rules, 0, *range(1, 101))
    assert batch(rules) == {1, 2, 3, 4}
    add(rules, 1, 150)
    assert 150 in batch(rules)


def test_two_busy_clients_share_alike() -> None:
    rules = scheduler(max_batch_size=4)
    add(rules, 0, *range(1, 51))
    add(rules, 1, *range(101, 151))
    for _ in range(5):
        taken = batch(rules)
        assert abs(sum(slot > 100 for slot in taken) - 2) <= 1


def test_a_client_that_was_alone_owes_nothing_to_one_that_joins() -> None:
    rules = scheduler(max_batch_size=4)
    for _ in range(100):
        add(rules, 0, *range(1, 5))
        batch(rules)
    add(rules, 0, *range(1, 21))
    add(rules, 1, *range(101, 121))
    taken = batch(rules) | batch(rules)
    assert sum(slot > 100 for slot in taken) == 4


def test_streams_that_come_back_wait_their_turn() -> None:
    rules = scheduler(max_batch_size=2)
    add(rules, 0, 1, 2, 3)
    first = batch(rules)
    back = np.array(sorted(first))
    rules.add(back, np.zeros(2, np.int32), 0)
    assert 3 in batch(rules)


def test_a_batch_that_is_not_full_is_held_from_its_first_frame_on() -> None:
    rules = scheduler(max_batch_size=4, max_queue_delay_ns=100)
    add(rules, 0, 1, now_ns=1000)
    add(rules, 0, 2, now_ns=1060)
    assert rules.hold_ns(now_ns=1060, open_count=50) == 40
    assert rules.hold_ns(now_ns=1100, open_count=50) == 0


def test_a_full_batch_is_not_held_nor_one_with_every_open_stream() -> None:
    rules = scheduler(max_batch_size=4, max_queue_delay_ns=100)
    add(rules, 0, 1, 2, now_ns=0)
    assert rules.hold_ns(now_ns=0, open_count=3) == 100
    assert rules.hold_ns(now_ns=0, open_count=2) == 0
    add(rules, 0, 3, 4, now_ns=0)
    assert rules.hold_ns(now_ns=0, open_count=100) == 0


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 9))
def test_streams_of_several_clients_that_are_ready_together_stand_as_if_one_came_after_the_other(
    clients: list[int], max_batch_size: int
) -> None:
    together, one_by_one = scheduler(max_batch_size), scheduler(max_batch_size)
    for first, shift in ((1, 0), (101, 1)):  # the second time, clients have tags already, but for one that is new
        slots = np.arange(first, first + len(clients))
        together.add(slots, np.array(clients, np.int32) + np.int32(shift), 0)
        for slot, client in zip(slots.tolist(), clients, strict=True):
            add(one_by_one, client + shift, slot)
        for _ in range(40 if first == 1 else 1):
            assert together.next_batch().tolist() == one_by_one.next_batch().tolist()
    for _ in range(80):
        assert together.next_batch().tolist() == one_by_one.next_batch().tolist()


@given(
    st.lists(st.one_of(st.tuples(st.integers(0, 3), st.integers(1, 40)), st.just("step")), max_size=80),
    st.integers(1, 9),
)
def test_every_ready_stream_is_taken_exactly_once_and_no_batch_is_too_large(
    steps: list[tuple[int, int] | str], max_batch_size: int
) -> None:
    rules = scheduler(max_batch_size)
    ready: set[int] = set()
    for step in [*steps, *["step"] * 200]:
        if isinstance(step, str):
            taken = batch(rules)
            assert len(taken) == min(max_batch_size, len(ready))
            assert taken <= ready
            ready -= taken
        else:
            client, count = step
            slots = [slot for slot in range(1 + 50 * client, 51 + 50 * client) if slot not in ready][:count]
            add(rules, client, *slots)
            ready |= set(slots)
    assert not ready
