"""Counters of an engine, the numbers of its last ten minutes, and its newest events.

All are plain numbers, histograms and tuples that any front end may read.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, repeat
from typing import Final, Literal, NamedTuple, TypeAlias

import numpy as np

from instep.core.histogram import ENTRIES, add_replies, add_steps, new_histogram, quantile
from instep.core.typing import F64, I32, I64
from instep_client.protocol.codes import Code

_CODES: Final = 256
"""A number above the highest code."""


@dataclass(slots=True)
class EngineStats:
    """Counters and histograms (`core.histogram`) since the start."""

    frames_total: int = 0
    batches_total: int = 0
    messages_total: int = 0
    """The number of answered STEP messages."""
    busy_total: int = 0
    refused_messages_total: int = 0
    """The number of messages of any kind refused as a whole, including those of connections without HELLO."""
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
    """The total duration of runs."""
    loop_busy_ns: int = 0
    """The total duration of the loop's turns, for all models together."""
    recording_free_bytes: int | None = None
    """The free bytes on the recording's disk; None without a recording."""
    refused: I64 = field(default_factory=lambda: np.zeros(_CODES, np.int64))
    """Refusals by code, of whole messages and of streams in them."""
    latency_us: I64 = field(default_factory=new_histogram)
    """Microseconds from the arrival of messages to their replies."""
    queue_us: I64 = field(default_factory=new_histogram)
    """Microseconds for which messages waited for the step of their last frames."""
    compute_us: I64 = field(default_factory=new_histogram)
    """Durations of steps in microseconds."""
    send_us: I64 = field(default_factory=new_histogram)
    """Microseconds from the end of a step to its replies."""
    commit_us: I64 = field(default_factory=new_histogram)
    """Durations of the recording's transactions in microseconds; the recorder's thread adds them."""
    batch_size: I64 = field(default_factory=new_histogram)
    """Streams of a batch minus one; see `add_steps`."""

    def stepped(self, streams: int, steps: int, step_ns: int) -> None:
        """Count a run that has ended: its streams, its steps, and the nanoseconds of each step."""
        self.batches_total += steps
        self.frames_total += streams * steps
        add_steps(self.compute_us, self.batch_size, streams, step_ns, steps)

    def replied(self, arrived_ns: I64, numbers: I32, now_ns: int, send_ns: int) -> None:
        """Count messages, int32 [M], answered now, `send_ns` after their step; `arrived_ns` is int64, by message."""
        self.messages_total += len(numbers)
        add_replies(self.latency_us, self.send_us, arrived_ns, numbers, now_ns, send_ns)

    def refuse(self, code: Code) -> None:
        """Count a message that was refused as a whole."""
        self.refused_messages_total += 1
        self.refused[code] += 1

    def refuse_streams(self, codes: I32 | I64) -> None:
        """Count the refusals in a reply by its codes, [N], one for each stream; 0 means that it was not refused."""
        self.refused += np.bincount(codes, minlength=_CODES)
        self.refused[0] = 0

    def evicted(self, reason: str, streams: int) -> None:
        """Count evicted streams by reason."""
        self.evicted_streams_total += streams
        self.evicted_by_reason[reason] = self.evicted_by_reason.get(reason, 0) + streams

    def values(self) -> dict[str, float]:
        """All numbers by name; quantiles are accurate to an eighth."""
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
        """The count of refusals by code, without codes that were never used."""
        return {Code(code): int(self.refused[code]) for code in np.flatnonzero(self.refused).tolist()}


HISTORY_ROWS: Final = 600
_EVERY_NS: Final = 1_000_000_000
_WINDOW: Final = 10
"""The number of rows that quantiles cover."""
_RATES: Final = {
    "frames_per_s": "frames_total",
    "batches_per_s": "batches_total",
    "refused_per_s": "refused_total",
    "loop_busy": "loop_busy_s_total",
    "executor_busy": "executor_busy_s_total",
}
"""By column, the counter whose growth per second it is."""
_MEANS: Final = {"batch_size_mean": ("frames_total", "batches_total")}
"""By column, the counters whose growths are divided."""
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
"""By column, the histogram and the share."""
_SPLIT: Final = ("latency_us_mean", "queue_us_mean", "compute_us_mean", "send_us_mean")
"""The mean time from the arrival of a message to its answer, and the parts that add up to it."""
COLUMNS: Final = ("time_s", *_RATES, *_MEANS, *_QUANTILES, *_SPLIT, *_GAUGES)


class History:
    """A ring of rows. `time_s` is Unix time (UTC); latencies cover ten seconds, all other columns one.

    Args:
        read: returns the present counters and gauges by name; missing ones count as 0.
        histograms: by name, the histograms (`core.histogram`) whose quantiles are kept.
    """

    def __init__(self, read: Callable[[], Mapping[str, float]], histograms: Mapping[str, I64]) -> None:
        self._read = read
        self._histograms = histograms
        self._rows: F64 = np.zeros((HISTORY_ROWS, len(COLUMNS)), np.float64)
        self._count = 0
        self._due_ns = self._sampled_ns = 0
        self._before: Mapping[str, float] = {}
        self._earlier: deque[dict[str, I64]] = deque(maxlen=_WINDOW)
        """Copies of the histograms, one for each row that quantiles cover, the oldest first."""

    def __len__(self) -> int:
        return min(self._count, HISTORY_ROWS)

    def sample(self, now_ns: int) -> bool:
        """Read the numbers at each whole second, and add a row after the first time; return whether it read them."""
        if now_ns < self._due_ns:
            return False
        # At a whole second, and not before half of one is over: a rate over less would be that of single batches.
        self._due_ns = (now_ns + _EVERY_NS // 2) // _EVERY_NS * _EVERY_NS + _EVERY_NS
        now = self._read()
        if self._sampled_ns:
            self._rows[self._count % HISTORY_ROWS] = self._row(now, (now_ns - self._sampled_ns) / 1e9)
            self._count += 1
        self._sampled_ns, self._before = now_ns, now
        self._earlier.append({name: histogram.copy() for name, histogram in self._histograms.items()})
        return True

    def follow(self, former: History) -> None:
        """Take over the rows of a former version of the model, which is not sampled any more."""
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
        rows = np.arange(max(0, self._count - _WINDOW), self._count) % HISTORY_ROWS
        return float(self._rows[rows, COLUMNS.index(name)].mean()) if len(rows) else 0.0

    def columns(self) -> dict[str, list[float]]:
        """Every column by name, one value per row, oldest first."""
        rows = np.roll(self._rows, -self._count, axis=0) if self._count > HISTORY_ROWS else self._rows[: self._count]
        return dict(zip(COLUMNS, rows.T.tolist(), strict=True))

    def newest(self) -> dict[str, float]:
        """The newest row by column; empty before the first one."""
        if not self._count:
            return {}
        return dict(zip(COLUMNS, self._rows[(self._count - 1) % HISTORY_ROWS].tolist(), strict=True))


def _split(histograms: Mapping[str, I64]) -> tuple[float, float, float, float]:
    """The columns of `_SPLIT`; time that is neither waiting nor sending counts as computing."""
    if "latency_us" not in histograms or not (answered := int(histograms["latency_us"][:ENTRIES].sum())):
        return 0.0, 0.0, 0.0, 0.0
    latency, queue, send = (
        float(histograms[f"{name}_us"][ENTRIES]) / answered for name in ("latency", "queue", "send")
    )
    return latency, queue, max(0.0, latency - queue - send), send


MOST_EVENTS: Final = 4096
"""The number of events that are kept."""

EventKind: TypeAlias = Literal[
    "opened",
    "resumed",
    "parked",
    "closed",
    "evicted",
    "fenced",
    "hibernated",
    "woken",
    "refused",
    "lost",
    "moved",
    "mismatch",
    "checkpoint",
    "swapped",
]


class Event(NamedTuple):
    """An event of streams."""

    number: int
    time_s: float
    """The time in Unix seconds (UTC)."""
    kind: EventKind
    stream: str
    """The stream's name; empty if the event concerns no single stream."""
    detail: str
    seq: int | None
    """The seq that the stream expected next, or that the event is about."""


class EventLog:
    """A ring of the newest events.

    Args:
        on_event: called for each addition with the kind, the names of the streams, and the detail.
    """

    def __init__(self, on_event: Callable[[EventKind, Sequence[str], str], None] = lambda *event: None) -> None:
        self._on_event = on_event
        self._events: deque[Event] = deque(maxlen=MOST_EVENTS)
        self.newest = 0
        """The number of the newest event; 0 before the first."""

    def add(self, kind: EventKind, stream: str = "", detail: str = "", seq: int | None = None) -> None:
        """Add an event that happened now."""
        self._append(kind, [stream], detail, [seq])

    def add_all(self, kind: EventKind, streams: Sequence[str], detail: str = "", seqs: I64 | None = None) -> None:
        """Add the same event for several streams; `seqs` is int64 [N]."""
        if streams:
            self._append(kind, streams, detail, [None] * len(streams) if seqs is None else seqs.tolist())

    def _append(self, kind: EventKind, streams: Sequence[str], detail: str, seqs: Sequence[int | None]) -> None:
        self._on_event(kind, streams, detail)
        gone = max(0, len(streams) - MOST_EVENTS)
        numbers = count(self.newest + 1 + gone)
        self._events.extend(
            map(Event, numbers, repeat(time.time()), repeat(kind), streams[gone:], repeat(detail), seqs[gone:])
        )
        self.newest += len(streams)

    def since(self, number: int, stream: str | None = None) -> list[Event]:
        """The events after that number, oldest first; only those of one stream if it is given."""
        return [event for event in self._events if event.number > number and stream in (None, event.stream)]
