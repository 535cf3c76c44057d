"""Which frames go out in which block, when, and what becomes of the answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from instep_client.protocol.codes import Code
from instep_client.protocol.errors import FrameFailure, StreamEvicted
from instep_client.protocol.wire import ServerInfo
from instep_client.streams import StreamHandle
from tests.support.fake_server import F32, INFO, evicted, reference
from tests.support.session_link import BAD, Link, X, blocks, ending, limited, refusal, refuse, sizes


@pytest.mark.parametrize("length", [1, 7])
def test_a_chunk_is_one_block_and_answers_as_the_network_does(length: int) -> None:
    link = Link()
    handle = link.open("a")
    step = link.session.step(handle, X[:length])
    assert blocks(link.advance()) == [([(1, 0)], X[:length, :1].tolist())]
    answer = link.finish(step)
    assert answer.outputs.tolist() == reference(X[:length])[0].tolist()
    assert (answer.queue_us, answer.compute_us, answer.send_us) == (7, 8, 9)
    assert link.session.table.next_seqs(handle).tolist() == [length]


def test_single_frames_of_many_streams_travel_together_second_frames_in_a_second_block() -> None:
    link = Link()
    a, b, c = (link.open(name) for name in "abc")
    order = [a, b, a, c, b, a]
    calls = [link.session.step(handle, X[index]) for index, handle in enumerate(order)]
    assert blocks(link.advance()) == [
        ([(1, 0), (2, 0), (3, 0)], [[0, 3, 9]]),
        ([(1, 1), (2, 1)], [[6, 12]]),
        ([(1, 2)], [[15]]),
    ]
    link.run()
    for handle in (a, b, c):
        mine = [index for index, other in enumerate(order) if other is handle]
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
    link.run()
    assert all_of_them.result().outputs.shape == (3, 2)
    assert some.result().outputs[:, 1].tolist() == reference(X[[0, 1, 3]])[0][1:].tolist()
    assert link.session.table.next_seqs(group).tolist() == [3, 1, 3]


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
    handle = link.open(*[f"s{i}" for i in range(columns)])
    step = link.session.step(handle, x[:, 0] if columns == 1 else x)
    assert sizes(link.advance()) == expected
    outputs = link.finish(step).outputs.reshape(timesteps, columns, 2)
    for column in range(columns):
        assert outputs[:, column].tolist() == reference(x[:, column])[0].tolist()
    assert link.session.table.next_seqs(handle).tolist() == [timesteps] * columns


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        (replace(INFO, max_message_bytes=72), [(1, 3), (1, 3), (1, 1)]),  # 3 columns of 24 bytes
        (replace(INFO, max_message_bytes=4), [(1, 1)] * 7),  # not even one frame: left for the server to refuse
        (replace(INFO, outputs=2**24), [(1, 1)] * 7),  # answers of 64 MiB
        (replace(INFO, credit_frames=8), [(1, 2), (1, 2), (1, 2), (1, 1)]),  # a quarter of the credit
    ],
)
def test_blocks_stay_within_what_both_sides_take(info: ServerInfo, expected: list[tuple[int, int]]) -> None:
    link = Link(info)
    link.session.step(link.open(*"abcdefg"), X[:7])
    assert sizes(link.advance()) == expected


def test_nothing_is_sent_beyond_the_credit_and_stream_handles_take_turns() -> None:
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
    link.run()
    assert chunk.result().outputs.tolist() == reference(X[:8])[0].tolist()
    assert frames[1].result()


def test_refused_frames_leave_the_others_and_the_next_seq_follows_the_server() -> None:
    link = Link()
    group = link.open("a", "b")
    x = np.ones((3, 2, 3), np.float32)
    x[1, 1] = BAD
    step = link.session.step(group, x)
    link.run()
    refused = refusal(step)
    assert refused.code is Code.NOT_FINITE
    assert refused.failures == (FrameFailure("b", 1, Code.NOT_FINITE, 1),)
    assert refused.outputs[:, 0].tolist() == reference(x[:, 0])[0].tolist()
    assert refused.outputs[0, 1].tolist() == [3, 4]
    assert np.isnan(refused.outputs[1:, 1]).all()
    assert link.session.table.next_seqs(group).tolist() == [3, 1]
    again = link.finish(link.session.step(group, np.ones((2, 3))))
    assert again.outputs[1].tolist() == reference(np.ones((2, 3), np.float32))[0][1].tolist()


def test_a_refused_message_is_a_refusal_of_all_its_frames_and_is_not_sent_again() -> None:
    link = Link()
    group = link.open("a", "b")
    link.finish(link.session.step(group, X[:2]))
    step = link.session.step(group, X[:4].reshape(2, 2, 3))
    link.advance()
    refuse(link, Code.TOO_LARGE)
    link.run()
    assert len(link.rules.blocks) == 1
    assert refusal(step).failures == (
        FrameFailure("a", 1, Code.TOO_LARGE, 1),
        FrameFailure("b", 1, Code.TOO_LARGE, 1),
    )
    assert refusal(step).outputs.shape == (2, 2, 2)
    assert link.session.table.next_seqs(group).tolist() == [1, 1]


def test_a_stream_that_the_server_does_not_know_has_ended() -> None:
    link = Link()
    handle, group = link.open("a"), link.open("b", "c")
    link.rules.end([1, 2])
    lone, many = link.session.step(handle, X[0]), link.session.step(group, X[:2])
    link.run()
    for call, name in ((lone, "a"), (many, "b")):
        error, outputs = ending(call)
        assert (type(error), error.code, error.stream) == (StreamEvicted, Code.UNKNOWN_STREAM, name)
        assert [(f.stream, f.seq, f.code) for f in error.failures] == [(name, 0, Code.UNKNOWN_STREAM)]
        assert np.isnan(outputs[..., 0]).tolist() == (True if call is lone else [True, False])
    with pytest.raises(StreamEvicted):
        link.session.step(handle, X[0])
    assert link.finish(link.session.step(group, X[:1], rows=[1])).outputs.shape == (1, 2)


def test_the_rest_of_a_chunk_is_sent_without_a_stream_that_has_ended() -> None:
    link = limited(credit=8, block=2)
    group = link.open("a", "b")
    x = np.stack([X[:6], X[6:12]], axis=1)
    step = link.session.step(group, x)
    assert sizes(link.advance()) == [(1, 2)] * 4
    link.rules.end([2])
    link.deliver(evicted([2]))
    link.run()
    assert link.rules.blocks == [(1, 2)] * 4 + [(1, 1)] * 2
    error, outputs = ending(step)
    assert [(f.stream, f.seq, f.code) for f in error.failures] == [("b", 0, Code.IDLE)]
    assert outputs[:, 0].tolist() == reference(x[:, 0])[0].tolist()
    assert np.isnan(outputs[:, 1]).all()
    assert int(link.session.table.next_seqs(group)[0]) == 6


def test_what_the_user_does_to_an_array_changes_nothing_that_was_sent() -> None:
    link = Link()
    handle = link.open("a")
    x: F32 = X[0].copy()
    step = link.session.step(handle, x)
    x[:] = 100
    link.advance()
    refuse(link, Code.BUSY)
    link.settle_client()
    x[:] = 200
    assert link.finish(step).outputs.tolist() == reference(X[:1])[0][0].tolist()


def test_outputs_belong_to_the_user() -> None:
    link = Link()
    handles: list[StreamHandle] = [link.open("a"), link.open("b"), link.open("c", "d")]
    calls = [link.session.step(handle, X[:2] if not handle.single else X[0]) for handle in handles]
    link.run()
    for call in calls:
        outputs = call.result().outputs
        assert outputs.flags.writeable
        assert outputs.base is None or outputs.base.base is None
        outputs += 1


def test_steps_of_a_group_keep_their_order_when_a_stream_ends_before_they_are_sent() -> None:
    link = Link()
    group = link.open("a", "b")
    first = link.session.step(group, X[:2])
    link.rules.end([2])
    link.deliver(evicted([2], Code.STATE_LOST))
    second = link.session.step(group, X[2:3], rows=[0])
    assert blocks(link.advance()) == [([(1, 0)], [[0]]), ([(1, 1)], [[6]])]
    link.run()
    error, outputs = ending(first)
    assert error.failures == (FrameFailure("b", 0, Code.STATE_LOST, 0),)
    assert np.isnan(outputs[1]).all()
    truth, _ = reference(X[[0, 2]])
    assert [outputs[0].tolist(), second.result().outputs[0].tolist()] == truth.tolist()
