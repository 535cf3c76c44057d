"""What the server counts, and where the time of a block goes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from instep_client.protocol.codes import Code

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
        self.parked_streams_total = 0
        self.resumed_streams_total = 0
        self.evicted_by_code: dict[str, int] = {}
        self._split_ns: deque[tuple[int, int, int]] = deque(maxlen=_WINDOW)

    def answered(self, queue_ns: Sequence[int], compute_ns: int, send_ns: int) -> None:
        """STEP messages were answered: nanoseconds that each waited, were computed, and took to reach the socket."""
        self._split_ns.extend([(waited_ns, compute_ns, send_ns) for waited_ns in queue_ns])
        self.blocks_total += len(queue_ns)

    def evicted(self, code: Code, streams: int) -> None:
        """Streams were evicted for that reason."""
        self.evicted_streams_total += streams
        reason = code.name.lower()
        self.evicted_by_code[reason] = self.evicted_by_code.get(reason, 0) + streams

    def snapshot(self) -> dict[str, float]:
        """Everything by name; times are microseconds over the last blocks."""
        values = {name: float(value) for name, value in vars(self).items() if name.endswith("_total")}
        values |= {f"evicted_{reason}_total": float(count) for reason, count in self.evicted_by_code.items()}
        values["batch_size_mean"] = self.frames_total / max(1, self.batches_total)
        split_us = np.array(self._split_ns).reshape(-1, 3) / 1000
        for index, part in enumerate(("queue", "compute", "send")):
            p50, p99 = np.percentile(split_us[:, index], (50, 99)) if len(split_us) else (0.0, 0.0)
            values[f"{part}_us_p50"] = float(p50)
            values[f"{part}_us_p99"] = float(p99)
        return values
