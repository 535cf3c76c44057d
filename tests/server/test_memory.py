"""The memory that a server needs, against sums by hand."""

from __future__ import annotations

from dataclasses import replace

import torch

from instep.server.memory import MAX_BUFFERED_BYTES, memory_when_full
from tests.support.models import SMALL
from tests.support.running import config, prepared


def test_states_count_only_where_they_are_in_the_memory_of_the_machine() -> None:
    settings = config(engine={"max_streams": 1000}, limits={"window_frames": 8})
    ready = prepared(SMALL)
    frames = 1000 * 8 * (4 * (5 + 8) + 4)
    assert memory_when_full(settings, [ready, ready]) == 2 * (frames + 1000 * 4 * 8) + MAX_BUFFERED_BYTES
    assert memory_when_full(settings, [replace(ready, device=torch.device("cuda"))]) == frames + MAX_BUFFERED_BYTES
