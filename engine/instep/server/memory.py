"""Memory: what a server needs, against what there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import structlog

from instep.config import Config
from instep.core.tables import STREAM
from instep.memory import size, usable_memory

if TYPE_CHECKING:
    from instep.server.preparation import Prepared


MAX_BUFFERED_BYTES: Final = 256 * 1024 * 1024
"""Of replies that may wait for all connections together."""


def memory_at_start(config: Config) -> int:
    """Bytes that are written before any stream is opened: a record for each that there may be."""
    return config.engine.max_streams * STREAM.itemsize * len(config.model.folders)


def memory_when_full(config: Config, prepared: Sequence[Prepared]) -> int:
    """Bytes when all streams are open: states on the CPU, the frame buffers, and replies that nobody has read yet."""
    return sum(_bytes_of(config, each) for each in prepared) + MAX_BUFFERED_BYTES


def _bytes_of(config: Config, prepared: Prepared) -> int:
    network = prepared.network
    frame = 4 * (network.description.features + network.description.outputs) + 4
    state = network.state.row_bytes if prepared.device.type == "cpu" else 0  # else it is in the device's memory
    return config.engine.max_streams * (state + config.limits.window_frames * frame)


def warn_of_memory(config: Config, prepared: Sequence[Prepared], log: structlog.stdlib.BoundLogger) -> None:
    """Say in the log that the limits allow more than there is."""
    needed, usable = memory_when_full(config, prepared), usable_memory()
    if needed > usable:
        log.warning(
            "more streams than memory", needed_bytes=needed, usable_bytes=usable, reason=exceeds(needed, usable)
        )


def exceeds(needed: int, usable: int) -> str:
    """A sentence that says that the limits allow more bytes than may be used."""
    return (
        f"the limits allow {size(needed)}, and {size(usable)} of memory may be used: the server is killed before it "
        "reaches them"
    )
