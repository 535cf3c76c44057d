"""A stepper that waits, so that a test can do things while a frame is being computed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from instep.config import Config
from instep.core.typing import F32, I64, U8, float32_zeros
from instep.models.base import RecurrentModel
from instep.runtime.stepper import Stepper
from instep.server.preparation import Prepared

GATE_VALUE = 4321.5
"""A frame that begins with this is stepped when the gate opens."""


class Gate:
    """Closed until it is opened; `running(model, stepper=gate.stepper)` puts it before the network.

    Args:
        before: what waits: steps of frames that begin with `GATE_VALUE`, or every load or read of states.
    """

    def __init__(self, before: Literal["step", "load", "read"] = "step") -> None:
        self.before = before
        self._opened = threading.Event()

    def open(self) -> None:
        """Let everything through, from now on."""
        self._opened.set()

    def close(self) -> None:
        """Hold what comes from now on, as in the beginning."""
        self._opened.clear()

    def wait(self, verb: str) -> None:
        """What the stepper calls before it does something."""
        if verb == self.before:
            assert self._opened.wait(60), "the test never opened the gate"

    def stepper(self, ready: Prepared, config: Config) -> Stepper:
        """A stepper behind this gate."""
        return self.bare_stepper(ready.network, ready.certification.buckets, config.engine.max_streams, ready.device)

    def bare_stepper(
        self,
        model: RecurrentModel,
        buckets: Sequence[int],
        max_streams: int,
        device: torch.device,
        zeros: Callable[[tuple[int, ...]], F32] = float32_zeros,
    ) -> Stepper:
        """The same, from what `Stepper` itself takes."""
        return _GatedStepper(self, model, buckets, max_streams, device, zeros)


class _GatedStepper(Stepper):
    def __init__(
        self,
        gate: Gate,
        model: RecurrentModel,
        buckets: Sequence[int],
        max_streams: int,
        device: torch.device,
        zeros: Callable[[tuple[int, ...]], F32],
    ) -> None:
        super().__init__(model, buckets, max_streams, device, zeros)
        self._gate = gate

    def step(self, slots: I64, rows: I64, inputs: F32, outputs: F32) -> None:
        if (inputs[rows, 0] == GATE_VALUE).any():
            self._gate.wait("step")
        super().step(slots, rows, inputs, outputs)

    def load(self, slots: I64, rows: U8 | None) -> None:
        self._gate.wait("load")
        super().load(slots, rows)

    def read(self, slots: I64) -> U8:
        self._gate.wait("read")
        return super().read(slots)
