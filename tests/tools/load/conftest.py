from __future__ import annotations

import math

import pytest

from instep_tools.load import generator


@pytest.fixture(autouse=True)
def no_stalls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out those of the machine, which are in real time."""
    monkeypatch.setattr(generator, "STALL_S", math.inf)
