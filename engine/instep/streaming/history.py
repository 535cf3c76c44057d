"""The last ten minutes in numbers: one row a second, computed from the counters between two looks at them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from instep.core.histogram import ENTRIES, quantile
from instep.core.typing import F64, I64

ROWS: Final = 600
_EVERY_NS: Final = 1_000_000_000
_WINDOW: Final = 10
"""Rows that quantiles look back over."""
_RATES: Final = {
    "frames_per_s": "frames_total",
    "batches_per_s": "batches_total",
    "refused_per_s": "refused_total",
    "loop_busy": "loop_busy_s_total",
    "executor_busy": "executor_busy_s_total",
}
"""Column → the counter whose growth each second it is."""
_MEANS: Final = {"batch_size_mean": ("frames_total", "batches_total")}
"""Column → the counters whose growth is divided."""
_GAUGES: Final = (
    "streams_open",
    "streams_parked",
    "streams_hibernated",
    "frames_pending",
    "connections",
    "recording_bytes",
)
_QUANTILES: Final = {
    **{
        f"{name}_{label}": (name, share)
        for name in ("latency_us", "queue_us", "compute_us", "send_us")
        for label, share in (("p50", 0.50), ("p99", 0.99))
    },
    "commit_us_p99": ("commit_us", 0.99),
}
"""Column → histogram and share."""
_SPLIT: Final = ("latency_us_mean", "queue_us_mean", "compute_us_mean", "send_us_mean")
"""The mean time from the arrival of a message to its answer, and the parts that it is the sum of."""
COLUMNS: Final = ("time_s", *_RATES, *_MEANS, *_QUANTILES, *_SPLIT, *_GAUGES)


class History:
    """A ring of rows. `time_s` is Unix time (UTC); what is said of latencies is of ten seconds, everything else of one.

    Args:
        read: the present counters and gauges, by name; what is missing counts as 0.
        histograms: those whose quantiles are kept (`core.histogram`), by name.
    """

    def __init__(self, read: Callable[[], Mapping[str, float]], histograms: Mapping[str, I64]) -> None:
        self._read = read
        self._histograms = histograms
        self._rows: F64 = np.zeros((ROWS, len(COLUMNS)), np.float64)
        self._count = 0
        self._due_ns = self._sampled_ns = 0
        self._before: Mapping[str, float] = {}
        self._earlier: deque[dict[str, I64]] = deque(maxlen=_WINDOW)
        """The histograms as they were, one look for each row that quantiles look back over, the oldest first."""

    def __len__(self) -> int:
        return min(self._count, ROWS)

    def sample(self, now_ns: int) -> bool:
        """Add a row if one is due, at each whole second; the first call only begins. Whether it looked."""
        if now_ns < self._due_ns:
            return False
        # At a whole second, and not before half of one is over: a rate over less would be that of single batches.
        self._due_ns = (now_ns + _EVERY_NS // 2) // _EVERY_NS * _EVERY_NS + _EVERY_NS
        now = self._read()
        if self._sampled_ns:
            self._rows[self._count % ROWS] = self._row(now, (now_ns - self._sampled_ns) / 1e9)
            self._count += 1
        self._sampled_ns, self._before = now_ns, now
        self._earlier.append({name: histogram.copy() for name, histogram in self._histograms.items()})
        return True

    def follow(self, former: History) -> None:
        """Begin with the rows of a former version of the model, which gets none any more."""
        self._rows, self._count = former._rows, former._count

    def _row(self, now: Mapping[str, float], seconds: float) -> list[float]:
        def grown(name: str) -> float:
            return now.get(name, 0.0) - self._before.get(name, 0.0)

        lately = {name: histogram - self._earlier[0][name] for name, histogram in self._histograms.items()}
        return [
            time.time(),
            *(grown(name) / seconds for name in _RATES.values()),
            *(grown(count) / grown(of) if grown(of) else 0.0 for count, of in _MEANS.values()),
            *(quantile(lately[name], share) if name in lately else 0.0 for name, share in _QUANTILES.values()),
            *_split(lately),
            *(now.get(name, 0.0) for name in _GAUGES),
        ]

    def lately(self, name: str) -> float:
        """The mean of a column over the last ten seconds; 0 before its first row."""
        rows = np.arange(max(0, self._count - _WINDOW), self._count) % ROWS
        return float(self._rows[rows, COLUMNS.index(name)].mean()) if len(rows) else 0.0

    def columns(self) -> dict[str, list[float]]:
        """Every column by its name, one value a row, oldest first."""
        rows = np.roll(self._rows, -self._count, axis=0) if self._count > ROWS else self._rows[: self._count]
        return dict(zip(COLUMNS, rows.T.tolist(), strict=True))

    def newest(self) -> dict[str, float]:
        """The newest row, by column; empty before the first one."""
        if not self._count:
            return {}
        return dict(zip(COLUMNS, self._rows[(self._count - 1) % ROWS].tolist(), strict=True))


def _split(histograms: Mapping[str, I64]) -> tuple[float, float, float, float]:
    """The columns of `_SPLIT`; what is neither waiting nor sending was computing."""
    if "latency_us" not in histograms or not (answered := int(histograms["latency_us"][:ENTRIES].sum())):
        return 0.0, 0.0, 0.0, 0.0
    latency, queue, send = (
        float(histograms[f"{name}_us"][ENTRIES]) / answered for name in ("latency", "queue", "send")
    )
    return latency, queue, max(0.0, latency - queue - send), send
