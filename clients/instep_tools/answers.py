"""Answers of a live producer: counted, told of when refused, and handed on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from instep_client.protocol.errors import FramesRefused, Refused
from instep_client.protocol.wire import F32
from instep_tools.outputs import Outputs
from instep_tools.terminal import Terminal


@dataclass(frozen=True, slots=True)
class SentFrames:
    """A block on its way."""

    names: tuple[str, ...]
    """[N]"""
    frames: F32
    """[T, N, features]"""


class Answers:
    """Counts answers and hands outputs on; tells of every kind of refusal once a stream."""

    def __init__(self, outputs: Outputs, terminal: Terminal) -> None:
        self.frames = 0
        self.refused = 0
        self._outputs = outputs
        self._terminal = terminal
        self._seqs: Counter[str] = Counter()
        self._told: set[tuple[str, int]] = set()

    def take(self, sent: SentFrames, result: F32 | Refused) -> None:
        """One block's outputs [T, N, outputs] or [T, outputs], or why it has none."""
        steps, streams, _ = sent.frames.shape
        applied = np.ones((steps, streams), np.bool_)
        if isinstance(result, Refused):
            self._tell(sent, result)
            if not isinstance(result, FramesRefused):
                self.refused += steps * streams
                return
            result = result.outputs
            applied = np.isfinite(result).any(axis=-1).reshape(steps, streams)
        outputs = result.reshape(steps, streams, -1)
        for column, name in enumerate(sent.names):
            good = applied[:, column]
            count = int(good.sum())
            self.frames += count
            self.refused += steps - count
            if count:
                self._outputs.add(name, self._seqs[name], sent.frames[good, column], outputs[good, column])
                self._seqs[name] += count

    def _tell(self, sent: SentFrames, refused: Refused) -> None:
        keys = {(sent.names[0], int(refused.code))}
        if isinstance(refused, FramesRefused):
            keys = {(failure.stream, int(failure.code)) for failure in refused.failures}
        if not keys <= self._told:
            self._told |= keys
            self._terminal.error(str(refused))
