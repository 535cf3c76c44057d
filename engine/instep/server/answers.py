"""What blocks are answered with, and which of them in one message."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from instep.core.blocks import Block
from instep.core.rings import Rings, timesteps
from instep.core.typing import F32, I32, I64
from instep.core.verdict import Admission
from instep.server.clients import Client
from instep_client.protocol import wire


@dataclass(frozen=True, slots=True)
class Answer:
    """Of T × N frames: of a block, or of several beside each other."""

    slots: I64
    fresh: I64
    """How many timesteps of the column had been admitted to be computed."""
    codes: I32
    lengths: I64
    expected_seq: I64
    y: F32
    """float32 [T, N, outputs], NaN where a frame was not applied."""
    are_distinct: bool
    """Whether the slots are known to be."""

    def of(self, columns: slice) -> Answer:
        """That of some columns; their outputs copied, as in an outbox the answer of one may not keep those of all."""
        return Answer(
            self.slots[columns],
            self.fresh[columns],
            self.codes[columns],
            self.lengths[columns],
            self.expected_seq[columns],
            self.y[:, columns].copy(),
            self.are_distinct,
        )


def together(blocks: Sequence[Block[Client]], most_frames: int) -> list[list[Block[Client]]]:
    """Blocks of equally many timesteps by client, as each message answers them.

    Args:
        blocks: what is complete, at least one.
        most_frames: frames, computed or not, in a message of more than one block.
    """
    if len(blocks) == 1:
        return [list(blocks)]
    messages: list[list[Block[Client]]] = []
    newest: dict[int, list[Block[Client]]] = {}
    columns: dict[int, int] = {}
    most_columns = most_frames // blocks[0].timesteps
    for block in blocks:
        # Not the number: that of a client that is gone, whose blocks are still to be answered, may be another's now.
        client, width = block.client.arrival, block.width
        message = newest.get(client)
        if message is None or len(message) > wire.MAX_ALSO or columns[client] + width > most_columns:
            message = newest[client] = []
            messages.append(message)
            columns[client] = 0
        message.append(block)
        columns[client] += width
    return messages


def answer(blocks: Sequence[Block[Client]], rings: Rings) -> Answer:
    """What blocks of equally many timesteps are answered with, beside each other."""
    pieces = list(_pieces(blocks))
    verdict = pieces[0] if len(pieces) == 1 else Admission.beside(pieces)
    y = rings.outputs(verdict.rows)
    if not verdict.is_whole:
        _repeat(blocks, y)
        y[timesteps(len(y)) >= verdict.lengths] = np.nan
    are_distinct = verdict.is_whole and len(pieces) == 1
    return Answer(verdict.slots, verdict.fresh, verdict.codes, verdict.lengths, verdict.expected_seq, y, are_distinct)


def _pieces(blocks: Sequence[Block[Client]]) -> Iterator[Admission]:
    """The verdicts on blocks, those that lie side by side in one in one piece."""
    verdict, start, end = blocks[0].verdict, blocks[0].first, blocks[0].first
    for block in blocks:
        if block.verdict is not verdict or block.first != end:
            yield verdict.of(slice(start, end))
            verdict, start = block.verdict, block.first
        end = block.first + block.width
    yield verdict if end - start == len(verdict.slots) else verdict.of(slice(start, end))


def _repeat(blocks: Sequence[Block[Client]], y: F32) -> None:
    """Put the outputs of frames that were applied before in their places."""
    end = 0
    for block in blocks:
        start, end = end, end + block.width
        if block.repeated is not None:
            skipped = block.verdict.skipped[block.columns]
            are_repeated = timesteps(len(block.repeated)) < skipped
            y[: len(block.repeated), start:end][are_repeated] = block.repeated[are_repeated]
