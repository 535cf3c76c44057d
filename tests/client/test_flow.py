"""Which frames go out in which block, when, and what becomes of the answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from instep_client.calls import StepCall
from instep_client.codes import SENTENCES, Code
from instep_client.errors import ClientClosed, FrameFailure, FramesRefused, InstepError, InvalidInput, StreamEvicted
from instep_client.streams import Lane
from instep_client.wire import COLUMN, Kind, ServerInfo
from tests.support.fake_server import F32, INFO, Message, error, evicted, reference, stepped
from tests.support.session_link import Link, headers, refuse

X = np.arange(60, dtype=np.float32).reshape(20, 3)
BAD = np.array([np.nan, 0, 0], np.float32)


def limited(credit: int = 16_384, block: int = 16_384) -> Link:
    return Link(replace(INFO, credit_frames=credit, max_block_frames=block))


def blocks(messages: list[Message]) -> list[tuple[list[tuple[int, int]], list[Any]]]:
    """The columns (handle, seq) and x of every STEP."""
    read = []
    for header, message in zip(headers(messages), messages, strict=True):
        if header[0] is Kind.STEP:
            x = np.frombuffer(message[2], "<f4").reshape(header[2:5])
            read.append((np.frombuffer(message[1], COLUMN).tolist(), x[:, :, 0].tolist()))
    return read


def sizes(messages: list[Message]) -> list[tuple[int, int]]:
    """(T, N) of every STEP."""
    return [(header[2], header[3]) for header in headers(messages) if header[0] is Kind.STEP]


def refusal(call: StepCall) -> FramesRefused:
    assert isinstance(call.error, FramesRefused)
    return call.error


def test_a_step_is_these_bytes() -> None:
    link = Link()
    link.session.step(link.open("a"), [1, 2, 3])
    [message] = link.advance()
    assert [frame.hex(" ", -4) for frame in message] == [
        "96030301 0103a266 34",
        "01000000 00000000 00000000 00000000",
        "0000803f 00000040 00004040",
    ]


@pytest.mark.parametrize("length", [1, 7])
def test_a_chunk_is_one_block_and_answers_as_the_network_does(length: int) -> None:
    link = Link()
    lane = link.open("a")
    step = link.session.step(lane, X[:length])
    assert blocks(link.advance()) == [([(1, 0)], X[:length, :1].tolist())]
    answer = link.finish(step)
    assert answer.outputs.tolist() == reference(X[:length])[0].tolist()
    assert (answer.queue_us, answer.compute_us, answer.send_us) == (7, 8, 9)
    assert link.session.next_seqs(lane).tolist() == [length]


def test_single_frames_of_many_streams_travel_together_second_frames_in_a_second_block() -> None:
    link = Link()
    a, b, c = (link.open(name) for name in "abc")
    order = [a, b, a, c, b, a]
    calls = [link.session.step(lane, X[index]) for index, lane in enumerate(order)]
    assert blocks(link.advance()) == [
        ([(1, 0), (2, 0), (3, 0)], [[0, 3, 9]]),
        ([(1, 1), (2, 1)], [[6, 12]]),
        ([(1, 2)], [[15]]),
    ]
    link.settle()
    for lane in (a, b, c):
        mine = [index for index, other in enumerate(order) if other is lane]
        expected, _ = reference(X[mine])
        assert [calls[index].result().outputs.tolist() for index in mine] == expected.tolist()


def test_a_group_steps_all_its_streams_or_some_rows_in_their_order() -> None:
    link = Link()
    group = link.open("a", "b", "c")
    all_of_them = link.session.step(group, X[:3])
    some = link.session.step(group, X[:4].reshape(2, 2, 3), rows=[2, 0])
    assert blocks(link.advance()) == [
        ([(1, 0), (2, 0), (3, 0)], [[0, 3, 6]]),
        ([(3, 1), (1, 1)], [[0, 3], [6, 9]]),
    ]
    link.settle()
    assert all_of_them.result().outputs.shape == (3, 2)
    assert some.result().outputs[:, 1].tolist() == reference(X[[0, 1, 3]])[0][1:].tolist()
    assert link.session.next_seqs(group).tolist() == [3, 1, 3]


@pytest.mark.parametrize(
    ("timesteps", "columns", "block", "expected"),
    [
        (7, 1, 3, [(3, 1), (3, 1), (1, 1)]),
        (5, 3, 6, [(2, 3), (2, 3), (1, 3)]),
        (2, 5, 4, [(1, 3), (1, 2), (1, 3), (1, 2)]),
        (1, 9, 4, [(1, 3), (1, 3), (1, 3)]),
    ],
)
def test_large_calls_are_cut_into_blocks_within_the_limits_and_put_together_again(
    timesteps: int, columns: int, block: int, expected: list[tuple[int, int]]
) -> None:
    link = limited(block=block)
    x = np.random.default_rng(0).integers(-8, 8, (timesteps, columns, 3)).astype(np.float32)
    lane = link.open(*[f"s{i}" for i in range(columns)])
    step = link.session.step(lane, x[:, 0] if columns == 1 else x)
    assert sizes(link.advance()) == expected
    outputs = link.finish(step).outputs.reshape(timesteps, columns, 2)
    for column in range(columns):
        assert outputs[:, column].tolist() == reference(x[:, column])[0].tolist()
    assert link.session.next_seqs(lane).tolist() == [timesteps] * columns


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        (replace(INFO, max_message_bytes=48), [(1, 3), (1, 3), (1, 1)]),  # 3 columns of 16 bytes
        (replace(INFO, max_message_bytes=4), [(1, 1)] * 7),  # not even one frame: left for the server to refuse
        (replace(INFO, outputs=2**24), [(1, 1)] * 7),  # answers of 64 MiB
        (replace(INFO, credit_frames=8), [(1, 2), (1, 2), (1, 2), (1, 1)]),  # a quarter of the credit
    ],
)
def test_blocks_stay_within_what_both_sides_take(info: ServerInfo, expected: list[tuple[int, int]]) -> None:
    link = Link(info)
    link.session.step(link.open(*"abcdefg"), X[:7])
    assert sizes(link.advance()) == expected


def test_a_chunk_stays_within_the_largest_frame_too() -> None:
    link = Link(replace(INFO, max_message_bytes=24))
    link.session.step(link.open("a"), X[:5])
    assert sizes(link.advance()) == [(2, 1), (2, 1), (1, 1)]


def test_the_longest_of_each_time_is_told_of_several_blocks() -> None:
    link = limited(block=1)
    step = link.session.step(link.open("a"), X[:2])
    link.advance()
    y = np.zeros((1, 1, 2), np.float32)
    link.deliver(stepped(3, y, times=(1, 20, 3)), stepped(4, y, times=(10, 2, 30)))
    answer = step.result()
    assert (answer.queue_us, answer.compute_us, answer.send_us) == (10, 20, 30)


def test_nothing_is_sent_beyond_the_credit_and_lanes_take_turns() -> None:
    link = limited(credit=4)
    big, small = link.open("big"), link.open("small")
    chunk = link.session.step(big, X[:8])
    frames = [link.session.step(small, x) for x in X[:2]]
    assert blocks(link.advance()) == [
        ([(1, 0)], [[0]]),
        ([(2, 0)], [[0]]),
        ([(1, 1)], [[3]]),
        ([(2, 1)], [[3]]),
    ]
    assert link.advance() == []
    link.serve(1)
    link.deliver()
    assert sizes(link.advance()) == [(1, 1)]
    assert not frames[1].done
    link.settle()
    assert chunk.result().outputs.tolist() == reference(X[:8])[0].tolist()
    assert frames[1].result()


@pytest.mark.parametrize("chunk", [1, 2])
def test_many_lanes_share_the_credit(chunk: int) -> None:
    link = limited(credit=4, block=1)
    for lane in [link.open(f"s{i}") for i in range(6)]:
        link.session.step(lane, X[:chunk])
    assert sum(t * n for t, n in sizes(link.advance())) == 4


def test_full_blocks_of_single_frames_are_sent_as_they_fill() -> None:
    link = limited(block=2)
    for lane in [link.open(f"s{i}") for i in range(5)]:
        link.session.step(lane, X[0])
    assert sizes(link.advance()) == [(1, 2), (1, 2), (1, 1)]


def test_refused_frames_leave_the_others_and_the_next_seq_follows_the_server() -> None:
    link = Link()
    group = link.open("a", "b")
    x = np.ones((3, 2, 3), np.float32)
    x[1, 1] = BAD
    step = link.session.step(group, x)
    link.settle()
    refused = refusal(step)
    assert refused.code is Code.NOT_FINITE
    assert refused.failures == (FrameFailure("b", 1, Code.NOT_FINITE, 1),)
    assert refused.outputs[:, 0].tolist() == reference(x[:, 0])[0].tolist()
    assert refused.outputs[0, 1].tolist() == [3, 4]
    assert np.isnan(refused.outputs[1:, 1]).all()
    assert link.session.next_seqs(group).tolist() == [3, 1]
    again = link.finish(link.session.step(group, np.ones((2, 3))))
    assert again.outputs[1].tolist() == reference(np.ones((2, 3), np.float32))[0][1].tolist()


def test_frames_pipelined_behind_a_refused_one_are_refused_too_and_then_the_stream_goes_on() -> None:
    link = Link()
    lane = link.open("a")
    first, bad, behind = (link.session.step(lane, x) for x in (X[0], BAD, X[1]))
    link.settle()
    assert first.result()
    assert refusal(bad).failures == (FrameFailure("a", 1, Code.NOT_FINITE, 1),)
    assert refusal(behind).failures == (FrameFailure("a", 2, Code.SEQ_GAP, 1),)
    assert link.finish(link.session.step(lane, X[1])).outputs.tolist() == reference(X[:2])[0][1].tolist()


class TestSetBack:
    """Failures that come in an order in which only some of them say what the server expects now."""

    Y: F32 = np.full((1, 1, 2), np.nan, np.float32)

    def lane(self, count: int) -> tuple[Link, Lane]:
        """A lane with frames 0 to count - 1 on their way, as requests 3 and up."""
        link = Link()
        lane = link.open("a")
        for x in X[:count]:
            link.session.step(lane, x)
            link.advance()
        return link, lane

    def fail(self, link: Link, number: int, code: Code, expected: int) -> None:
        link.deliver(stepped(number, self.Y, [(0, 0, code, expected)]))

    def test_the_next_refusal_sets_right_what_an_earlier_one_could_not_know(self) -> None:
        link, lane = self.lane(2)
        self.fail(link, 4, Code.NOT_FINITE, 1)
        assert link.session.next_seqs(lane).tolist() == [1]
        self.fail(link, 3, Code.STEP_FAILED, 0)
        assert link.session.next_seqs(lane).tolist() == [1]
        link.session.step(lane, X[0])
        link.advance()
        self.fail(link, 5, Code.SEQ_GAP, 0)
        assert link.session.next_seqs(lane).tolist() == [0]

    def test_what_was_sent_before_says_nothing_of_what_was_sent_after(self) -> None:
        link, lane = self.lane(2)
        self.fail(link, 3, Code.NOT_FINITE, 0)
        link.session.step(lane, X[0])
        link.advance()
        self.fail(link, 4, Code.SEQ_GAP, 0)
        assert link.session.next_seqs(lane).tolist() == [1]

    def test_nor_once_that_failed_as_well(self) -> None:
        link, lane = self.lane(2)
        self.fail(link, 3, Code.NOT_FINITE, 0)
        link.session.step(lane, X[:2])
        link.advance()
        link.deliver(stepped(5, np.full((2, 1, 2), np.nan, np.float32), [(0, 1, Code.NOT_FINITE, 1)]))
        assert link.session.next_seqs(lane).tolist() == [1]
        self.fail(link, 4, Code.SEQ_GAP, 0)
        assert link.session.next_seqs(lane).tolist() == [1]

    def test_a_repeated_seq_sets_the_stream_forward(self) -> None:
        link, lane = self.lane(1)
        self.fail(link, 3, Code.SEQ_REPEATED, 7)
        assert link.session.next_seqs(lane).tolist() == [7]


def test_a_frame_that_waited_to_be_sent_behind_a_refused_one_is_not_sent() -> None:
    link = limited(credit=1)
    lane = link.open("a")
    bad, behind = link.session.step(lane, BAD), link.session.step(lane, X[0])
    link.settle()
    assert link.rules.blocks == [(1, 1)]
    assert refusal(bad).code is Code.NOT_FINITE
    assert refusal(behind).failures == (FrameFailure("a", 0, Code.SEQ_GAP, 0),)
    assert np.isnan(refusal(behind).outputs).all()
    assert "an earlier frame of this stream was refused" in str(behind.error)


def test_the_rest_of_a_chunk_is_not_sent_once_a_frame_of_it_was_refused() -> None:
    link = limited(credit=8, block=2)
    lane = link.open("a", "b")
    x = np.ones((6, 2, 3), np.float32)
    x[1, 0] = BAD
    step = link.session.step(lane, x)
    link.settle()
    assert sum(t * n for t, n in link.rules.blocks) < 12
    assert refusal(step).failures == (FrameFailure("a", 1, Code.NOT_FINITE, 1),)
    assert refusal(step).outputs[:, 1].tolist() == reference(x[:, 1])[0].tolist()
    assert link.session.next_seqs(lane).tolist() == [1, 6]


def test_a_refused_message_is_a_refusal_of_all_its_frames_and_is_not_sent_again() -> None:
    link = Link()
    group = link.open("a", "b")
    link.finish(link.session.step(group, X[:2]))
    step = link.session.step(group, X[:4].reshape(2, 2, 3))
    link.advance()
    refuse(link, Code.TOO_LARGE)
    link.settle()
    assert len(link.rules.blocks) == 1
    assert refusal(step).failures == (
        FrameFailure("a", 1, Code.TOO_LARGE, 1),
        FrameFailure("b", 1, Code.TOO_LARGE, 1),
    )
    assert refusal(step).outputs.shape == (2, 2, 2)
    assert link.session.next_seqs(group).tolist() == [1, 1]


def test_a_stream_that_the_server_does_not_know_has_ended() -> None:
    link = Link()
    lane, group = link.open("a"), link.open("b", "c")
    link.rules.end([1, 2])
    lone, many = link.session.step(lane, X[0]), link.session.step(group, X[:2])
    link.settle()
    assert isinstance(lone.error, StreamEvicted)
    assert lone.error.code is Code.UNKNOWN_STREAM
    assert [(f.stream, f.code) for f in refusal(many).failures] == [("b", Code.UNKNOWN_STREAM)]
    with pytest.raises(StreamEvicted):
        link.session.step(lane, X[0])
    assert link.finish(link.session.step(group, X[:1], rows=[1])).outputs.shape == (1, 2)


class TestBusy:
    def busy(self, link: Link, retry_after_us: int = 2000) -> None:
        refuse(link, Code.BUSY, retry_after_us)

    def test_everything_waits_then_refused_frames_go_first_in_their_order(self) -> None:
        link = Link()
        a, b = link.open("a"), link.open("b")
        calls = []
        for x in X[:3]:
            calls.append(link.session.step(a, x))
            link.advance()
        self.busy(link)  # frame 0: refused
        link.serve()  # frames 1 and 2: gaps
        link.deliver()
        calls += [link.session.step(a, X[3]), link.session.step(b, X[0])]
        assert link.advance() == []
        link.settle_client()
        assert link.advance(0.0019) == []
        assert link.session.deadline() == pytest.approx(link.now + 0.0001)
        assert blocks(link.advance(0.0002)) == [
            ([(1, 0)], [[0]]),
            ([(1, 1)], [[3]]),
            ([(1, 2)], [[6]]),
            ([(1, 3), (2, 0)], [[9, 0]]),
        ]
        link.settle()
        outputs = [call.result().outputs.tolist() for call in calls[:4]]
        assert outputs == reference(X[:4])[0].tolist()

    def test_answers_still_on_the_way_are_waited_for(self) -> None:
        link = Link()
        a, b = link.open("a"), link.open("b")
        link.session.step(a, X[0])
        link.advance()
        link.session.step(b, X[0])
        link.advance()
        held = link.to_server.popleft()
        self.busy(link)
        link.deliver()
        assert link.session.deadline() == link.now + 5.0  # the watch for silence, nothing sooner
        assert link.advance(1.0) == []
        link.to_server.append(held)
        link.serve()
        link.deliver()
        assert sizes(link.advance()) == [(1, 1)]

    def test_the_longest_wait_counts(self) -> None:
        link = Link()
        lane = link.open("a")
        for x in X[:2]:
            link.session.step(lane, x)
            link.advance()
        self.busy(link, 9000)
        self.busy(link, 1000)
        link.settle_client()
        assert link.advance(0.008) == []
        assert sizes(link.advance(0.002)) == [(1, 1), (1, 1)]

    def test_only_columns_behind_a_refused_frame_are_sent_again(self) -> None:
        link = Link()
        group = link.open("a", "b")
        first = link.session.step(group, X[:1], rows=[0])
        link.advance()
        both = link.session.step(group, X[1:3])
        link.advance()
        self.busy(link, 0)
        link.serve()
        link.settle_client()
        assert blocks(link.advance()) == [([(1, 0)], [[0]]), ([(1, 1)], [[3]])]
        link.settle()
        assert first.result().outputs.tolist() == reference(X[:1])[0].tolist()
        assert both.result().outputs.tolist() == [reference(X[:2])[0][1].tolist(), reference(X[2:3])[0][0].tolist()]

    def test_a_gap_behind_another_refusal_is_told_not_sent_again(self) -> None:
        link = Link()
        lane = link.open("a")
        calls = [link.session.step(lane, x) for x in (BAD, X[0], X[1])]
        link.advance()
        link.serve(1)
        self.busy(link, 0)
        link.serve()
        link.settle()
        assert [refusal(call).code for call in calls] == [Code.NOT_FINITE, Code.SEQ_GAP, Code.SEQ_GAP]
        assert len(link.rules.blocks) == 2  # the refused frame and the last: the one answered BUSY was given up

    def test_a_gap_after_all_is_well_again_is_told(self) -> None:
        link = Link()
        lane = link.open("a")
        link.session.step(lane, X[0])
        link.advance()
        self.busy(link, 0)
        link.settle()
        step = link.session.step(lane, X[1])
        link.advance()
        link.deliver(stepped(5, np.full((1, 1, 2), np.nan, np.float32), [(0, 0, Code.SEQ_GAP, 0)]))
        assert refusal(step).code is Code.SEQ_GAP

    def test_frames_of_a_stream_evicted_meanwhile_are_given_up(self) -> None:
        link = Link()
        group, lone = link.open("a", "b"), link.open("c")
        many, one = link.session.step(group, X[:2]), link.session.step(lone, X[0])
        link.advance()
        self.busy(link)
        self.busy(link)
        link.settle_client()
        link.rules.end([1, 3])
        link.deliver(evicted([1, 3]))
        link.advance(1.0)
        link.settle()
        assert [(f.stream, f.code) for f in refusal(many).failures] == [("a", Code.IDLE)]
        assert SENTENCES[Code.IDLE] in refusal(many).sentence
        assert refusal(many).outputs[1].tolist() == reference(X[1:2])[0][0].tolist()
        assert isinstance(one.error, StreamEvicted)

    def test_the_end_of_the_session_ends_what_waits_to_be_sent_again(self) -> None:
        link = Link()
        step = link.session.step(link.open("a"), X[0])
        link.advance()
        self.busy(link)
        link.settle_client()
        link.session.fail(InstepError, "over")
        assert str(step.error) == "over"


class TestKept:
    def test_outputs_are_taken_in_the_order_of_the_sends_each_at_its_place(self) -> None:
        link = Link()
        lane = link.open("a")
        calls = [link.session.step(lane, x, keep=True) for x in (X[0], BAD, X[:2])]
        assert link.session.take(lane) is None
        assert not link.session.outputs_end(lane)
        link.advance()
        assert all(call.sent for call in calls)
        link.settle()
        assert [link.session.take(lane) for _ in range(4)] == [*calls, None]
        assert refusal(calls[1]).code is Code.NOT_FINITE
        link.session.finish(lane)
        assert link.session.outputs_end(lane)
        with pytest.raises(ClientClosed, match="was finished"):
            link.session.step(lane, X[0], keep=True)
        assert link.finish(link.session.step(lane, X[0]))

    def test_the_lane_is_woken_when_its_outputs_change(self) -> None:
        link = Link()
        lane = link.open("a")
        link.session.take_woken()
        call = link.session.step(lane, X[0], keep=True)
        link.advance()
        assert link.session.take_woken() == [call]
        link.settle()
        assert link.session.take_woken() == [call, lane]
        link.session.finish(lane)
        assert link.session.take_woken() == [lane]

    def test_unread_outputs_hold_the_stream_back_until_they_are_taken(self) -> None:
        link = limited(credit=4)
        lane, other = link.open("a"), link.open("b")
        kept = [link.session.step(lane, x, keep=True) for x in X[:5]]
        behind = link.session.step(lane, X[5])
        link.settle()
        assert [call.sent for call in kept] == [True, True, True, True, False]
        assert link.finish(link.session.step(other, X[0]))
        assert link.session.take(lane) is kept[0]
        link.settle()
        assert kept[4].done
        assert behind.done

    def test_a_chunk_larger_than_the_bound_goes_when_nothing_else_is_unread(self) -> None:
        link = limited(credit=4)
        lane = link.open("a")
        chunk = link.session.step(lane, X[:10], keep=True)
        assert link.finish(chunk).outputs.shape == (10, 2)

    def test_nobody_reading_is_an_error_after_the_timeout(self) -> None:
        link = limited(credit=1)
        lane = link.open("a")
        link.session.step(lane, X[0], keep=True)
        held_back = link.session.step(lane, X[1], keep=True)
        link.settle()
        assert link.session.deadline() == link.now + 10.0
        link.advance(9.9)
        assert not held_back.done
        link.advance(0.1)
        with pytest.raises(InstepError, match="nobody reads the outputs of stream 'a': 1 frames wait"):
            held_back.result()
        assert link.session.take(lane)
        assert link.finish(link.session.step(lane, X[1], keep=True))


class TestWithdrawn:
    def test_what_was_not_sent_is_not_sent_and_the_rest_is_dropped_when_it_comes(self) -> None:
        link = limited(credit=1)
        lane = link.open("a")
        sent, waiting, last = (link.session.step(lane, x) for x in X[:3])
        link.advance()
        for call in (sent, waiting):
            link.session.cancel(call)
        link.settle()
        assert last.result().outputs.tolist() == reference(X[[0, 2]])[0][1].tolist()
        assert link.session.next_seqs(lane).tolist() == [2]

    def test_a_kept_call_that_was_not_sent_leaves_no_output(self) -> None:
        link = limited(credit=4, block=1)
        lane = link.open("a")
        link.session.step(link.open("b"), X[:2])
        first = link.session.step(lane, X[0], keep=True)
        half = link.session.step(lane, X[1:3], keep=True)
        last = link.session.step(lane, X[3], keep=True)
        link.advance()
        link.session.cancel(half)
        link.session.cancel(first)  # sent: counts as sent
        link.settle()
        assert [link.session.take(lane) for _ in range(3)] == [first, last, None]
        assert lane.unread == 0
        assert last.result().outputs.tolist() == reference(X[[0, 1, 3]])[0][2].tolist()

    def test_a_call_held_back_by_unread_outputs_can_be_withdrawn(self) -> None:
        link = limited(credit=1)
        lane = link.open("a")
        link.session.step(lane, X[0], keep=True)
        held_back = link.session.step(lane, X[1], keep=True)
        link.settle()
        link.session.cancel(held_back)
        assert lane.unread == 1
        assert link.session.deadline() is None
        assert link.finish(link.session.step(lane, X[2])).outputs.tolist() == reference(X[[0, 2]])[0][1].tolist()

    def test_the_only_call_of_a_lane_can_be_withdrawn(self) -> None:
        link = Link()
        lane = link.open("a")
        call = link.session.step(lane, X[0])
        link.session.cancel(call)
        assert link.advance() == []
        assert link.finish(link.session.step(lane, X[0]))


@pytest.mark.parametrize("x", [np.zeros(2), np.zeros((1, 1, 3)), ["a", "b", "c"]])
def test_bad_input_sends_nothing(x: Any) -> None:
    link = Link()
    with pytest.raises(InvalidInput):
        link.session.step(link.open("a"), x)
    assert link.advance() == []


def test_rows_belong_to_groups_of_that_size() -> None:
    link = Link()
    group = link.open("a", "b")
    with pytest.raises(InvalidInput, match="from 0 to 1"):
        link.session.step(group, X[:1], rows=[2])
    with pytest.raises(InvalidInput, match="1 streams must have shape"):
        link.session.step(group, X[:2], rows=[1])


def test_what_the_user_does_to_an_array_changes_nothing_that_was_sent() -> None:
    link = Link()
    lane = link.open("a")
    x: F32 = X[0].copy()
    step = link.session.step(lane, x)
    x[:] = 100
    link.advance()
    refuse(link, Code.BUSY)
    link.settle_client()
    x[:] = 200
    assert link.finish(step).outputs.tolist() == reference(X[:1])[0][0].tolist()


def test_outputs_belong_to_the_user() -> None:
    link = Link()
    lanes: list[Lane] = [link.open("a"), link.open("b"), link.open("c", "d")]
    calls = [link.session.step(lane, X[:2] if not lane.single else X[0]) for lane in lanes]
    link.settle()
    for call in calls:
        outputs = call.result().outputs
        assert outputs.flags.writeable
        assert outputs.base is None or outputs.base.base is None
        outputs += 1


def test_an_error_that_answers_nothing_ends_the_session() -> None:
    link = Link()
    step = link.session.step(link.open("a"), X[0])
    link.advance()
    link.deliver(error(77, Code.TOO_LARGE))
    with pytest.raises(InstepError, match="could not read a message"):
        step.result()
