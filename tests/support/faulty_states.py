"""States that fail when told."""

from __future__ import annotations

from instep.core.typing import I64, U8
from instep.runtime.stepper import Stepper


class FaultyStates:
    """States that can neither be read nor written while `is_broken`, or after so many `good_loads`."""

    def __init__(self, stepper: Stepper) -> None:
        self.is_broken = False
        self.good_loads = 10**9
        self._stepper = stepper
        self.state = stepper.state

    def load(self, slots: I64, rows: U8 | None) -> None:
        self._check(self.good_loads <= 0)
        self.good_loads -= 1
        self._stepper.load(slots, rows)

    def read(self, slots: I64) -> U8:
        self._check()
        return self._stepper.read(slots)

    def _check(self, fails: bool = False) -> None:
        if self.is_broken or fails:
            raise RuntimeError("injected")
