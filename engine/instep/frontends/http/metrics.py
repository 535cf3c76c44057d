"""The metrics of a server in Prometheus's text format: a table of all metrics, and their exposition."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final, TypeAlias

import numpy as np
from prometheus_client import ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from instep.core.histogram import ENTRIES, entry_of
from instep.core.typing import I64
from instep.streaming.service import ModelService
from instep_client.protocol.codes import Code

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_REASONS: Final = ("idle", "client_gone", "expired", "state_lost")
"""The reasons for which streams are evicted."""


Used: TypeAlias = Mapping[str, Mapping[str, float]]
"""The numbers of principals, by the principal's name and the number's."""


@dataclass(frozen=True, slots=True)
class ModelNumbers:
    """A model and its numbers at the time of one exposition."""

    service: ModelService
    numbers: Mapping[str, float]
    used: Used
    """That of principals, on all models together."""


Labelled: TypeAlias = Iterable[tuple[tuple[str, ...], float]]
Source: TypeAlias = Callable[[ModelNumbers], Labelled]


@dataclass(frozen=True, slots=True)
class Scale:
    """The scale of a histogram of `core.histogram`, whose entries have exactly these bounds."""

    bounds: Sequence[int]
    """Upper bounds of buckets; each is the beginning of an entry."""
    unit: int
    """The recorded value that is exposed as 1."""
    is_less_one: bool = False
    """Whether the values were counted minus one."""


DURATION: Final = Scale([10 * 2**doubling for doubling in range(18)], 1_000_000)
"""A scale for microseconds, from 10 to 1.3 million."""
SIZE: Final = Scale([2**doubling for doubling in range(11)], 1, is_less_one=True)


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric, which is a row of the table."""

    name: str
    """The name, with Prometheus's prefix and unit."""
    help: str
    source: str | Source
    """The name of a number, or of the attribute of `EngineStats` for a histogram; or a function that returns values by
    labels.
    """
    labels: tuple[str, ...]
    scale: Scale | None
    """The scale of a histogram; None for others."""

    @property
    def type(self) -> str:
        """The type in Prometheus's terms."""
        if self.scale is not None:
            return "histogram"
        return "counter" if self.name.endswith("_total") else "gauge"

    def family(self, models: Sequence[ModelNumbers]) -> Family:
        """Return the samples of all models that have the number."""
        if self.scale is not None:
            histogram = HistogramMetricFamily(self.name, self.help, labels=self.labels)
            for model in models:
                counted: I64 = getattr(model.service.engine.stats, str(self.source))
                histogram.add_metric([model.service.name], *_buckets(counted, self.scale))
            return histogram
        make = CounterMetricFamily if self.type == "counter" else GaugeMetricFamily
        family = make(self.name, self.help, labels=self.labels)
        is_of_models = "model" in self.labels
        for model in models if is_of_models else models[:1]:
            own = (model.service.name,) if is_of_models else ()
            if callable(self.source):
                for labels, value in self.source(model):
                    family.add_metric((*own, *labels), value)
            elif self.source in model.numbers:
                family.add_metric(own, model.numbers[self.source])
        return family


def _buckets(histogram: I64, scale: Scale) -> tuple[list[tuple[str, float]], float]:
    """Return upper bounds with cumulative counts, the last one for all values, and the sum."""
    counted = np.cumsum(histogram[:ENTRIES])
    count = float(counted[-1])
    upto = [(str(bound / scale.unit), float(counted[entry_of(bound - 1)])) for bound in scale.bounds]
    total = float(histogram[ENTRIES]) + (count if scale.is_less_one else 0.0)
    return [*upto, ("+Inf", count)], total / scale.unit


# ── Values with labels ─────────────────────────────────────────────────────────────────────────────────────────────


def _refusals(model: ModelNumbers) -> Labelled:
    counts = model.service.engine.stats.refusals()
    return [((code.name,), float(counts.get(code, 0))) for code in Code]  # 0 too: a rate begins at the first sample


def _evictions(model: ModelNumbers) -> Labelled:
    by_reason = dict.fromkeys(_REASONS, 0) | model.service.engine.stats.evicted_by_reason
    return [((reason,), float(count)) for reason, count in by_reason.items()]


def _streams(model: ModelNumbers) -> Labelled:
    numbers = model.numbers
    yield ("connected",), numbers["streams_open"] - numbers["streams_parked"]
    yield ("parked",), numbers["streams_parked"]
    yield ("hibernating",), numbers["streams_hibernated"]


def _room(model: ModelNumbers) -> Labelled:
    return [((), float(len(model.service.engine.table.owner) - 1))]


def _build(model: ModelNumbers) -> Labelled:
    about = model.service.about
    labels = about.fingerprint, about.exactness, about.arithmetic, about.device, _version("instep")
    return [(labels, 1.0)]


@cache
def _version(package: str) -> str:
    return importlib.metadata.version(package)


# ── The table ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _metric(
    name: str, help: str, source: str | Source = "", labels: tuple[str, ...] = ("model",), scale: Scale | None = None
) -> Metric:
    return Metric(f"instep_{name}", help, source or name, labels, scale)


def _histogram(name: str, help: str, source: str, scale: Scale = DURATION) -> Metric:
    return _metric(name, help, source, scale=scale)


def _of_principals(number: str, help: str) -> Metric:
    def values(model: ModelNumbers) -> Labelled:
        return [((name,), used[number]) for name, used in model.used.items()]

    return _metric(f"principal_{number}", help, values, ("principal",))


METRICS: Final = (
    _metric(
        "build_info",
        "Always 1; its labels say what is served, where, and how exact it is.",
        _build,
        ("model", "fingerprint", "exactness", "arithmetic", "device", "version"),
    ),
    _metric("ready", "1 while the model takes new connections, streams and frames, 0 otherwise."),
    _metric("exact", "1 where frames have the same bits in every batch and on every processor, 0 otherwise."),
    _metric("uptime_seconds", "Time since the server started the model.", "uptime_s"),
    # Frames
    _metric("frames_total", "Frames stepped."),
    _metric("received_frames_total", "Frames of the STEP messages that reached admission, refused ones included."),
    _metric("repeated_frames_total", "Frames that had been applied before and were only answered again."),
    _metric("frames_pending", "Frames admitted and not yet computed."),
    _metric("batches_total", "Steps of the network."),
    _metric("step_failures_total", "Steps that failed."),
    _histogram("batch_size", "Streams of a batch.", "batch_size", SIZE),
    # Time
    _histogram("latency_seconds", "From the arrival of a STEP message to its answer.", "latency_us"),
    _histogram("queue_seconds", "How long STEP messages waited for the step of their last frames.", "queue_us"),
    _histogram("compute_seconds", "How long steps took.", "compute_us"),
    _histogram(
        "send_seconds", "From the end of a step to its answers; with a recording this includes the commit.", "send_us"
    ),
    _metric("executor_busy_seconds_total", "Time in which the model was stepped.", "executor_busy_s_total"),
    _metric(
        "loop_busy_seconds_total",
        "Time in which the server's loop was busy, with all models together.",
        "loop_busy_s_total",
        (),
    ),
    _metric("step_time_ratio", "Share of the last ten seconds in which the model was stepped; at 1 it cannot keep up."),
    # Messages
    _metric("messages_total", "STEP messages answered with STEPPED."),
    _metric("refused_messages_total", "Messages of every kind that were refused as a whole."),
    _metric(
        "refusals_total", "Refusals of messages and of single streams in them, by code.", _refusals, ("model", "code")
    ),
    _metric(
        "credit_stalls_total",
        "STEP messages refused for lack of credit, or leaving too little of it for another one of that size.",
    ),
    # Streams
    _metric("connections", "Connections."),
    _metric(
        "streams", "Streams by place: connected, parked (both in memory) or hibernating.", _streams, ("model", "place")
    ),
    _metric("streams_max", "Streams that fit into memory.", _room),
    _metric("streams_opened_total", "Streams opened.", "opened_streams_total"),
    _metric("streams_closed_total", "Streams that ended, for any reason.", "closed_streams_total"),
    _metric("streams_parked_total", "Streams that lost their connection and were kept.", "parked_streams_total"),
    _metric("streams_resumed_total", "Streams resumed.", "resumed_streams_total"),
    _metric("streams_evicted_total", "Streams that the server ended, by reason.", _evictions, ("model", "reason")),
    _metric("streams_hibernated_total", "Streams that left memory for the recording.", "hibernated_streams_total"),
    _metric("streams_woken_total", "Streams that came back into memory.", "woken_streams_total"),
    # Principals, at a server with keys
    _of_principals("frames_total", "Frames that a principal sent."),
    _of_principals("refused_total", "Messages refused because of a quota."),
    _of_principals("unread_bytes", "What the server keeps until it is read."),
    _of_principals("connections", "Connections of a principal."),
    _of_principals("streams", "Open streams, parked and hibernating ones too."),
    # The recording
    _metric("recording_bytes", "Size of the recording."),
    _metric("recording_free_bytes", "Free on the disk of the recording."),
    _histogram(
        "commit_seconds", "How long transactions of the recording took, from the first row to the commit.", "commit_us"
    ),
    _metric("checkpoint_age_seconds", "Age of the newest checkpoint.", "checkpoint_age_s"),
    _metric("replay_seconds", "How long a restart would step the frames that no checkpoint holds.", "replay_s"),
    _metric("recovery_seconds", "How long the start took to continue the recording.", "recovery_s"),
    _metric("copied", "1 while answers wait for the copy of the shard on another node, 0 while it has none."),
    # Exactness
    _metric("verified_frames_total", "Frames that live verification has computed again and compared."),
    _metric(
        "verify_mismatches_total",
        "Streams of which live verification found a frame that was served with another output.",
    ),
    _metric("verify_skipped_frames_total", "Recorded frames that live verification did not compare."),
    _metric(
        "verify_lag_seconds",
        "Time since the commit of the oldest frame that live verification has not compared yet.",
        "verify_lag_s",
    ),
)


class Families(Collector):
    """Metrics for `generate_latest`; those without samples are left out."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterable[Family]:
        """Return them."""
        return [each for each in self._families if each.samples]


def exposition(services: Sequence[ModelService], used: Used) -> Iterator[bytes]:
    """Yield the metrics of these models and principals as `CONTENT_TYPE`, and the process's own if /proc exists.

    They are yielded one at a time, because all of them take milliseconds in which the loop may have frames to answer.
    """
    models = [ModelNumbers(service, service.numbers(), used) for service in services]
    for metric in METRICS:
        yield generate_latest(Families([metric.family(models)]))
    yield generate_latest(ProcessCollector(registry=None))
