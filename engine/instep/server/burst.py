"""STEP messages that came one after another, gathered so that they are admitted in one go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from instep.core.typing import F32, I32, U64
from instep.server.clients import Client
from instep_client import wire

_MOST_FRAMES = 1024
"""Frames that are worth joining: beyond that, copying them together costs more than it saves."""


@dataclass(slots=True)
class Step:
    """One STEP message that is good by itself, or several of one client beside each other."""

    client: Client
    request: int
    timesteps: int
    columns: int
    """N, of all messages together."""
    column: list[bytes]
    """`wire.COLUMN` [N], each message's."""
    x: list[bytes]
    """float32 [T, N, features], each message's."""
    also: list[int]
    """Requests after the first, and the first column of each, by turns."""

    @property
    def frames(self) -> int:
        """T × N."""
        return self.timesteps * self.columns

    def handles(self) -> list[int]:
        """Those of one message."""
        if self.columns == 1:
            return [int.from_bytes(self.column[0][:8], "little")]
        handles: list[int] = np.frombuffer(self.column[0], "<u8")[::3].tolist()
        return handles

    def add(self, message: Step) -> None:
        """Another message of the client, of as many timesteps."""
        self.also += (message.request, self.columns)
        self.columns += message.columns
        self.column += message.column
        self.x += message.x

    def apart(self) -> Iterator[Step]:
        """Each message by itself."""
        starts = [0, *self.also[1::2]]
        requests, ends = [self.request, *self.also[::2]], [*starts[1:], self.columns]
        for at, (request, start, end) in enumerate(zip(requests, starts, ends, strict=True)):
            yield Step(self.client, request, self.timesteps, end - start, [self.column[at]], [self.x[at]], [])


def join(steps: list[Step], features: int) -> tuple[int | I32, U64, U64, U64, F32]:
    """Messages of equally many timesteps beside each other, as one block of N columns.

    Returns:
        owner: the number of the client where there is one, else int32 [N], of each column's.
        handles: uint64 [N].
        seqs: uint64 [N].
        acked: uint64 [N].
        x: float32 [T, N, features].
    """
    columns = np.frombuffer(b"".join([column for step in steps for column in step.column]), "<u8")
    handles, seqs, acked = columns.reshape(-1, 3).T.copy()
    owners = of_columns([step.client.number for step in steps], [step.columns for step in steps])
    timesteps, parts = steps[0].timesteps, [x for step in steps for x in step.x]
    if len(parts) == 1:
        x = np.frombuffer(parts[0], "<f4").reshape(timesteps, -1, features)
    elif timesteps == 1:
        x = np.frombuffer(b"".join(parts), "<f4").reshape(timesteps, -1, features)
    else:
        x = np.concatenate([np.frombuffer(part, "<f4").reshape(timesteps, -1, features) for part in parts], axis=1)
    return owners, handles, seqs, acked, x


def of_columns(numbers: list[int], columns: list[int]) -> int | I32:
    """What stands for so many columns each, for every column: the one there is, or int32 [N]."""
    if len(numbers) == 1:
        return numbers[0]
    return np.repeat(np.array(numbers, np.int32), columns)


class Burst:
    """Gathers messages until they are taken; what it holds has no place in rings and blocks yet.

    Args:
        most_columns: as many as a batch has: what is answered together is to be stepped together.
    """

    def __init__(self, most_columns: int) -> None:
        self._most_columns = most_columns
        self.frames = 0
        """Frames of all messages together."""
        self._steps: list[Step] = []
        self._newest: dict[int, Step] = {}
        """By the client's number."""
        self._frames_of: dict[int, int] = {}
        self.messages = 0
        self._handles: set[int] = set()
        """Of all messages, once there are two."""

    def frames_of(self, client: Client) -> int:
        """Frames of one client's messages."""
        return self._frames_of.get(client.number, 0)

    def goes_with(self, message: Step) -> bool:
        """Whether a message may be joined with those that are here, if any are.

        It must be of as many timesteps, and no stream stand in them twice: its frames are judged one after the other.
        """
        if not self._steps:
            return True
        first = self._steps[0]
        if message.timesteps != first.timesteps or self.frames + message.frames > _MOST_FRAMES:
            return False
        if not self._handles:
            self._handles.update(first.handles())
        handles = message.handles()
        repeats = len(self._handles) < first.columns or len(set(handles)) < len(handles)
        return not repeats and self._handles.isdisjoint(handles)

    def add(self, message: Step) -> None:
        """Gather a message that goes with the others."""
        number = message.client.number
        self.messages += 1
        self.frames += message.frames
        self._frames_of[number] = self._frames_of.get(number, 0) + message.frames
        if self._steps:
            self._handles.update(message.handles())
        newest = self._newest.get(number)
        if (
            newest is None
            or len(newest.also) == 2 * wire.MAX_ALSO
            or newest.columns + message.columns > self._most_columns
        ):
            self._newest[number] = message
            self._steps.append(message)
        else:
            newest.add(message)

    def take(self) -> list[Step]:
        """All messages, those of a client in the order in which they came; none are left."""
        steps, self._steps = self._steps, []
        self.messages = self.frames = 0
        self._newest.clear()
        self._frames_of.clear()
        self._handles.clear()
        return steps
