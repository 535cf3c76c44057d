"""Which blocks are answered in one message, and with what."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from instep.core.blocks import Block
from instep.core.rings import Rings
from instep.core.verdict import Admission
from instep.server.answers import answer, together
from instep.server.clients import Client

from instep.core.streams import StreamTable
from instep.core.typing import F32
from instep_client.protocol import wire
from instep_client.protocol.codes import Code

CLIENTS = [Client(number=0, arrival=1 + arrival, routing_id=b"", last_heard_ns=0) for arrival in range(3)]
"""Each had its number when the one before was gone, whose blocks are answered nevertheless."""
STREAMS, WINDOW, OUTPUTS = 12, 4, 2


def verdict(columns: int, first_slot: int = 1) -> Admission:
    """All of so many columns of 2 timesteps is to be computed."""
    slots, none, two = np.arange(first_slot, first_slot + columns), np.zeros(columns, np.int64), np.full(columns, 2)
    rows, codes = rings().rows(slots, np.arange(2)[:, None]), np.zeros(columns, np.int32)
    return Admission(slots, rows, none, two.copy(), codes, two.copy(), two.copy(), is_whole=True)


def blocks_of(verdict: Admission, *widths: int, client: Client = CLIENTS[0]) -> list[Block[Client]]:
    ends = np.cumsum(widths).tolist()
    return [
        Block(client, number, 2, verdict, end - width, width, 2 * width, came_ns=0)
        for number, (width, end) in enumerate(zip(widths, ends, strict=True))
    ]


def rings() -> Rings:
    """Whose outputs are all different."""
    made = Rings(StreamTable(STREAMS, max_owners=3), WINDOW, STREAMS, 1, OUTPUTS, max_pending=100)
    made.y[:] = np.arange(made.y.size).reshape(made.y.shape)
    return made


def expected(made: Rings, slots: list[int]) -> F32:
    rows = made.rows(np.array(slots), np.arange(2)[:, None])
    return np.asarray(made.y[rows], np.float32)


def test_an_answer_has_the_outputs_of_each_column_in_order() -> None:
    made, one, other = rings(), verdict(4), verdict(3, first_slot=6)
    first, second, third = blocks_of(one, 1, 2, 1)
    (lone,) = blocks_of(other, 3)
    for blocks, slots in (
        ([first, second, third], [1, 2, 3, 4]),
        ([second, first], [2, 3, 1]),
        ([first, third, lone, second], [1, 4, 6, 7, 8, 2, 3]),
    ):
        found = answer(blocks, made)
        np.testing.assert_array_equal(found.y, expected(made, slots))
        assert found.slots.tolist() == slots
        assert found.fresh.tolist() == [2] * len(slots)


def test_what_was_not_applied_is_nan() -> None:
    made, one = rings(), verdict(3)
    one.codes[:] = [0, Code.NOT_FINITE, Code.SEQ_GAP]
    one.lengths[:], one.is_whole = [2, 1, 0], False
    found = answer(blocks_of(one, 1, 2), made)
    assert np.isnan(found.y[:, :, 0]).tolist() == [[False, False, True], [False, True, True]]
    assert (found.codes.tolist(), found.lengths.tolist()) == ([0, Code.NOT_FINITE, Code.SEQ_GAP], [2, 1, 0])


def test_frames_that_were_applied_before_have_the_outputs_of_then() -> None:
    made, one = rings(), verdict(3)
    one.skipped[:], one.is_whole = [0, 1, 2], False
    blocks = blocks_of(one, 1, 2)
    blocks[1].repeated = np.full((2, 2, OUTPUTS), -1, np.float32)
    found = answer(blocks[::-1], made)
    assert (found.y[:, :, 0] == -1).tolist() == [[True, True, False], [False, True, False]]


def test_some_columns_of_an_answer_keep_no_others_alive() -> None:
    whole = answer(blocks_of(verdict(4), 4), rings())
    part = whole.of(slice(1, 3))
    np.testing.assert_array_equal(part.y, whole.y[:, 1:3])
    assert part.y.base is None
    assert part.slots.tolist() == [2, 3]


WIDTHS = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=400)


@given(WIDTHS, st.integers(2, 300))
def test_each_block_is_answered_once_with_others_of_its_client_and_within_bounds(
    sent: list[tuple[int, int]], most_frames: int
) -> None:
    one = verdict(3)
    blocks = [
        Block(CLIENTS[client], number, 2, one, 0, width, 2 * width, came_ns=0)
        for number, (client, width) in enumerate(sent)
    ]
    messages = together(blocks, most_frames)
    for message in messages:
        assert len({block.client.arrival for block in message}) == 1
        assert 1 <= len(message) <= 1 + wire.MAX_ALSO
        assert len(message) == 1 or 2 * sum(block.width for block in message) <= most_frames
    for client in CLIENTS:
        asked = [block.request for block in blocks if block.client is client]
        assert [b.request for message in messages if message[0].client is client for b in message] == asked


def test_blocks_of_a_client_are_in_as_few_messages_as_there_may_be() -> None:
    blocks = blocks_of(verdict(3), 1, 1, 1)
    assert [len(message) for message in together(blocks, 100)] == [3]
    assert [len(message) for message in together(blocks, 4)] == [2, 1]
    many = [Block(CLIENTS[0], number, 1, verdict(1), 0, 1, 1, 0) for number in range(200)]
    assert [len(message) for message in together(many, 1000)] == [128, 72]
