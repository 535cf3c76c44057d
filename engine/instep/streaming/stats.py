"""The engine's counters: plain numbers and histograms that any front end may read."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from instep.core.histogram import add_replies, add_steps, new_histogram, quantile
from instep.core.typing import I32, I64
from instep_client.protocol.codes import Code

_CODES: Final = 256
"""More than the highest code."""


@dataclass(slots=True)
class EngineStats:
    """Counters and histograms (`core.histogram`) since the start."""

    frames_total: int = 0
    batches_total: int = 0
    messages_total: int = 0
    """STEP messages answered."""
    busy_total: int = 0
    refused_messages_total: int = 0
    """Messages of every kind that were refused as a whole, also of connections that have not said HELLO."""
    step_failures_total: int = 0
    opened_streams_total: int = 0
    closed_streams_total: int = 0
    parked_streams_total: int = 0
    resumed_streams_total: int = 0
    hibernated_streams_total: int = 0
    woken_streams_total: int = 0
    evicted_streams_total: int = 0
    evicted_by_reason: dict[str, int] = field(default_factory=dict)
    began_ns: int = field(default_factory=time.monotonic_ns)
    executor_busy_ns: int = 0
    """Time that runs took."""
    loop_busy_ns: int = 0
    """Time that turns of the server's loop took, for all models together."""
    recording_free_bytes: int | None = None
    """Free on the disk of the recording; None without one."""
    refused: I64 = field(default_factory=lambda: np.zeros(_CODES, np.int64))
    """Refusals by code: of messages as a whole, and of streams in them."""
    latency_us: I64 = field(default_factory=new_histogram)
    """Microseconds from the arrival of messages to their replies."""
    queue_us: I64 = field(default_factory=new_histogram)
    """Microseconds that messages waited for the step of their last frames."""
    compute_us: I64 = field(default_factory=new_histogram)
    """Microseconds that steps took."""
    send_us: I64 = field(default_factory=new_histogram)
    """Microseconds from the end of a step to its replies."""
    commit_us: I64 = field(default_factory=new_histogram)
    """Microseconds that transactions of the recording took; the recorder's thread adds them."""
    batch_size: I64 = field(default_factory=new_histogram)
    """Streams of a batch, less one; see `add_steps`."""

    def stepped(self, streams: int, steps: int, step_ns: int) -> None:
        """A run ended: its streams, its steps, and the nanoseconds of each step."""
        self.batches_total += steps
        self.frames_total += streams * steps
        add_steps(self.compute_us, self.batch_size, streams, step_ns, steps)

    def replied(self, arrived_ns: I64, numbers: I32, now_ns: int, send_ns: int) -> None:
        """Messages, int32 [M], were answered now, `send_ns` after their step; `arrived_ns` is int64, by message."""
        self.messages_total += len(numbers)
        add_replies(self.latency_us, self.send_us, arrived_ns, numbers, now_ns, send_ns)

    def refuse(self, code: Code) -> None:
        """A message was refused as a whole."""
        self.refused_messages_total += 1
        self.refused[code] += 1

    def refuse_streams(self, codes: I32 | I64) -> None:
        """A message was answered with these codes, [N], by stream: 0 where it was not refused."""
        self.refused += np.bincount(codes, minlength=_CODES)
        self.refused[0] = 0

    def evicted(self, reason: str, streams: int) -> None:
        """Streams were evicted for this reason."""
        self.evicted_streams_total += streams
        self.evicted_by_reason[reason] = self.evicted_by_reason.get(reason, 0) + streams

    def values(self) -> dict[str, float]:
        """Everything by name; quantiles are exact to an eighth."""
        values: dict[str, float] = {
            name: float(getattr(self, name)) for name in self.__slots__ if name.endswith("_total")
        }
        values |= {f"evicted_{reason}_total": float(count) for reason, count in self.evicted_by_reason.items()}
        values["refused_total"] = float(self.refused.sum())
        values |= {f"refused_{code.name.lower()}_total": float(count) for code, count in self.refusals().items()}
        values["loop_busy_s_total"] = self.loop_busy_ns / 1e9
        values["executor_busy_s_total"] = self.executor_busy_ns / 1e9
        values["uptime_s"] = (time.monotonic_ns() - self.began_ns) / 1e9
        values["batch_size_mean"] = self.frames_total / max(1, self.batches_total)
        for name, histogram in self.durations().items():
            values[f"{name}_p50"] = quantile(histogram, 0.50)
            values[f"{name}_p99"] = quantile(histogram, 0.99)
        if self.recording_free_bytes is not None:
            values["recording_free_bytes"] = float(self.recording_free_bytes)
        return values

    def durations(self) -> dict[str, I64]:
        """The histograms of durations, by name."""
        return {name: getattr(self, name) for name in ("latency_us", "queue_us", "compute_us", "send_us", "commit_us")}

    def refusals(self) -> dict[Code, int]:
        """Count of refusals by code; codes that were never given are left out."""
        return {Code(code): int(self.refused[code]) for code in np.flatnonzero(self.refused).tolist()}
