"""Messages that are admitted in one go are judged as if each had come by itself."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from instep_client.protocol.codes import Code
from tests.support.streaming import failures, streaming

STREAMS, WINDOW = 3, 3
VALUES = st.sampled_from([0.0, 1.0, -0.5, np.nan])


@dataclass(frozen=True)
class Sent:
    """A STEP: the origin, the streams of a client by place, their first seqs, and a value for each frame."""

    origin: int
    streams: list[int]
    seqs: list[int]
    acked: int
    values: list[list[float]]


@st.composite
def messages(draw: st.DrawFn) -> Sent:
    streams = draw(st.lists(st.integers(0, 2 * STREAMS), min_size=1, max_size=3))
    timesteps = draw(st.integers(1, 3))
    frames = st.lists(VALUES, min_size=len(streams), max_size=len(streams))
    return Sent(
        draw(st.integers(0, 1)),
        streams,
        [draw(st.integers(0, 4)) for _ in streams],
        draw(st.sampled_from([0, 0, 0, 1])),
        [draw(frames) for _ in range(timesteps)],
    )


async def outcome(sent: list[Sent], *, together: bool) -> tuple[list[object], list[int]]:
    """What each message was answered with, by tag, and what each stream expects in the end."""
    async with streaming(max_streams=2 * STREAMS, window=WINDOW, credit=8, max_pending=12, max_batch_size=4) as kit:
        origins = [kit.listen(), kit.listen()]
        grants = [
            await kit.operations.open(each, [f"{each.number}-{n}" for n in range(STREAMS)], None, None)
            for each in origins
        ]
        handles = np.concatenate([*(each.handles for each in grants), np.array([77], np.uint64)])  # the last is unknown
        for tag, message in enumerate(sent):
            x = np.repeat(np.array(message.values, np.float32)[:, :, None], 5, axis=2)
            kit.submit(origins[message.origin], tag, handles[message.streams], message.seqs, x, message.acked)
            if not together:
                kit.loop.turn()
        kit.loop.turn()
        await kit.finish_all()
        answers: dict[int, object] = {}
        for origin in origins:
            answers |= dict(origin.refusals)
            for reply in origin.replies:
                first, refused = 0, failures(reply)
                for tag, width in reply.messages.T.tolist():
                    own = [(column - first, *rest) for column, *rest in refused if first <= column < first + width]
                    answers[tag] = (reply.y[:, first : first + width].tobytes(), own)
                    first += width
        assert kit.engine.is_quiet
        assert kit.engine.unanswered_messages == 0
        return [answers[tag] for tag in range(len(sent))], kit.table.next_seq[1:].tolist()


@settings(max_examples=60)
@given(st.lists(messages(), min_size=1, max_size=8))
def test_outcomes_do_not_depend_on_what_arrives_with_a_message(sent: list[Sent]) -> None:
    assert asyncio.run(outcome(sent, together=True)) == asyncio.run(outcome(sent, together=False))


def test_the_messages_above_meet_every_outcome() -> None:
    """Of the refusals that do not need a second message, so that the comparison above means something."""
    sent = [
        Sent(0, [0], [0], 0, [[1.0], [np.nan]]),
        Sent(0, [1, 6], [4, 0], 0, [[1.0, 1.0]]),
        Sent(0, [3], [0], 0, [[1.0]]),
        Sent(0, [2, 2], [0, 0], 0, [[1.0, 1.0]]),
        Sent(1, [3, 4, 5], [0, 0, 0], 0, [[1.0] * 3] * 3),
        Sent(1, [3], [0], 1, [[1.0]]),
    ]
    answers, next_seqs = asyncio.run(outcome(sent, together=True))
    codes = [answer if isinstance(answer, Code) else [each[2] for each in answer[1]] for answer in answers]  # type: ignore[index]
    assert codes == [
        [Code.NOT_FINITE],
        [Code.SEQ_GAP, Code.UNKNOWN_STREAM],
        [Code.FOREIGN_STREAM],
        Code.REPEATED_STREAM,
        Code.BUSY,
        [Code.ACK_AHEAD],
    ]
    assert next_seqs == [1, 0, 0, 0, 0, 0]
