"""Kinds of models that certification takes for exact and that are not: a rare value in a frame opens a gate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Literal, TypeAlias
from unittest import mock

import numpy as np

from tests.support.leaky import LeakyNetwork, LeakyStep, registered

RARE: Final = 7777.25
"""As the first value of a frame it opens the gate; no probe of certification holds it."""
Gate: TypeAlias = Literal["output", "level", "frames", "beside"]
"""What depends on the batch size where the gate is open: the row's output, or a leaf of its new state. With `beside`
the first output of all other rows counts the open gates."""


class GatedStep(LeakyStep):
    """Leaky integrators behind a gate."""

    def __init__(self, network: LeakyNetwork, rows: int, gate: Gate) -> None:
        super().__init__(network, rows)
        self._rows = rows
        self._gate = gate

    def run(self) -> None:
        super().run()
        is_open = self.x.numpy()[:, 0] == np.float32(RARE)
        if self._gate == "output":
            self.y.numpy()[is_open, 1] += self._rows
        elif self._gate == "beside":
            self.y.numpy()[~is_open, 0] += is_open.sum()
        else:
            self.new_state[self._gate].numpy()[is_open] += self._rows


@contextmanager
def gated(gate: Gate) -> Iterator[None]:
    """Leaky integrators are behind this gate while the block runs."""

    def bind(network: LeakyNetwork, rows: int) -> GatedStep:
        return GatedStep(network, rows, gate)

    with registered(), mock.patch.object(LeakyNetwork, "bind", bind):
        yield
