"""The metrics of a server in the text format of Prometheus: one table of all of them, and what is made of it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Final

from prometheus_client import ProcessCollector, generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from instep.frontends.http.families import DURATION, SIZE, Labelled, Metric, ModelNumbers
from instep.streaming.service import ModelService
from instep_client.protocol.codes import Code

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_REASONS: Final = ("idle", "client_gone", "expired", "state_lost")
"""Why streams are evicted."""

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

METRICS: Final = (
    Metric(
        "instep_build_info",
        "Always 1; its labels say what is served, where, and how exact it is.",
        _build,
        ("model", "fingerprint", "exactness", "arithmetic", "device", "version"),
    ),
    Metric("instep_ready", "1 while the model takes new connections, streams and frames, 0 otherwise."),
    Metric("instep_exact", "1 where frames have the same bits in every batch and on every processor, 0 otherwise."),
    Metric("instep_uptime_seconds", "Time since the server started the model.", "uptime_s"),
    # Frames
    Metric("instep_frames_total", "Frames stepped."),
    Metric(
        "instep_received_frames_total", "Frames of the STEP messages that reached admission, refused ones included."
    ),
    Metric("instep_repeated_frames_total", "Frames that had been applied before and were only answered again."),
    Metric("instep_frames_pending", "Frames admitted and not yet computed."),
    Metric("instep_batches_total", "Steps of the network."),
    Metric("instep_step_failures_total", "Steps that failed."),
    Metric("instep_batch_size", "Streams of a batch.", scale=SIZE),
    # Time
    Metric("instep_latency_seconds", "From the arrival of a STEP message to its answer.", "latency_us", scale=DURATION),
    Metric(
        "instep_queue_seconds",
        "How long STEP messages waited for the step of their last frames.",
        "queue_us",
        scale=DURATION,
    ),
    Metric("instep_compute_seconds", "How long steps took.", "compute_us", scale=DURATION),
    Metric(
        "instep_send_seconds",
        "From the end of a step to its answers; with a recording this includes the commit.",
        "send_us",
        scale=DURATION,
    ),
    Metric("instep_executor_busy_seconds_total", "Time in which the model was stepped.", "executor_busy_s_total"),
    Metric(
        "instep_loop_busy_seconds_total",
        "Time in which the server's loop was busy, with all models together.",
        "loop_busy_s_total",
        (),
    ),
    Metric(
        "instep_step_time_ratio",
        "Share of the last ten seconds in which the model was stepped; at 1 it cannot keep up.",
    ),
    # Messages
    Metric("instep_messages_total", "STEP messages answered with STEPPED."),
    Metric("instep_refused_messages_total", "Messages of every kind that were refused as a whole."),
    Metric(
        "instep_refusals_total",
        "Refusals of messages and of single streams in them, by code.",
        _refusals,
        ("model", "code"),
    ),
    Metric(
        "instep_credit_stalls_total",
        "STEP messages refused for lack of credit, or leaving too little of it for another one of that size.",
    ),
    # Streams
    Metric("instep_connections", "Connections."),
    Metric(
        "instep_streams",
        "Streams by place: connected, parked (both in memory) or hibernating.",
        _streams,
        ("model", "place"),
    ),
    Metric("instep_streams_max", "Streams that fit into memory.", _room),
    Metric("instep_streams_opened_total", "Streams opened.", "opened_streams_total"),
    Metric("instep_streams_closed_total", "Streams that ended, for any reason.", "closed_streams_total"),
    Metric("instep_streams_parked_total", "Streams that lost their connection and were kept.", "parked_streams_total"),
    Metric("instep_streams_resumed_total", "Streams resumed.", "resumed_streams_total"),
    Metric(
        "instep_streams_evicted_total", "Streams that the server ended, by reason.", _evictions, ("model", "reason")
    ),
    Metric(
        "instep_streams_hibernated_total", "Streams that left memory for the recording.", "hibernated_streams_total"
    ),
    Metric("instep_streams_woken_total", "Streams that came back into memory.", "woken_streams_total"),
    # The recording
    Metric("instep_recording_bytes", "Size of the recording."),
    Metric("instep_recording_free_bytes", "Free on the disk of the recording."),
    Metric(
        "instep_commit_seconds",
        "How long transactions of the recording took, from the first row to the commit.",
        "commit_us",
        scale=DURATION,
    ),
    Metric("instep_checkpoint_age_seconds", "Age of the newest checkpoint.", "checkpoint_age_s"),
    Metric("instep_replay_seconds", "How long a restart would step the frames that no checkpoint holds.", "replay_s"),
    Metric("instep_recovery_seconds", "How long the start took to continue the recording.", "recovery_s"),
    # Exactness
    Metric("instep_verified_frames_total", "Frames that live verification has computed again and compared."),
    Metric(
        "instep_verify_mismatches_total",
        "Streams of which live verification found a frame that was served with another output.",
    ),
    Metric("instep_verify_skipped_frames_total", "Recorded frames that live verification did not compare."),
    Metric(
        "instep_verify_unchecked_frames_total",
        "Of these, frames that were trimmed from the recording before live verification had read them.",
    ),
    Metric("instep_verify_streams", "Streams that live verification follows."),
    Metric(
        "instep_verify_lag_seconds",
        "Time since the commit of the oldest frame that live verification has not compared yet.",
        "verify_lag_s",
    ),
)


class _Family(Collector):
    """One metric with its samples."""

    def __init__(self, family: Family) -> None:
        self._family = family

    def collect(self) -> Iterable[Family]:
        return [self._family] if self._family.samples else []


def exposition(services: Sequence[ModelService]) -> Iterator[bytes]:
    """All metrics of these models now, as `CONTENT_TYPE` says, and those of the process, where /proc tells them.

    One metric at a time: all of them take milliseconds, in which the loop may have frames to answer.
    """
    models = [ModelNumbers(service, service.numbers()) for service in services]
    for metric in METRICS:
        yield generate_latest(_Family(metric.family(models)))
    yield generate_latest(ProcessCollector(registry=None))
