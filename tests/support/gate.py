"""A stepper that waits, so that a test can do things while a frame is being computed."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from instep.config import Config
from instep.core.typing import F32, I64, float32_zeros
from instep.models.base import RecurrentModel
from instep.runtime.stepper import Stepper
from instep.server.preparation import Prepared

GATE_VALUE = 4321.5
"""A frame that begins with this is stepped when the gate opens."""


class Gate:
    """Closed until it is opened; `running(model, stepper=gate.stepper)` puts it before the network."""

    def __init__(self) -> None:
        self._opened = threading.Event()

    def open(self) -> None:
        """Let everything through, from now on."""
        self._opened.set()

    def wait(self) -> None:
        """What the stepper calls before it steps such a frame."""
        assert self._opened.wait(60), "the test never opened the gate"

    def stepper(self, ready: Prepared, config: Config) -> Stepper:
        """A stepper behind this gate."""
        return self.bare_stepper(ready.network, config.engine.max_batch_size, config.engine.max_streams, ready.device)

    def bare_stepper(
        self,
        model: RecurrentModel,
        max_batch_size: int,
        max_streams: int,
        device: torch.device,
        zeros: Callable[[tuple[int, ...]], F32] = float32_zeros,
    ) -> Stepper:
        """The same, from what `Stepper` itself takes."""
        return _GatedStepper(self, model, max_batch_size, max_streams, device, zeros)


class _GatedStepper(Stepper):
    def __init__(
        self,
        gate: Gate,
        model: RecurrentModel,
        max_batch_size: int,
        max_streams: int,
        device: torch.device,
        zeros: Callable[[tuple[int, ...]], F32],
    ) -> None:
        super().__init__(model, max_batch_size, max_streams, device, zeros)
        self._gate = gate

    def step(self, slots: I64, rows: I64, inputs: F32, outputs: F32) -> None:
        if (inputs[rows, 0] == GATE_VALUE).any():
            self._gate.wait()
        super().step(slots, rows, inputs, outputs)
