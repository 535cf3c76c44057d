"""Answers to sent frames: counted, reported when refused, and printed or saved."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from instep_client.protocol.errors import FramesRefused, Refused, StreamEvicted
from instep_client.protocol.wire import F32
from instep_tools.formats.table import json_numbers
from instep_tools.terminal import Terminal

Bool: TypeAlias = npt.NDArray[np.bool_]


class OutputFormat(StrEnum):
    """The format of printed outputs."""

    CSV = "csv"
    JSONL = "jsonl"


class Outputs(Protocol):
    """Receives answered frames in order and saves or shows them."""

    def add(self, stream: str, seq: int, frames: F32, outputs: F32) -> None:
        """Add frames `seq`, `seq + 1`, … of one stream: float32 [T, features] and [T, outputs]."""
        ...


class PrintedOutputs:
    """Prints a line for each frame with stream, seq and output (in JSON also the frame), after CSV column names.

    Each float has the fewest digits that read back as the same float32.
    """

    def __init__(self, write: Callable[[str], object], format: OutputFormat, columns: Sequence[str]) -> None:
        self._write = write
        self._format = format
        self._head = [["stream", "seq", *columns]]

    def add(self, stream: str, seq: int, frames: F32, outputs: F32) -> None:
        """Print frames."""
        if self._format is OutputFormat.CSV:
            text = io.StringIO()
            lines = csv.writer(text, lineterminator="\n")
            lines.writerows(self._head)
            lines.writerows([stream, number, *map(str, y)] for number, y in enumerate(outputs, seq))
            self._head = []
            self._write(text.getvalue())
            return
        name, rows = json.dumps(stream), enumerate(zip(frames, outputs, strict=True), seq)
        self._write(
            "".join(
                f'{{"stream": {name}, "seq": {number}, "x": {json_numbers(x)}, "y": {json_numbers(y)}}}\n'
                for number, (x, y) in rows
            )
        )


@dataclass(frozen=True, slots=True)
class SentFrames:
    """A block in flight."""

    names: tuple[str, ...]
    """The streams' names, [N]."""
    frames: F32
    """The frames, [T, N, features]."""


@dataclass
class Answers:
    """Counts answers and passes outputs on; reports each kind of refusal once per stream."""

    outputs: Outputs | None
    terminal: Terminal
    frames: int = 0
    refused: int = 0
    ended: set[str] = field(default_factory=set)
    """Streams that the server has ended."""
    _seqs: Counter[str] = field(default_factory=Counter)
    _told: set[tuple[str, int]] = field(default_factory=set)

    def take(self, sent: SentFrames, result: F32 | Refused) -> tuple[Bool, F32]:
        """Process a block's outputs [T, N, outputs] or [T, outputs], or its error.

        Returns:
            bool [T, N], the frames that were applied, and their outputs [T, N, outputs], or [T, N, 0] if none was.
        """
        applied: Bool = np.ones(sent.frames.shape[:2], np.bool_)
        if isinstance(result, Refused):
            self._tell(sent, result)
            if isinstance(result, StreamEvicted):
                self.ended.add(result.stream)
            if isinstance(result, FramesRefused):
                result = result.outputs
                applied = np.asarray(np.isfinite(result).any(axis=-1)).reshape(applied.shape)
            else:
                result = np.zeros((*applied.shape, 0), np.float32)
                applied[:] = False
        outputs = result.reshape(*applied.shape, -1)
        count = int(applied.sum())
        self.frames += count
        self.refused += applied.size - count
        if self.outputs is not None and count:
            for column, name in enumerate(sent.names):
                good = applied[:, column]
                self.outputs.add(name, self._seqs[name], sent.frames[good, column], outputs[good, column])
                self._seqs[name] += int(good.sum())
        return applied, outputs

    def _tell(self, sent: SentFrames, refused: Refused) -> None:
        keys = {(sent.names[0], int(refused.code))}
        if isinstance(refused, FramesRefused):
            keys = {(failure.stream, int(failure.code)) for failure in refused.failures}
        if not keys <= self._told:
            self._told |= keys
            self.terminal.error(str(refused))
