"""STEP messages that came one after another, gathered so that they are admitted in one go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from instep.core.blocks import BlockTable
from instep.core.rings import Rings
from instep.core.typing import F32, I32, U64
from instep.server.clients import Client

_MOST_FRAMES = 1024
"""Frames that are worth joining: beyond that, copying them together costs more than it saves."""


@dataclass(slots=True)
class Step:
    """One STEP message that is good by itself."""

    client: Client
    request: int
    timesteps: int
    columns: int
    frames: int
    """T × N."""
    column: bytes
    """`wire.COLUMN` [N]."""
    x: bytes
    """float32 [T, N, features]."""
    came_ns: int
    """When, on the monotonic clock."""


def join(steps: list[Step], features: int) -> tuple[int | I32, U64, U64, U64, F32]:
    """Messages of equally many timesteps beside each other, as one block of N columns.

    Returns:
        owner: the number of the client where all are of one, else int32 [N], of each column's.
        handles: uint64 [N].
        seqs: uint64 [N].
        acked: uint64 [N].
        x: float32 [T, N, features].
    """
    first = steps[0]
    timesteps = first.timesteps
    if len(steps) == 1:
        owners: int | I32 = first.client.number
        columns, x = np.frombuffer(first.column, "<u8"), np.frombuffer(first.x, "<f4")
    else:
        clients = [step.client.number for step in steps]
        is_one = clients.count(clients[0]) == len(clients)
        owners = clients[0] if is_one else of_columns(steps, np.array(clients, np.int32))
        columns = np.frombuffer(b"".join([step.column for step in steps]), "<u8")
        if timesteps == 1:
            x = np.frombuffer(b"".join([step.x for step in steps]), "<f4")
        else:
            parts = [np.frombuffer(step.x, "<f4").reshape(timesteps, -1, features) for step in steps]
            x = np.concatenate(parts, axis=1)
    return owners, columns[::3], columns[1::3], columns[2::3], x.reshape(timesteps, -1, features)


def of_columns(steps: list[Step], numbers: I32) -> int | I32:
    """For the columns of messages beside each other, the number of its message: the one there is, or int32 [N]."""
    if len(steps) == 1:
        return int(numbers[0])
    columns = [step.columns for step in steps]
    return numbers if len(numbers) == sum(columns) else np.repeat(numbers, columns)


def apart(steps: list[Step]) -> Iterator[list[Step]]:
    """Messages that a stream stands in more than once, in the longest pieces that it does not.

    A message that it stands in twice by itself is a piece by itself.
    """
    piece: list[Step] = []
    handles: set[int] = set()
    for step in steps:
        own = np.frombuffer(step.column, "<u8")[::3].tolist()
        distinct = set(own)
        if piece and (len(distinct) < len(own) or not handles.isdisjoint(distinct)):
            yield piece
            piece, handles = [], set()
        piece.append(step)
        handles |= distinct
        if len(distinct) < len(own):
            yield piece
            piece, handles = [], set()
    if piece:
        yield piece


class Burst:
    """Gathers messages until they are taken; what it holds has no place in rings and blocks yet.

    From the first message that it holds until they are taken nothing else may be admitted. What is stepped and answered
    meanwhile makes more room than it counts on: a message that it does not take may find room once these are taken.

    Args:
        rings: whose room there must be.
        blocks: whose room there must be.
        credit_frames: how many unanswered frames a client may have.
    """

    def __init__(self, rings: Rings, blocks: BlockTable[Client], credit_frames: int) -> None:
        self._rings = rings
        self._blocks = blocks
        self._credit_frames = credit_frames
        self._steps: list[Step] = []
        self._frames = self._room_frames = self._room_blocks = 0
        self.columns = 0
        """Of all messages together."""
        self._firsts: set[bytes] = set()
        """The first stream of each message."""
        self._credit_of: dict[int, int] = {}
        """What is left of it, by the client's number."""

    def __len__(self) -> int:
        return len(self._steps)

    def takes(self, message: Step) -> bool:
        """Gather a message, if there is room for it and it goes with those that are here.

        That is, it has as many timesteps, and begins with another stream. (Streams that stand in several messages
        behind others are found when these are admitted, which then takes longer; see `apart`.)
        """
        steps, frames, number, first = self._steps, message.frames, message.client.number, message.column[:8]
        if not steps:
            self._room_frames, self._room_blocks = self._rings.room, self._blocks.room
        elif message.timesteps != steps[0].timesteps or self._frames + frames > _MOST_FRAMES or first in self._firsts:
            return False
        credit = self._credit_of.get(number)
        if credit is None:
            credit = self._credit_frames - message.client.frames_unanswered
        over_credit = frames > credit
        over_room = self._frames + frames > self._room_frames or len(steps) >= self._room_blocks
        if over_credit or over_room:
            return False
        self._credit_of[number] = credit - frames
        self._firsts.add(first)
        self._frames += frames
        self.columns += message.columns
        steps.append(message)
        return True

    def take(self) -> list[Step]:
        """All messages, in the order in which they came; none are left."""
        steps, self._steps = self._steps, []
        self._frames = self.columns = 0
        self._credit_of.clear()
        self._firsts.clear()
        return steps
