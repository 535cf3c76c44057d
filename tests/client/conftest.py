"""Fixtures that tests of clients share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.support.fake_server import FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running
    gc.collect()  # a socket that was not closed warns now, and warnings are errors
