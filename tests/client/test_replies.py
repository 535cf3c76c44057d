from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instep_client import replies
from instep_client.protocol import wire
from instep_client.protocol.codes import Code
from instep_client.protocol.errors import MalformedMessage
from instep_client.protocol.wire import Kind
from tests.support.fake_server import INFO, Message, error, evicted, pack, stepped, welcome
from tests.support.step_messages import stepped_header

SAID = [[int(Code.SEQ_GAP), "gap"]]


def failures(*entries: tuple[int, int, int, int]) -> bytes:
    return np.array([(column, t, code, 0, seq) for column, t, code, seq in entries], wire.FAILURE).tobytes()


def read(message: Message, *expected: Any) -> Any:
    """What the function for the message's kind makes of it."""
    header = wire.unpack_header(message)
    match header.kind:
        case Kind.WELCOME:
            return replies.welcome(header, message)
        case Kind.OPENED | Kind.RESUMED:
            return replies.granted(header, message, *(expected or (2,)))
        case Kind.CLOSED:
            return replies.closed(header, message, *(expected or (2, 16)))
        case Kind.STATISTICS:
            return replies.statistics(header, message)
        case Kind.ERROR:
            return replies.error(header)
        case Kind.EVICTED:
            return replies.evicted(header, message)
        case Kind.GOODBYE:
            return replies.goodbye(header)
    raise AssertionError(header.kind)


@pytest.mark.parametrize("names", [(), ("speech", "Geräusch, laut")])
def test_welcome_is_server_info(names: tuple[str, ...]) -> None:
    info = replace(INFO, output_names=names)
    assert read(welcome(1, info)) == info


@pytest.mark.parametrize("names", [b"one", b"a\nb\nc", b"a\n", b"a\n\x1b[2J", b"a\n\xff", b"a\n" + b"b" * 5000])
def test_a_welcome_with_other_names_is_malformed(names: bytes) -> None:
    with pytest.raises(MalformedMessage):
        read([welcome(1, INFO)[0], names])


@pytest.mark.parametrize(
    ("index", "value"),
    [
        *[(0, "1"), (0, 0), (1, 7), (4, True), (4, 0), (4, 2.0), (6, []), (6, [["h", [2], "f4", 0.0]])],
        *[(9, 4), (9, [0]), (9, ["a"]), (14, "1"), (14, None)],
    ],
)
def test_a_welcome_with_another_kind_of_field_is_malformed(index: int, value: Any) -> None:
    fields = INFO.wire_fields()
    fields[index] = value
    with pytest.raises(MalformedMessage):
        read([pack(Kind.WELCOME, 1, *fields), b""])


def test_opened_gives_handles_and_refusals() -> None:
    taken = [[int(Code.NAME_IN_USE), "taken"]]
    given = np.array([(9, 7, 3), (0, 0, 0)], wire.GRANT)
    grants, refused = read([pack(Kind.OPENED, 1, 2, "fsync", taken), given.tobytes(), failures((1, 0, 105, 0))])
    assert grants.tolist() == [(9, 7, 3), (0, 0, 0)]
    assert refused == [(1, 0, Code.NAME_IN_USE, "taken", 0)]


def test_stepped_gives_outputs_failures_and_times() -> None:
    y = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    (answer,) = replies.stepped(stepped(1, y, [(2, 1, Code.NOT_FINITE, 5)], (10, 20, 30)))
    assert answer.request == 1
    assert answer.outputs.tolist() == y.tolist()
    assert answer.failures == [(2, 1, Code.NOT_FINITE, Code.NOT_FINITE.sentence, 5)]
    assert answer.times == (10, 20, 30)


def test_the_code_of_a_later_server_gets_a_sentence_with_its_number() -> None:
    (answer,) = replies.stepped(stepped(1, np.zeros((1, 1, 1), np.float32), [(0, 0, 12_345, 5)]))
    ((_, _, code, sentence, _),) = answer.failures
    assert (int(code), code.name, sentence) == (12_345, "CODE_12345", "code 12345")


def test_closed_gives_states() -> None:
    finals = np.arange(8, dtype=np.float32)
    states, refused = read([pack(Kind.CLOSED, 1, 2, []), finals.tobytes(), b""])
    assert states.tobytes() == finals.tobytes()
    assert refused == []


def test_the_small_ones() -> None:
    assert read([pack(Kind.STATISTICS, 1, [["a", 1], ["b", 0.5]])]) == {"a": 1.0, "b": 0.5}
    assert read(error(1, Code.BUSY, 2000)) == (Code.BUSY, Code.BUSY.sentence, 0.002)
    handles, code, sentence = read(evicted([4, 5]))
    assert (handles.tolist(), code, sentence) == ([4, 5], Code.IDLE, Code.IDLE.sentence)
    assert read([pack(Kind.GOODBYE, 0, "bye")]) == "bye"


def test_a_stepped_of_several_requests_falls_apart_into_one_of_each() -> None:
    y = np.arange(2 * 4 * 2, dtype=np.float32).reshape(2, 4, 2)
    header = stepped_header([(9, 1), (5, 2), (2**40, 1)], 2, 2, (10, 20, 30))
    answers = replies.stepped([header + failures((0, 1, 101, 7), (2, 0, 101, 8)), y.astype("<f4").tobytes()])
    assert [answer.request for answer in answers] == [9, 5, 2**40]
    assert [answer.outputs.shape for answer in answers] == [(2, 1, 2), (2, 2, 2), (2, 1, 2)]
    assert np.concatenate([answer.outputs for answer in answers], axis=1).tolist() == y.tolist()
    assert [[failure[:3] for failure in answer.failures] for answer in answers] == [
        [(0, 1, Code.SEQ_GAP)],
        [(1, 0, Code.SEQ_GAP)],
        [],
    ]
    assert [failure.expected_seq for answer in answers for failure in answer.failures] == [7, 8]
    assert {answer.times for answer in answers} == {(10, 20, 30)}


@pytest.mark.parametrize(
    "entries",
    [
        [(0, 0, 101, 0)] * 4,
        [(0, 0, 101, 0), (0, 1, 101, 0)],
        [(3, 0, 101, 0)],
        [(0, 2, 101, 0)],
        [(0, 0, 0, 0)],
    ],
)
def test_failures_that_contradict_the_block_are_malformed(entries: list[tuple[int, int, int, int]]) -> None:
    y = np.zeros((2, 3, 2), np.float32)
    assert len(replies.stepped(stepped(1, y, [(0, 1, 101, 0), (2, 0, 101, 0)]))[0].failures) == 2
    with pytest.raises(MalformedMessage):
        replies.stepped(stepped(1, y, entries))


@pytest.mark.parametrize(
    ("entries", "sentences"),
    [
        (bytes(23), SAID),
        (failures((3, 0, 101, 0)), SAID),
        (failures((0, 0, 101, 0)), "gap"),
        (failures((0, 0, 101, 0)), [["101", "gap"]]),
    ],
)
def test_failures_and_sentences_that_contradict_the_message_are_malformed(entries: bytes, sentences: Any) -> None:
    good = [pack(Kind.CLOSED, 1, 3, SAID), bytes(48), failures((0, 0, 101, 0), (2, 0, 100, 0))]
    assert [failure[:4] for failure in read(good, 3, 16)[1]] == [
        (0, 0, Code.SEQ_GAP, "gap"),
        (2, 0, Code.NOT_FINITE, Code.NOT_FINITE.sentence),
    ]
    with pytest.raises(MalformedMessage):
        read([pack(Kind.CLOSED, 1, 3, sentences), bytes(48), entries], 3, 16)


@pytest.mark.parametrize(
    "message",
    [
        [pack(Kind.OPENED, 1, 3, "memory", []), b"\1" * 72, b""],
        [pack(Kind.OPENED, 1, 2, "memory", []), b"\0" * 48, b""],
        [pack(Kind.CLOSED, 1, 1, []), b"\0" * 32, b""],
        [pack(Kind.STATISTICS, 1, [["a"]])],
        [pack(Kind.STATISTICS, 1, [["a", True]])],
        [pack(Kind.ERROR, 1, 200, 1, 0)],
        [pack(Kind.EVICTED, 0, 0, 106, "x"), b""],
        [pack(Kind.EVICTED, 0, 1, 0, "x"), b"\0" * 8],
    ],
)
def test_other_contradictions_are_malformed(message: Message) -> None:
    with pytest.raises(MalformedMessage):
        read(message)


@settings(deadline=None)
@given(st.data())
def test_mutated_replies_are_read_or_malformed(data: st.DataObject) -> None:
    message = data.draw(
        st.sampled_from(
            [
                welcome(1, INFO),
                [pack(Kind.RESUMED, 1, 2, "memory", SAID), b"\1" * 24 + b"\0" * 24, failures((1, 0, 105, 0))],
                stepped(1, np.zeros((2, 3, 2), np.float32), [(1, 1, 101, 4)]),
                [pack(Kind.CLOSED, 1, 2, SAID), b"\0" * 32, failures((1, 0, 101, 0))],
                [pack(Kind.STATISTICS, 1, [["a", 1.0], ["b", 2]])],
                error(1, Code.BUSY, 5),
                evicted([1, 2]),
                [pack(Kind.GOODBYE, 0, "x")],
            ]
        )
    )
    frames = [bytearray(frame) for frame in message]
    for _ in range(data.draw(st.integers(1, 4))):
        frame = data.draw(st.sampled_from(frames))
        at = data.draw(st.integers(0, len(frame)))
        if data.draw(st.booleans()):
            frame.insert(at, data.draw(st.integers(0, 255)))
        elif at < len(frame):
            frame[at] = data.draw(st.integers(0, 255))
    mutated = [bytes(frame) for frame in frames]
    try:
        if mutated[0][:1] == b"C":
            replies.stepped(mutated)
            return
        header = wire.unpack_header(mutated)
        if header.kind in (Kind.PONG, *range(1, 11)):
            return
        read(mutated)
    except MalformedMessage:
        pass
