"""What the server counts, and where the time of a block goes."""

from __future__ import annotations

import numpy as np

_WINDOW = 4096


class Statistics:
    """Counters since the start, and the split of the last 4,096 answered blocks into queue, compute and send."""

    def __init__(self) -> None:
        self.frames_total = 0
        self.batches_total = 0
        self.blocks_total = 0
        self.refused_messages_total = 0
        self.busy_total = 0
        self.step_failures_total = 0
        self.evicted_streams_total = 0
        self._split_us = np.zeros((_WINDOW, 3))

    def block_answered(self, queue_ns: int, compute_ns: int, send_ns: int) -> None:
        """A block was answered; nanoseconds it waited, was computed, and took to be handed to the socket."""
        self._split_us[self.blocks_total % _WINDOW] = (queue_ns / 1000, compute_ns / 1000, send_ns / 1000)
        self.blocks_total += 1

    def snapshot(self) -> dict[str, float]:
        """Everything by name; times are microseconds over the last blocks."""
        values = {name: float(value) for name, value in vars(self).items() if name.endswith("_total")}
        values["batch_size_mean"] = self.frames_total / max(1, self.batches_total)
        split = self._split_us[: min(self.blocks_total, _WINDOW)]
        for index, part in enumerate(("queue", "compute", "send")):
            p50, p99 = np.percentile(split[:, index], (50, 99)) if len(split) else (0.0, 0.0)
            values[f"{part}_us_p50"] = float(p50)
            values[f"{part}_us_p99"] = float(p99)
        return values
