"""Delivery turns complete messages into replies for their origins."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from instep.core.replies import assemble, repeated_outputs
from instep.core.tables import FIRST_MESSAGE, FIRST_VALUE, MESSAGES, TIMESTEPS, WIDTH, Tables
from instep.core.typing import F32, I32, I64
from instep.streaming.api import MAX_REPLY_MESSAGES, Reply
from instep.streaming.origins import Origins
from instep.streaming.stats import EngineStats
from instep_client.protocol.codes import Code


class Answer(Protocol):
    """Sends replies of a front end's origins."""

    def __call__(self, tables: Tables, groups: int, times_ns: tuple[int, int, int], /) -> Sequence[int]:
        """Send what can be sent at once.

        Args:
            tables: as `assemble` has left them.
            groups: how many of `Tables.groups` are replies.
            times_ns: when the step of the last frames began, or 0; how long it took, and how long ago it ended.

        Returns:
            The places of groups that were not sent: these are delivered to their origins.
        """


class Delivery:
    """Answers complete messages; messages of one origin that end with the same step share a reply.

    A reply to several messages has at most `max_reply_frames`, T × N.
    """

    def __init__(self, tables: Tables, origins: Origins, stats: EngineStats, max_reply_frames: int) -> None:
        self._tables = tables
        self._packed = tuple(tables)
        self._origins = origins
        self._stats = stats
        self._max_frames = max_reply_frames
        self._repeated: dict[int, tuple[F32, I64]] = {}
        """By message, outputs that pending messages only repeat."""
        self.answer: Answer = lambda tables, groups, times_ns: range(groups)
        self._arrived_ns: I64 = tables.messages["arrived_ns"]

    def keep_repeated(self, numbers: I32) -> None:
        """Copy outputs that these pending messages, int32 [N], only repeat, because later frames may reuse the rows."""
        for number in numbers.tolist():
            self._repeated[number] = repeated_outputs(self._packed, number)

    def deliver(self, numbers: I32, began_ns: int, ended_ns: int) -> None:
        """Answer complete messages. Times are those of the step of their last frames, 0 if none was stepped."""
        queue_us = self._stats.queue_us
        while len(numbers):
            groups, taken = assemble(self._packed, numbers, began_ns, self._max_frames, MAX_REPLY_MESSAGES, queue_us)
            if self._repeated:
                self._put_repeated(groups)
            now_ns = time.monotonic_ns()
            send_ns = max(0, now_ns - ended_ns) if ended_ns else 0
            self._reply(groups, began_ns, ended_ns - began_ns, send_ns)
            self._stats.replied(self._arrived_ns, numbers[:taken], now_ns, send_ns)
            numbers = numbers[taken:]
        self._origins.release_left()

    def _reply(self, groups: int, began_ns: int, compute_ns: int, send_ns: int) -> None:
        tables, outputs = self._tables, self._tables.y.shape[1]
        left = self.answer(tables, groups, (began_ns, compute_ns, send_ns))
        # The order of these names is that of the columns of `Tables.groups`.
        for place in left:
            fields = tables.groups[place].tolist()
            number, timesteps, width, count, message, column, value, failed, frames, arrived_ns = fields
            origin = self._origins[number]
            if origin is None:
                continue  # it is gone, and its streams are parked
            if failed:
                codes = tables.reply_columns[0, column : column + width]
                self._stats.refuse_streams(codes[codes != Code.UNKNOWN_STREAM])  # `Engine` counts those it admits
            y = tables.reply_y[value : value + timesteps * width * outputs].reshape(timesteps, width, outputs)
            origin.deliver(
                Reply(
                    tables.reply_messages[:2, message : message + count],
                    y,
                    tables.reply_columns[:, column : column + width] if failed else None,
                    frames,
                    max(0, began_ns - arrived_ns) if began_ns else 0,
                    compute_ns,
                    send_ns,
                )
            )

    def _put_repeated(self, groups: int) -> None:
        """Put kept outputs into the replies, because later frames may have reused their rows."""
        tables, outputs = self._tables, self._tables.y.shape[1]
        for fields in tables.groups[:groups]:
            first, width, timesteps = int(fields[FIRST_VALUE]), int(fields[WIDTH]), int(fields[TIMESTEPS])
            whole = tables.reply_y[first : first + timesteps * width * outputs].reshape(timesteps, width, outputs)
            column, message = 0, int(fields[FIRST_MESSAGE])
            messages = tables.reply_messages[1:, message : message + int(fields[MESSAGES])]
            for columns, number in messages.T.tolist():
                kept = self._repeated.pop(number, None)
                if kept is not None:
                    y, skipped = kept
                    mask = np.arange(len(y))[:, None] < skipped
                    whole[: len(y), column : column + columns][mask] = y[mask]
                column += columns
