"""Streams that the server puts to sleep: whoever uses them does not notice, and nothing wakes that is not needed."""

from __future__ import annotations

import numpy as np
import pytest

from instep_client.handles import StreamHandle
from instep_client.openings import ForkCall
from instep_client.protocol.codes import Code
from instep_client.protocol.errors import ConnectionFailed, StreamEvicted
from instep_client.protocol.wire import Kind
from tests.support.fake_server import F32, reference
from tests.support.ring_link import RingLink
from tests.support.states import floats_of

X: F32 = np.random.default_rng(5).standard_normal((20, 3)).astype(np.float32)


def step(link: RingLink, handle: StreamHandle, x: F32) -> F32:
    return link.finish(link.session.step(handle, x)).outputs


def put_to_sleep(link: RingLink, *names: str, is_told: bool = True) -> None:
    """They hibernate; the client has read so, or is about to."""
    for name in names:
        link.send(link.server.hibernate(name))
    if is_told:
        link.run()


def asleep(link: RingLink) -> list[str]:
    return [name for name, stream in link.server.streams.items() if stream.owner is None]


def test_the_next_frame_wakes_its_stream_and_no_other() -> None:
    link = RingLink()
    a, b = link.open("a"), link.open("b")
    step(link, a, X[:3])
    put_to_sleep(link, "a", "b")
    link.server.kinds.clear()
    outputs = step(link, a, X[3:6])
    assert np.array_equal(outputs, reference(X[:6])[0][3:])
    assert link.server.kinds == [Kind.RESUME, Kind.STEP], "no frame went to a handle that is void"
    assert asleep(link) == ["b"]
    assert np.array_equal(step(link, b, X[:2]), reference(X[:2])[0])


def test_a_group_wakes_those_of_its_streams_that_are_stepped() -> None:
    link = RingLink()
    group = link.open("a", "b", "c")
    link.finish(link.session.step(group, np.stack([X[:3]] * 3, axis=1)))
    put_to_sleep(link, "a", "b")
    link.finish(link.session.step(group, np.stack([X[3]] * 2), rows=[1, 2]))
    assert asleep(link) == ["a"]
    outputs = link.finish(link.session.step(group, X[3][None], rows=[0])).outputs
    assert np.array_equal(outputs.ravel(), reference(X[:4])[0][3])


def test_frames_that_crossed_the_word_are_sent_again_under_the_new_handle() -> None:
    link = RingLink()
    handle = link.open("a")
    step(link, handle, X[:2])
    calls = [link.session.step(handle, x) for x in X[2:5]]
    link.advance()
    put_to_sleep(link, "a", is_told=False)
    outputs = np.array([link.finish(call).outputs.ravel() for call in calls])
    assert np.array_equal(outputs, reference(X[:5])[0][2:])
    assert len(link.server.streams["a"].applied) == 5


def test_others_go_on_while_a_stream_wakes() -> None:
    link = RingLink()
    a, b = link.open("a"), link.open("b")
    put_to_sleep(link, "a")
    slow = link.session.step(a, X[0])
    link.advance()
    assert len(link.to_server[link.peer]) == 1, "its RESUME is on its way"
    fast = link.session.step(b, X[0])
    link.advance()
    assert len(link.to_server[link.peer]) == 2
    link.run(slow, fast)
    assert link.server.kinds[-3:] == [Kind.RESUME, Kind.STEP, Kind.STEP]


def test_a_state_is_read_without_waking() -> None:
    link = RingLink()
    handle = link.open("a", "b")
    link.finish(link.session.step(handle, np.stack([X[:3]] * 2, axis=1)))
    put_to_sleep(link, "b")
    seqs, states = link.finish(link.session.read_state(handle))
    assert seqs.tolist() == [3, 3]
    for state in floats_of(states, 4):
        assert np.array_equal(state.ravel(), reference(X[:3])[1].ravel())
    assert asleep(link) == ["b"]


@pytest.mark.parametrize("is_told", [True, False])
def test_a_reset_a_copy_and_a_close_wake_it_also_when_they_crossed_the_word(is_told: bool) -> None:
    link = RingLink()
    handle = link.open("a", "b")
    link.finish(link.session.step(handle, np.stack([X[:3]] * 2, axis=1)))

    def asked_of_sleepers(kind: Kind) -> None:
        link.advance()
        if not is_told:
            assert link.server.kinds[-1] is not kind, "it has not arrived"
            put_to_sleep(link, "b", is_told=False)

    if is_told:
        put_to_sleep(link, "b")
    fork = link.session.fork(handle, ["c", "d"])
    asked_of_sleepers(Kind.FORK)
    copies = link.finish(fork)
    for name in ("c", "d"):
        assert np.array_equal(link.server.streams[name].state.ravel(), reference(X[:3])[1].ravel())
    if is_told:
        put_to_sleep(link, "b")
    reset = link.session.reset(handle, None)
    asked_of_sleepers(Kind.RESET)
    link.finish(reset)
    assert not link.server.streams["a"].state.any()
    assert not link.server.streams["b"].state.any()
    if is_told:
        put_to_sleep(link, "d")
    close = link.session.close(copies)
    link.advance()
    if not is_told:
        put_to_sleep(link, "d", is_told=False)
    for state in floats_of(link.finish(close), 4):
        assert np.array_equal(state.ravel(), reference(X[:3])[1].ravel())
    assert set(link.server.streams) == {"a", "b"}


@pytest.mark.parametrize("is_told", [True, False])
def test_a_read_that_crossed_the_word_is_repeated_by_name(is_told: bool) -> None:
    link = RingLink()
    handle = link.open("a")
    step(link, handle, X[:3])
    read = link.session.read_state(handle)
    link.advance()
    put_to_sleep(link, "a", is_told=is_told)
    seqs, _ = link.finish(read)
    assert seqs.tolist() == [3]
    assert asleep(link) == ["a"]


def test_a_read_of_a_sleeper_that_is_no_more_says_so() -> None:
    link = RingLink()
    handle = link.open("a")
    put_to_sleep(link, "a")
    del link.server.streams["a"]  # somebody else took it over, and closed it
    read = link.session.read_state(handle)
    link.advance()
    link.serve()
    link.deliver()
    with pytest.raises(StreamEvicted) as caught:
        read.result()
    assert caught.value.code is Code.UNKNOWN_STREAM


def test_a_read_that_is_answered_after_its_stream_woke_again_is_repeated() -> None:
    link = RingLink()
    group = link.open("a", "b")
    link.finish(link.session.step(group, np.stack([X[:2]] * 2, axis=1)))
    crossed = link.session.read_state(group)
    link.advance()
    put_to_sleep(link, "a", is_told=False)
    link.serve()
    late = link.to_client.pop()  # the state of "b" takes its time
    link.deliver()
    link.finish(link.session.step(group, X[2][None], rows=[0]))
    link.to_client.append(late)
    seqs, _ = link.finish(crossed)
    assert seqs.tolist() == [3, 2]


def test_leaving_closes_sleepers_too() -> None:
    link = RingLink()
    for name in "abc":
        link.open(name)
    put_to_sleep(link, "a", "c")
    farewell = link.session.leave()
    assert farewell is not None
    link.run(farewell)
    assert not link.server.streams
    assert set(link.server.closed) == set("abc")


def test_leaving_streams_parked_wakes_none() -> None:
    link = RingLink()
    link.open("a")
    put_to_sleep(link, "a")
    assert link.session.leave(park=True) is None
    link.advance()
    assert asleep(link) == ["a"]


def test_another_connection_wakes_none_but_those_that_are_waited_for() -> None:
    link = RingLink()
    a, b, c = (link.open(name) for name in "abc")
    for handle in (a, b, c):
        step(link, handle, X[:2])
    put_to_sleep(link, "a", "b")
    call = link.session.step(a, X[2])
    link.advance()
    link.cut()
    link.run(call)
    assert np.array_equal(call.result().outputs.ravel(), reference(X[:3])[0][2])
    assert asleep(link) == ["b"]
    assert np.array_equal(step(link, b, X[2]).ravel(), reference(X[:3])[0][2])
    assert np.array_equal(step(link, c, X[2]).ravel(), reference(X[:3])[0][2])


def test_a_server_that_is_busy_is_asked_again() -> None:
    link = RingLink()
    handle = link.open("a")
    put_to_sleep(link, "a")
    link.server.busy_resumes = 3
    assert np.array_equal(step(link, handle, X[:1]), reference(X[:1])[0])
    assert link.sockets == 0, "the same connection"
    assert link.server.kinds.count(Kind.RESUME) == 4


def test_a_sleeper_that_has_expired_says_so_with_the_next_frame() -> None:
    link = RingLink()
    handle = link.open("a")
    put_to_sleep(link, "a")
    link.server.expire("a")
    call = link.session.step(handle, X[0])
    link.run(call)
    with pytest.raises(StreamEvicted) as caught:
        call.result()
    assert caught.value.code is Code.EXPIRED


def test_an_answer_that_comes_after_its_stream_woke_again_refuses_nothing() -> None:
    link = RingLink()
    group = link.open("a", "b")
    link.finish(link.session.step(group, np.stack([X[:2]] * 2, axis=1)))
    crossed = link.session.step(group, np.stack([X[2]] * 2))
    link.advance()
    put_to_sleep(link, "a", is_told=False)
    link.serve()
    late = link.to_client.pop()  # the step of "b" takes its time
    link.deliver()
    follows = link.session.step(group, X[3][None], rows=[0])
    link.advance()
    while link.to_server[link.peer]:
        link.serve()
    while link.to_client:
        link.deliver()
    link.advance()
    link.to_client.append(late)
    outputs = link.finish(crossed).outputs
    for column in range(2):
        assert np.array_equal(outputs[column], reference(X[:3])[0][2])
    assert np.array_equal(link.finish(follows).outputs.ravel(), reference(X[:4])[0][3])


def test_where_there_is_no_room_a_frame_waits_until_there_is() -> None:
    link = RingLink()
    a, b = link.open("a"), link.open("b")
    put_to_sleep(link, "a")
    link.server.room = 1
    waiting = link.session.step(a, X[0])
    link.run(at_most_s=5.0)
    assert not waiting.done
    deadline = link.session.deadline()
    assert deadline is not None
    assert deadline > link.now, "it does not spin"
    assert np.array_equal(step(link, b, X[0]).ravel(), reference(X[:1])[0][0]), "others go on"
    link.finish(link.session.close(b))
    assert np.array_equal(link.finish(waiting).outputs.ravel(), reference(X[:1])[0][0])


def test_what_finds_no_room_on_another_connection_sleeps_on() -> None:
    link = RingLink()
    a, b = link.open("a"), link.open("b")
    for handle in (a, b):
        step(link, handle, X[:2])
    link.cut()
    link.server.room = 1
    link.run(link.session.ping(link.now))
    assert len(asleep(link)) == 1
    link.server.room = None
    for handle in (a, b):
        assert np.array_equal(step(link, handle, X[2]).ravel(), reference(X[:3])[0][2])


def test_more_sleepers_than_there_is_room_for_are_closed() -> None:
    link = RingLink()
    group = link.open(*"abcdefgh")
    link.finish(link.session.step(group, np.stack([X[:3]] * 8, axis=1)))
    put_to_sleep(link, *"abcdefg")
    link.server.room = 1
    for state in floats_of(link.finish(link.session.close(group)), 4):
        assert np.array_equal(state.ravel(), reference(X[:3])[1].ravel())
    assert not link.server.streams


def test_a_close_that_waits_for_room_ends_with_the_session() -> None:
    link = RingLink()
    handle = link.open("a")
    put_to_sleep(link, "a")
    link.server.room = 0
    close = link.session.close(handle)
    link.run(at_most_s=1.0)
    assert not close.done
    link.session.fail(ConnectionFailed, "over")
    assert str(close.error) == "over"


def test_leaving_closes_more_sleepers_than_there_is_room_for() -> None:
    link = RingLink()
    link.open(*"abcdefgh")
    put_to_sleep(link, *"abcdefgh")
    link.server.room = 3
    farewell = link.session.leave()
    assert farewell is not None
    link.run(farewell)
    assert not link.server.streams


def half_copied() -> tuple[RingLink, ForkCall]:
    """Copies "c" and "d" of streams of which the second sleeps: the first is made, the other not asked for yet."""
    link = RingLink()
    group = link.open("a", "b")
    fork = link.session.fork(group, ["c", "d"])
    link.advance()
    put_to_sleep(link, "b", is_told=False)
    while "c" not in link.server.streams:
        link.serve()
    while link.to_client:
        link.deliver()
    return link, fork


def test_a_copy_half_of_which_was_made_over_a_lost_connection_is_in_doubt() -> None:
    link, fork = half_copied()
    link.server.busy_resumes = 10
    link.advance()
    link.cut()
    link.server.busy_resumes = 0
    link.run(fork)
    with pytest.raises(ConnectionFailed, match="may have been opened"):
        fork.result()
    assert set(link.server.streams) == {"a", "b", "c"}


def test_many_sleepers_are_asked_for_together() -> None:
    link = RingLink()
    handles = [link.open(f"s{number}") for number in range(50)]
    put_to_sleep(link, *(f"s{number}" for number in range(50)))
    calls = [link.session.step(handle, X[0]) for handle in handles]
    link.run(*calls)
    assert link.server.kinds.count(Kind.RESUME) == 1


def test_a_stream_that_is_resumed_while_its_sleeper_is_waited_for_belongs_to_who_resumed_it() -> None:
    link = RingLink()
    former = link.open("a")
    step(link, former, X[:2])
    put_to_sleep(link, "a")
    waiting = link.session.step(former, X[2])
    resume = link.session.resume(["a"], 2, link.session.table.epochs(former), take_over=False, single=True)
    link.run(resume, waiting)
    assert np.array_equal(step(link, resume.result(), X[2:4]), reference(X[:4])[0][2:])
    with pytest.raises(StreamEvicted, match="resumed again"):
        waiting.result()
    assert link.server.kinds.count(Kind.RESUME) == 1


@pytest.mark.parametrize("is_cancelled", [True, False])
def test_a_sleeper_goes_on_when_its_resuming_came_to_nothing(is_cancelled: bool) -> None:
    link = RingLink()
    former = link.open("a")
    step(link, former, X[:2])
    put_to_sleep(link, "a")
    names = ["a"] if is_cancelled else ["a", "not there"]
    epochs = link.session.table.epochs(former)[0]
    resume = link.session.resume(names, None, epochs, take_over=False, single=is_cancelled)
    waiting = link.session.step(former, X[2])
    if is_cancelled:
        link.session.cancel(resume)
    link.run(resume, waiting)
    assert np.array_equal(waiting.result().outputs.ravel(), reference(X[:3])[0][2])


def test_leaving_closes_what_half_made_copies_were_granted() -> None:
    link, fork = half_copied()
    assert not fork.done, "the copy of the sleeper is asked for when it has woken"
    farewell = link.session.leave()
    assert farewell is not None
    link.run(farewell)
    assert not link.server.streams
