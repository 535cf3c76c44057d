"""STEP messages that arrive together are judged as if each had come by itself."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instep.runtime.runs import Ended

from instep.core.typing import F32, I32, I64
from instep_client.protocol import wire
from instep_client.protocol.wire import Code, Kind
from tests.support.models import SMALL, whole
from tests.support.turning import Turning

F, WINDOW, STREAMS, BATCH = 5, 3, 3, 4
LIMITS = {"window_frames": WINDOW, "credit_frames": 6, "max_block_frames": 6, "max_pending_frames": 10}


def made(**limits: int) -> tuple[Turning, list[Any]]:
    """A server with two clients, and the handles of the three streams of each."""
    turning = Turning(SMALL, engine={"max_streams": 2 * STREAMS, "max_batch_size": BATCH}, limits={**LIMITS, **limits})
    return turning, [turning.opens(client, STREAMS) for client in (0, 1)]


def one(value: float = 1.0) -> F32:
    return np.full((1, 1, F), value, np.float32)


def codes(frames: list[bytes]) -> list[Code]:
    return [Code(int(entry["code"])) for entry in np.frombuffer(frames[1], wire.FAILURE)]


def kinds(turning: Turning) -> list[tuple[int, int, Kind, list[Code]]]:
    """Client, request, kind and codes of each answer."""
    return [
        (client, header[1], Kind(header[0]), [Code(header[2])] if header[0] == Kind.ERROR else codes(frames))
        for client, header, frames in turning.answers()
    ]


def one_batch(turning: Turning) -> int:
    """How many frames the next batch has."""
    before = turning.server.statistics.frames_total
    job = turning.jobs.popleft()
    job.done(job.call(), None)
    return turning.server.statistics.frames_total - before


async def test_messages_of_two_clients_step_in_one_batch_and_each_is_answered() -> None:
    turning, (of_one, of_other) = made()
    for value, (client, handles) in enumerate([(0, of_one), (1, of_other), (0, of_one[1:])]):
        turning.steps(client, handles[:1], [0], one(value), [0])
    turning.take()
    turning.server.engine.schedule()
    assert one_batch(turning) == 3
    for value, (client, header, frames) in enumerate(sorted(turning.answers(), key=lambda answer: answer[1][1])):
        assert (client, *header[:2]) == (value % 2, Kind.STEPPED, 1 + value)
        truth, _ = whole(SMALL, one(value)[0], max_batch_size=BATCH)
        np.testing.assert_array_equal(np.frombuffer(frames[0], "<f4"), truth[0])


def sent(turning: Turning) -> list[tuple[int, int, list[int]]]:
    """Client, request and what is answered beside it, of each message."""
    headers = [(client, msgpack.unpackb(frames[0])) for client, frames in turning.sent]
    assert all(header[0] == Kind.STEPPED for _, header in headers)
    return [(client, header[1], header[-1]) for client, header in headers]


async def test_what_one_client_asks_together_is_answered_in_one_message() -> None:
    turning, (of_one, of_other) = made()
    turning.steps(0, of_one[:1], [0], one(1), [0])
    turning.steps(1, of_other[:1], [0], one(2), [0])
    turning.steps(0, of_one[1:], [0, 0], np.array([[[3] * F, [np.nan] * F]], np.float32), [0, 0])
    turning.turn()
    assert sorted(sent(turning)) == [(0, 1, [3, 1]), (1, 2, [])]
    assert [client.frames_unanswered for client in turning.server._clients.all()] == [0, 0]
    truths = {value: whole(SMALL, one(value)[0], max_batch_size=BATCH)[0][0] for value in (1, 2, 3)}
    for client, header, frames in turning.answers():
        y = np.frombuffer(frames[0], "<f4").reshape(-1, SMALL.description.outputs)
        np.testing.assert_array_equal(y[0], truths[header[1]], f"request {header[1]} of client {client}")
        assert codes(frames) == ([Code.NOT_FINITE] if header[1] == 3 else [])


async def test_no_answer_waits_for_another_ones_frames() -> None:
    turning, (handles, others) = made(window_frames=8, credit_frames=8)
    turning.steps(1, others[:1], [0], one(), [0])
    turning.turn(steps=False)  # now it is known that steps take no time, and there are runs
    turning.sent.clear()
    turning.steps(0, handles[:1], [0], np.ones((3, 1, F), np.float32), [0])
    turning.take()
    turning.server.engine.schedule()
    turning.steps(0, handles[:1], [3], np.ones((2, 1, F), np.float32), [0])
    turning.take()
    turning.steps(0, handles[:1], [5], one(), [0])  # behind others of its stream
    turning.steps(0, handles[1:2], [0], one(), [0])
    turning.steps(0, handles[2:], [0], one(np.nan), [0])  # nothing to compute
    turning.take()
    assert sent(turning) == [(0, 6, [])]
    assert one_batch(turning) == 3  # of the one stream, before the others came
    turning.server.engine.schedule()
    assert one_batch(turning) == 2
    assert sent(turning)[1:] == [(0, 2, []), (0, 5, [])]
    turning.turn()
    assert sent(turning)[3:] == [(0, 3, []), (0, 4, [])]


async def test_a_client_gets_no_answers_of_the_gone_one_that_had_its_number() -> None:
    engine = {"max_streams": 4, "max_batch_size": BATCH, "max_queue_delay_us": 10**7}
    turning = Turning(SMALL, engine=engine, limits=LIMITS)
    handles, clients = turning.opens(0, 1), turning.server._clients
    turning.steps(0, handles, [0], one(1), [0])
    turning.take()
    gone = clients.all()[0]
    turning.server._postbox.give_up(gone)
    turning.server.lifecycle.departures.tidy()
    others = turning.opens(1, 1)
    came = clients.all()[0]
    assert came.number == gone.number
    turning.steps(1, others, [0], one(2), [0])
    turning.take()
    turning.server.engine.draining = True  # nothing is held any more
    turning.server.engine.schedule()
    assert one_batch(turning) == 2
    assert sent(turning) == [(1, 2, [])]
    ((_, _, frames),) = turning.answers()
    np.testing.assert_array_equal(np.frombuffer(frames[0], "<f4"), whole(SMALL, one(2)[0], max_batch_size=BATCH)[0][0])
    assert came.frames_unanswered == 0


async def test_the_times_of_a_message_are_those_of_its_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    turning, (handles, _) = made()
    now_ns = 10**9
    monkeypatch.setattr("instep.server.engine.time.monotonic_ns", lambda: now_ns)
    for number in (0, 1):
        turning.steps(0, handles[number : number + 1], [0], one(), [0])
        turning.take()
        now_ns += 7_000_000
    turning.server.engine.schedule()
    job = turning.jobs.popleft()
    job.done(Ended(now_ns, now_ns + 2_000_000, 1, None), None)
    ((_, frames),) = turning.sent
    header = msgpack.unpackb(frames[0])
    assert (header[1], header[-1]) == (1, [2, 1])
    assert header[4:7] == [14_000, 2_000, 0]


async def test_no_answer_waits_for_the_next_batch() -> None:
    turning = Turning(SMALL, engine={"max_streams": 2 * STREAMS, "max_batch_size": 2}, limits=LIMITS)
    handles, others = turning.opens(0, STREAMS), turning.opens(1, STREAMS)
    turning.steps(1, others[:1], [0], one(), [0])
    for number in (0, 1):
        turning.steps(0, handles[number : number + 1], [0], one(), [0])
    turning.take()
    turning.server.engine.schedule()
    assert one_batch(turning) == 2
    assert sorted(sent(turning)) == [(0, 2, []), (1, 1, [])]


async def test_no_answer_waits_for_a_stream_that_is_held() -> None:
    turning, (handles, _) = made()
    turning.says(0, wire.pack_header(Kind.RESET, 99, 1, 0), handles[:1].tobytes(), b"")
    turning.take()
    for number in (0, 1):
        turning.steps(0, handles[number : number + 1], [0], one(), [0])
    turning.take()
    turning.server.engine.schedule()
    step = next(job for job in turning.jobs if job.step is not None)
    step.done(step.call(), None)
    assert sent(turning) == [(0, 2, [])]


async def test_an_answer_is_no_larger_than_a_block_may_be() -> None:
    turning, (handles, _) = made(max_block_frames=4)
    for number in range(3):
        turning.steps(0, handles[number : number + 1], [0], np.ones((2, 1, F), np.float32), [0])
    turning.turn()
    assert sorted(sent(turning)) == [(0, 1, [2, 1]), (0, 3, [])]
    assert [client.frames_unanswered for client in turning.server._clients.all()] == [0, 0]
    assert turning.server.statistics.blocks_total == 3


async def test_a_stream_that_stands_in_two_messages_is_judged_in_their_order() -> None:
    turning, (handles, _) = made()
    turning.steps(0, handles[:1], [0], one(), [0])
    turning.steps(0, handles[[1, 0]], [0, 1], np.ones((1, 2, F), np.float32), [0, 0])
    turning.steps(0, handles[:1], [1], one(), [0])
    turning.turn()
    assert kinds(turning) == [(0, 3, Kind.STEPPED, [Code.SEQ_REPEATED]), *((0, n, Kind.STEPPED, []) for n in (1, 2))]
    assert turning.server.engine.table.next_seq[1:3].tolist() == [2, 1]


async def test_a_stream_twice_in_one_message_refuses_that_message_alone() -> None:
    turning, (handles, _) = made()
    turning.steps(0, handles[:1], [0], one(), [0])
    turning.steps(0, handles[[1, 1]], [0, 1], np.ones((1, 2, F), np.float32), [0, 0])
    turning.steps(0, handles[2:], [0], one(), [0])
    turning.turn()
    assert sorted(kinds(turning)) == [
        (0, 1, Kind.STEPPED, []),
        (0, 2, Kind.ERROR, [Code.REPEATED_STREAM]),
        (0, 3, Kind.STEPPED, []),
    ]


async def test_a_bad_message_among_good_ones_is_refused_alone() -> None:
    turning, (handles, others) = made()
    turning.steps(0, handles[:1], [0], one(), [0])
    turning.steps(0, handles[1:2], [0], one(np.nan), [0])
    turning.steps(0, others[:1], [0], one(), [0])
    turning.steps(0, handles[1:2], [0], np.ones((1, 1, F + 1), np.float32), [0])
    turning.steps(0, handles[2:], [0], one(), [0])
    turning.turn()
    assert sorted(kinds(turning)) == [
        (0, 1, Kind.STEPPED, []),
        (0, 2, Kind.STEPPED, [Code.NOT_FINITE]),
        (0, 3, Kind.STEPPED, [Code.FOREIGN_STREAM]),
        (0, 4, Kind.ERROR, [Code.WRONG_SHAPE]),
        (0, 5, Kind.STEPPED, []),
    ]


async def test_credit_that_ends_within_a_burst_refuses_what_is_beyond_it() -> None:
    turning, (handles, others) = made(credit_frames=2, max_block_frames=2)
    for number in range(3):
        turning.steps(0, handles[number : number + 1], [0], one(), [0])
    turning.steps(1, others[:1], [0], one(), [0])
    turning.turn()
    assert sorted(kinds(turning)) == [
        *((0, n, Kind.STEPPED, []) for n in (1, 2)),
        (0, 3, Kind.ERROR, [Code.BUSY]),
        (1, 4, Kind.STEPPED, []),
    ]


async def test_room_that_ends_within_a_burst_refuses_what_is_beyond_it() -> None:
    turning, (handles, others) = made()
    for client, whose in ((0, handles), (1, others)):
        turning.steps(client, whose, [0] * STREAMS, np.ones((2, STREAMS, F), np.float32), [0] * STREAMS)
    turning.turn()
    assert sorted(kinds(turning)) == [(0, 1, Kind.STEPPED, []), (1, 2, Kind.ERROR, [Code.BUSY])]


async def test_frames_that_were_refused_take_no_credit_from_what_comes_behind_them() -> None:
    turning, (handles, _) = made(credit_frames=2, max_block_frames=2)
    for number, value in enumerate((np.nan, 1.0, 1.0)):
        turning.steps(0, handles[number : number + 1], [0], one(value), [0])
    turning.turn()
    assert [found[-1] for found in sorted(kinds(turning))] == [[Code.NOT_FINITE], [], []]


async def test_what_comes_behind_steps_finds_them_admitted() -> None:
    turning, (handles, _) = made()
    turning.steps(0, handles[:1], [0], one(), [0])
    turning.says(0, wire.pack_header(Kind.RESET, 99, 1, 0), handles[:1].tobytes(), b"")
    turning.turn()
    (_, header, frames), _ = turning.answers()
    assert Kind(header[0]) is Kind.CHANGED
    assert np.frombuffer(frames[0], wire.FAILURE)["code"].tolist() == [Code.FRAMES_PENDING]


COLUMNS = st.tuples(st.integers(0, 2 * STREAMS - 1), st.sampled_from([0, 0, 0, -1, 1]), st.sampled_from([0, 0, 1, -1]))
"""A stream, how far its seq is from what it would be, and how far what is acknowledged."""
STEPS = st.tuples(
    st.integers(0, 1),
    st.lists(COLUMNS, min_size=1, max_size=3),
    st.sampled_from([1, 1, 1, 2]),
    st.sampled_from([1, np.nan]),
)
MESSAGES = st.lists(st.one_of(STEPS, STEPS, STEPS, st.sampled_from(["turn", "turn", "ping", "bad"])), max_size=25)


def outcome(messages: list[Any], at_once: int) -> list[Any]:
    """All answers and what the server knows in the end, where it takes so many messages at once."""

    async def run() -> list[Any]:
        turning, (of_one, of_other) = made()
        handles, server = np.concatenate([of_one, of_other]), turning.server
        table, seen = server.engine.table, []
        for message in [*messages, "turn"]:
            if message == "turn":
                turning.turn(at_once)
                seen += sorted(
                    (client, header[1], header, frames[:1], codes(frames) if frames else [])
                    for client, header, frames in turning.answers()
                )
            elif message == "ping":
                turning.says(0, wire.pack_header(Kind.PING, 77))
            elif message == "bad":
                turning.says(1, b"\xc1")
            else:
                client, columns, timesteps, value = message
                slots = 1 + np.array([stream for stream, _, _ in columns])
                seqs = np.maximum(table.next_seq[slots] + [seq for _, seq, _ in columns], 0)
                acked = np.maximum(table.step_seq[slots] + [acked for _, _, acked in columns], 0)
                x = np.full((timesteps, len(columns), F), value, np.float32)
                turning.steps(client, handles[slots - 1], seqs, x, acked)
        assert not table.pending.any()
        assert [client.frames_unanswered for client in server._clients.all()] == [0, 0]
        assert (server.engine.rings.pending_count, len(server.engine.blocks)) == (0, 0)
        known: list[I64 | I32] = [table.next_seq, table.step_seq, table.acked]
        return [*seen, *(column.tolist() for column in known)]

    return asyncio.run(run())


@settings(max_examples=60, deadline=None)
@given(MESSAGES)
def test_a_burst_comes_to_the_same_as_its_messages_one_by_one(messages: list[Any]) -> None:
    assert outcome(messages, at_once=256) == outcome(messages, at_once=1)


async def test_frames_of_one_stream_that_a_run_answers_together_are_all_pending_no_more() -> None:
    turning = Turning(SMALL, engine={"max_streams": 2}, limits={"window_frames": 64})
    handles = turning.opens(0, 1)
    for turn in range(3):
        for seq in range(5 * turn, 5 * turn + 5):
            turning.steps(0, handles[:1], [seq], one(seq), [5 * turn])
        turning.turn()
        assert len(turning.answers()) == 5
        assert not turning.server.engine.table.pending.any()


async def test_what_a_run_computed_is_answered_before_what_came_meanwhile_is_admitted() -> None:
    turning, (handles, _) = made(window_frames=4)
    turning.steps(0, handles[:1], [0], one(1), [0])
    turning.take()
    turning.server.engine.schedule()
    turning.steps(0, handles[:1], [7], one(2), [0])  # a gap, and so refused at once
    turning.server._verbs.take(*turning.arrived.popleft())
    turning.server._verbs.admit_if_due()
    turning.turn()
    assert [codes(frames) for _, _, frames in turning.answers()] == [[], [Code.SEQ_GAP]]


async def test_an_output_is_sent_before_the_frame_that_takes_its_place_is_computed() -> None:
    """Where nothing has to be durable first; though the client says that it has it when it is still computed."""
    turning, (handles, _) = made(window_frames=1)
    turning.steps(0, handles[:1], [0], one(1), [0])
    turning.take()
    turning.server.engine.schedule()
    turning.steps(0, handles[:1], [1], one(2), [1])
    turning.server._verbs.take(*turning.arrived.popleft())
    turning.server._verbs.admit_if_due()
    assert turning.server._verbs.taken_blocks == 1
    job = turning.jobs.popleft()
    ran, stepped = job.call(), []
    turning.server._worker.submit = lambda job: stepped.append((job, job.call()))  # type: ignore[method-assign]
    job.done(ran, None)
    for second, ran in stepped:
        second.done(ran, None)
    found = {header[1]: np.frombuffer(frames[0], "<f4") for _, header, frames in turning.answers()}
    expected = whole(SMALL, np.concatenate([one(1)[0], one(2)[0]]), max_batch_size=BATCH)[0]
    np.testing.assert_array_equal(found[1], expected[0])
    np.testing.assert_array_equal(found[2], expected[1])


async def test_a_batch_is_held_from_when_its_first_frame_came_not_from_its_admission() -> None:
    turning = Turning(SMALL, engine={"max_streams": 4, "max_queue_delay_us": 1000})
    handles = turning.opens(0, 2)
    turning.steps(0, handles[:1], [0], one(1), [0])
    before_ns = time.monotonic_ns()
    turning.server._verbs.take(*turning.arrived.popleft())
    after_ns = time.monotonic_ns()
    await asyncio.sleep(0.002)
    turning.server._verbs.admit_taken()
    scheduler = turning.server.engine.scheduler
    assert scheduler.hold_ns(before_ns, open_count=99) >= 1_000_000
    assert scheduler.hold_ns(after_ns + 1_000_000, open_count=99) == 0
