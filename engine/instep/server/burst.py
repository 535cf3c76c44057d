"""STEP messages that came one after another, gathered so that they are admitted in one go."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from instep.core.typing import F32, I32, U64
from instep.server.clients import Client

_MOST_FRAMES = 1024
"""Frames that are worth joining: beyond that, copying them together costs more than it saves."""


@dataclass(slots=True)
class Asked:
    """One STEP message that is good by itself."""

    client: Client
    request: int
    timesteps: int
    columns: int
    frames: int
    """T × N."""
    column: bytes
    """`wire.COLUMN` [N]."""
    x: F32
    """float32 [T, N, features]."""


def join(asked: list[Asked]) -> tuple[int | I32, U64, U64, U64, F32]:
    """Messages of equally many timesteps beside each other, as one block of N columns.

    Returns:
        owner: the number of the client where there is one message, else int32 [N], of each column's.
        handles: uint64 [N].
        seqs: uint64 [N].
        acked: uint64 [N].
        x: float32 [T, N, features].
    """
    columns = np.frombuffer(b"".join([message.column for message in asked]), "<u8")
    handles, seqs, acked = columns.reshape(-1, 3).T.copy()
    owners = of_columns(asked, [message.client.number for message in asked])
    x = asked[0].x if len(asked) == 1 else np.concatenate([message.x for message in asked], axis=1)
    return owners, handles, seqs, acked, x


def of_columns(asked: list[Asked], numbers: list[int]) -> int | I32:
    """For the columns of messages beside each other, the number of its message: the one there is, or int32 [N]."""
    if len(asked) == 1:
        return numbers[0]
    return np.repeat(np.array(numbers, np.int32), [message.columns for message in asked])


class Burst:
    """Gathers messages until they are taken; what it holds has no place in rings and blocks yet."""

    def __init__(self) -> None:
        self.frames = 0
        """Frames of all messages together."""
        self._messages: list[Asked] = []
        self._frames_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._messages)

    def frames_of(self, client: Client) -> int:
        """Frames of one client's messages."""
        return self._frames_of.get(client.number, 0)

    def goes_with(self, asked: Asked) -> bool:
        """Whether a message may be joined with those that are here, if any are."""
        messages = self._messages
        return not messages or (messages[0].timesteps == asked.timesteps and self.frames + asked.frames <= _MOST_FRAMES)

    def add(self, asked: Asked) -> None:
        """Gather a message that goes with the others."""
        frames, number = asked.frames, asked.client.number
        self._messages.append(asked)
        self.frames += frames
        self._frames_of[number] = self._frames_of.get(number, 0) + frames

    def take(self) -> list[Asked]:
        """All messages, in the order in which they came; none are left."""
        messages, self._messages = self._messages, []
        self.frames = 0
        self._frames_of.clear()
        return messages
