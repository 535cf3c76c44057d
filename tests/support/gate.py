"""A stepper that waits, so that a test can do things while a frame is being computed."""

from __future__ import annotations

import threading

from instep.config import Config
from instep.core.typing import F32, I32, I64
from instep.runtime.stepper import Stepper
from instep.server.serve import Prepared

GATE_VALUE = 4321.5
"""A frame that begins with this is stepped when the gate opens."""


class Gate:
    """Closed until it is opened; `running(model, stepper=gate.stepper)` puts it before the network."""

    def __init__(self) -> None:
        self._opened = threading.Event()

    def open(self) -> None:
        """Let everything through, from now on."""
        self._opened.set()

    def stepper(self, ready: Prepared, config: Config) -> Stepper:
        """A stepper behind this gate."""
        return _GatedStepper(self._opened, ready, config)


class _GatedStepper(Stepper):
    def __init__(self, opened: threading.Event, ready: Prepared, config: Config) -> None:
        super().__init__(ready.network, ready.certification.buckets, config.engine.max_streams, ready.device)
        self._opened = opened

    def step(self, slots: I64, rows: I32, inputs: F32, outputs: F32) -> None:
        if (inputs[rows, 0] == GATE_VALUE).any():
            assert self._opened.wait(10), "the test never opened the gate"
        super().step(slots, rows, inputs, outputs)
