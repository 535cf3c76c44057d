"""Messages that a stream stands in more than once, in pieces that it does not."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from instep.server.burst import Step, apart
from instep.server.clients import Client
from instep_client import wire

CLIENT = Client(0, 1, b"", 0)


def step(request: int, handles: list[int]) -> Step:
    columns = np.zeros(len(handles), wire.COLUMN)
    columns["handle"] = handles
    return Step(CLIENT, request, 1, len(handles), len(handles), columns.tobytes(), b"", 0)


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), max_size=12))
def test_pieces_are_in_order_without_repeats_and_as_few_as_there_may_be(messages: list[list[int]]) -> None:
    steps = [step(request, handles) for request, handles in enumerate(messages)]
    pieces = list(apart(steps))
    assert [one for piece in pieces for one in piece] == steps
    of_piece = [[handle for one in piece for handle in messages[one.request]] for piece in pieces]
    for piece, handles in zip(pieces, of_piece, strict=True):
        assert len(set(handles)) == len(handles) or len(piece) == 1
    for (_, handles), after in zip(zip(pieces, of_piece, strict=True), pieces[1:], strict=False):
        joined = handles + messages[after[0].request]
        assert len(set(joined)) < len(joined)
