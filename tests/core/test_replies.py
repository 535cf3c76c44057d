from __future__ import annotations

from instep.core.histogram import ENTRIES, quantile
from instep.core.tables import ARRIVED_NS, FAILED, FRAMES
from instep_client.protocol.codes import Code
from tests.support.core_streams import Answered, CoreStreams, Sent, check_invariants, frames


def three_origins(**limits: int) -> tuple[CoreStreams, list[int]]:
    """Streams `0`, `1`, `2` of one origin each, and then again."""
    core = CoreStreams(**limits)
    return core, [core.open(str(place), owner=place % 3)[0] for place in range(6)]


def test_messages_of_one_origin_and_length_are_answered_together() -> None:
    core, handles = three_origins()
    core.admit(*(Sent([(handle, 0, 0)], frames([at, at]), at % 3, at) for at, handle in enumerate(handles)))
    core.step(max_steps=2)
    answers = core.answer()
    assert core.groups == 3
    assert [(answer.origin, answer.tag) for answer in answers] == [(0, 0), (0, 3), (1, 1), (1, 4), (2, 2), (2, 5)]
    assert all(answer.columns == [Answered(0, 2, 2, [answer.tag, 2 * answer.tag])] for answer in answers)


def test_messages_of_other_lengths_are_answered_apart_and_in_order() -> None:
    core = CoreStreams()
    a, b, c = core.open("a", "b", "c")
    core.admit(
        Sent([(a, 0, 0)], frames([1]), tag=1),
        Sent([(b, 0, 0)], frames([1, 2]), tag=2),
        Sent([(c, 0, 0)], frames([3]), tag=3),
    )
    answers = core.step_all()
    assert [answer.tag for answer in answers] == [1, 3, 2]
    core.admit(
        Sent([(a, 1, 0)], frames([1]), tag=1),
        Sent([(b, 9, 0)], frames([1, 2]), tag=2),
        Sent([(c, 9, 0)], frames([3]), tag=3),
        Sent([(c, 8, 0)], frames([3]), tag=4),
    )
    assert [answer.tag for answer in core.answer()] == [2, 3, 4]
    assert core.groups == 0  # they were answered as they were admitted


def test_a_reply_to_several_messages_is_bounded_in_frames_and_in_messages() -> None:
    for limits, groups in (({"max_reply_frames": 4}, 3), ({"max_reply_messages": 2}, 3), ({"max_reply_frames": 1}, 5)):
        core = CoreStreams(**limits)
        handles = core.open(*"abcde")
        core.admit(*(Sent([(handle, 0, 0)], frames([1, 2]), tag=at) for at, handle in enumerate(handles)))
        core.step(max_steps=2)
        assert [answer.tag for answer in core.answer()] == [0, 1, 2, 3, 4]
        assert core.groups == groups


def test_replies_that_exceed_the_reply_memory_come_in_several_portions() -> None:
    core = CoreStreams(max_pending=6)
    a, b = core.open("a", "b")
    core.send((a, 0, 0), (b, 0, 0), x=frames([1, 2, 3], [4, 5, 6]))
    core.step_all()
    # All repeats: nothing is pending, so that together they may be larger than what may be pending.
    core.admit(*(Sent([(a, 0, 0), (b, 0, 0)], frames([1, 2, 3], [4, 5, 6]), tag=tag) for tag in range(3)))
    answers = core.answer()
    assert [answer.tag for answer in answers] == [0, 1, 2]
    for answer in answers:
        assert answer.columns == [Answered(0, 3, 3, [1, 3, 6]), Answered(0, 3, 3, [4, 9, 15])]
    check_invariants(core)


def test_two_messages_with_one_tag_get_the_repeated_outputs_of_each() -> None:
    core = CoreStreams()
    a, b = core.open("a", "b")
    core.send((a, 0, 0), (b, 0, 0), x=frames([1, 2, 3], [4, 5, 6]))
    core.step_all()
    core.admit(
        Sent([(a, 1, 0)], frames([2, 3, 7]), tag=5), Sent([(b, 2, 0)], frames([6, 8]), tag=5),
    )  # fmt: skip
    columns = [answer.columns for answer in core.step_all()]
    assert columns == [[Answered(0, 3, 4, [3, 6, 13])], [Answered(0, 2, 4, [15, 23])]]


def test_a_group_says_what_it_holds() -> None:
    core = CoreStreams()
    a, b = core.open("a", "b")
    core.admit(
        Sent([(a, 0, 0), (99, 0, 0)], frames([1, 2], [1, 2]), arrived_ns=70),
        Sent([(b, 0, 0), (98, 0, 0)], frames([1, 2], [1, 2]), arrived_ns=80),
    )
    core.step(max_steps=2)
    core.answer()
    assert core.groups == 1
    assert core.tables.groups[0, [FRAMES, FAILED, ARRIVED_NS]].tolist() == [4, 2, 70]


def test_columns_that_were_refused_are_nan_and_their_neighbours_are_not() -> None:
    core = CoreStreams()
    a, b = core.open("a", "b")
    core.send((a, 0, 0), x=frames([9]))
    core.step_all()
    core.send((a, 1, 0), (77, 0, 0), (b, 0, 0), x=frames([1, 2], [3, 4], [5, 6]))
    (answer,) = core.step_all()  # the support code checks for NaN
    unknown = Answered(Code.UNKNOWN_STREAM, 0, 0, [])
    assert answer.columns == [Answered(0, 2, 3, [10, 12]), unknown, Answered(0, 2, 2, [5, 11])]


def test_how_long_messages_waited_is_counted_once_for_each() -> None:
    core = CoreStreams()
    a, b = core.open("a", "b")
    core.admit(Sent([(a, 0, 0)], frames([1]), arrived_ns=1_000), Sent([(b, 0, 0)], frames([1]), arrived_ns=5_000_000))
    core.step()
    core.answer(began_ns=4_001_000)
    assert core.queue_us[:ENTRIES].sum() == 2
    assert quantile(core.queue_us, 0.5) == 0  # `b` arrived after the step had begun
    assert 4000 <= quantile(core.queue_us, 1) <= 4500
