from __future__ import annotations

import pytest

from instep.verify.conditions import find_conditions
from tests.support.recordings import certify_once


@pytest.fixture
def certified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that run in this process certify each model once, as `tests.support.verifying.verify` does."""
    monkeypatch.setattr(find_conditions, "__defaults__", (certify_once,))
