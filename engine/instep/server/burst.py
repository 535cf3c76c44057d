"""STEP messages that came one after another, gathered so that they are admitted in one go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

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


def join(steps: list[Step], features: int) -> tuple[int | I32, U64, U64, U64, F32]:
    """Messages of equally many timesteps beside each other, as one block of N columns.

    Returns:
        owner: the number of the client where there is one message, else int32 [N], of each column's.
        handles: uint64 [N].
        seqs: uint64 [N].
        acked: uint64 [N].
        x: float32 [T, N, features].
    """
    columns = np.frombuffer(b"".join([step.column for step in steps]), "<u8")
    handles, seqs, acked = columns.reshape(-1, 3).T.copy()
    owners = of_columns(steps, np.array([step.client.number for step in steps], np.int32))
    timesteps = steps[0].timesteps
    if len(steps) == 1:
        x = np.frombuffer(steps[0].x, "<f4").reshape(timesteps, -1, features)
    elif timesteps == 1:
        x = np.frombuffer(b"".join([step.x for step in steps]), "<f4").reshape(timesteps, -1, features)
    else:
        parts = [np.frombuffer(step.x, "<f4").reshape(timesteps, -1, features) for step in steps]
        x = np.concatenate(parts, axis=1)
    return owners, handles, seqs, acked, x


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
    """Gathers messages until they are taken; what it holds has no place in rings and blocks yet."""

    def __init__(self) -> None:
        self.frames = 0
        """Frames of all messages together."""
        self._steps: list[Step] = []
        self._frames_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._steps)

    def frames_of(self, client: Client) -> int:
        """Frames of one client's messages."""
        return self._frames_of.get(client.number, 0)

    def goes_with(self, message: Step) -> bool:
        """Whether a message may be joined with those that are here, if any are: it is of as many timesteps."""
        steps = self._steps
        return not steps or (message.timesteps == steps[0].timesteps and self.frames + message.frames <= _MOST_FRAMES)

    def add(self, message: Step) -> None:
        """Gather a message that goes with the others."""
        frames, number = message.frames, message.client.number
        self._steps.append(message)
        self.frames += frames
        self._frames_of[number] = self._frames_of.get(number, 0) + frames

    def take(self) -> list[Step]:
        """All messages, in the order in which they came; none are left."""
        steps, self._steps = self._steps, []
        self.frames = 0
        self._frames_of.clear()
        return steps
