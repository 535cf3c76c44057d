"""What is gathered together, and in which pieces it is admitted where a stream stands in it more than once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from instep.core.blocks import BlockTable
from instep.core.rings import Rings
from instep.server.burst import Burst, Step, apart
from instep.server.clients import Client

from instep.core.streams import StreamTable
from instep_client.protocol import wire

CLIENT = Client(0, 1, b"", 0)


def step(request: int, handles: list[int], timesteps: int = 1) -> Step:
    columns = np.zeros(len(handles), wire.COLUMN)
    columns["handle"] = handles
    frames = timesteps * len(handles)
    return Step(CLIENT, request, timesteps, len(handles), frames, columns.tobytes(), b"", 0)


def burst(max_pending: int = 100, blocks: int = 100, credit_frames: int = 100) -> Burst:
    rings = Rings(StreamTable(8, max_owners=1), 4, 8, 1, 1, max_pending)
    return Burst(rings, BlockTable(blocks), credit_frames)


@pytest.mark.parametrize(
    ("found", "taken"),
    [
        (step(3, [3, 4]), True),
        (step(3, [3, 1]), True),  # found when they are admitted
        (step(3, [1, 3]), False),
        (step(3, [3], timesteps=2), False),
    ],
)
def test_a_burst_takes_what_goes_together(found: Step, taken: bool) -> None:
    gathered = burst()
    assert gathered.takes(step(1, [1]))
    assert gathered.takes(step(2, [2, 5]))
    assert gathered.takes(found) == taken
    assert (len(gathered), gathered.columns) == ((3, 5) if taken else (2, 3))
    assert [one.request for one in gathered.take()] == ([1, 2, 3] if taken else [1, 2])
    assert (len(gathered), gathered.columns) == (0, 0)
    assert gathered.takes(found)  # into an empty one


@pytest.mark.parametrize("bounds", [{"max_pending": 3}, {"blocks": 2}, {"credit_frames": 3}])
def test_a_burst_takes_no_more_than_there_is_room_for(bounds: dict[str, int]) -> None:
    gathered = burst(**bounds)
    assert [gathered.takes(step(1, [1])), gathered.takes(step(2, [2, 5])), gathered.takes(step(3, [3]))] == [
        True,
        True,
        False,
    ]


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
