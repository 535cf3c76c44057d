"""What a stream costs beside its state and its frames; the suite measures the same (`instep bench`)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from instep.bench.rows.stream_bytes import MOST_BYTES, bytes_a_stream

MEASURED_ON = ((3, 11),)
"""The versions of CPython for which the number was measured: 189, and 128 with a bound of states in host memory."""


@pytest.mark.skipif(
    sys.implementation.name != "cpython" or sys.version_info[:2] not in MEASURED_ON,
    reason="the bytes are those of CPython 3.11's objects; measure on this version, and add it to MEASURED_ON",
)
@pytest.mark.parametrize("has_bound", [False, True])
def test_a_stream_costs_at_most_two_hundred_bytes(tmp_path: Path, has_bound: bool) -> None:
    assert 0 < bytes_a_stream(tmp_path, has_bound) <= MOST_BYTES
