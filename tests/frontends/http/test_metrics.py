"""The metrics of a server, read as Prometheus reads them, against what was sent and what was counted."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from instep.core.histogram import add_to
from instep.frontends.http.metrics import exposition
from instep.server.server import Server
from instep_client.protocol.wire import Code, Kind
from tests.support.models import SMALL
from tests.support.raw import RawClient
from tests.support.running import running
from tests.support.streaming import random_frames


def scraped(server: Server) -> dict[str, Family]:
    """The families by name."""
    text = b"".join(exposition(server.services, server.used())).decode()
    assert "secret-stream" not in text
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(families: Mapping[str, Family], name: str, **labels: str) -> float:
    """The one sample of that name and those labels, besides that of the model."""
    (found,) = [
        sample.value
        for family in families.values()
        for sample in family.samples
        if sample.name == name and {**labels, "model": SMALL.name}.items() >= sample.labels.items() >= labels.items()
    ]
    return found


def bytes_on_disk(recording: Path) -> int:
    return sum(file.stat().st_size for file in (recording, recording.with_name(f"{recording.name}-wal")))


def buckets(families: Mapping[str, Family], name: str) -> list[tuple[float, float]]:
    """The upper bounds of a histogram, and how many values are at most that."""
    return [
        (float(sample.labels["le"]), sample.value)
        for sample in families[name].samples
        if sample.name == f"{name}_bucket"
    ]


async def test_what_was_sent_is_what_is_scraped(rng: np.random.Generator, tmp_path: Path) -> None:
    async with (
        running(SMALL, recording={"path": tmp_path / "r.instep"}, engine={"max_streams": 9}) as server,
        RawClient(server.endpoint) as client,
    ):
        await client.hello()
        handles = (await client.open("secret-stream", "b", "b", "c")).handles()[[0, 1, 3]]
        assert (await client.step(handles, [0] * 3, random_frames(rng, 5, 3))).failures() == []
        assert (await client.step(handles[:1], [7], random_frames(rng, 1))).codes() == [Code.SEQ_GAP]
        await client.send(b"nonsense")
        assert (await client.receive()).kind is Kind.ERROR
        await client.close(handles[2:], [5])
        families = scraped(server)
        expected = {
            "frames_total": 15,
            "received_frames_total": 16,
            "batches_total": 5,
            "messages_total": 2,
            "refused_messages_total": 1,
            "streams_opened_total": 3,
            "streams_closed_total": 1,
            "batch_size_count": 5,
            "batch_size_sum": 15,
            "latency_seconds_count": 2,
            "connections": 1,
            "streams_max": 9,
            "ready": 1,
            "recording_bytes": bytes_on_disk(tmp_path / "r.instep"),
        }
        assert {name: value(families, f"instep_{name}") for name in expected} == expected
        for code in (Code.NAME_IN_USE, Code.SEQ_GAP, Code.MALFORMED):
            assert value(families, "instep_refusals_total", code=code.name) == 1
        places = {place: value(families, "instep_streams", place=place) for place in ("connected", "parked")}
        assert places == {"connected": 2, "parked": 0}
        (build,) = families["instep_build_info"].samples
        assert build.labels == {
            "model": SMALL.name,
            "fingerprint": SMALL.fingerprint,
            "exactness": "exact",
            "arithmetic": "portable-1",
            "device": "cpu",
            "version": version("instep"),
        }
        assert families["process_resident_memory_bytes"].samples[0].value > 2**20


@pytest.mark.parametrize("scale", [3, 50, 2_000, 900_000])
async def test_histograms_of_times_count_what_numpy_counts(rng: np.random.Generator, scale: int) -> None:
    values_us = (rng.exponential(scale, 3000)).astype(np.int64)
    async with running(SMALL) as server:
        for each in values_us.tolist():
            add_to(server.default.engine.stats.queue_us, each, 1)
        families = scraped(server)
    found = buckets(families, "instep_queue_seconds")
    assert len(found) < 20
    for bound_s, count in found:
        assert count == (values_us < bound_s * 1e6 - 1e-6).sum()
    assert value(families, "instep_queue_seconds_sum") == pytest.approx(values_us.sum() / 1e6, rel=1e-12)
    assert value(families, "instep_queue_seconds_count") == len(values_us)
    for share in (0.5, 0.9, 0.99):
        truth_s = np.quantile(values_us, share, method="inverted_cdf") / 1e6
        upper_s = next(bound for bound, count in found if count >= share * len(values_us))
        assert truth_s < upper_s
        assert upper_s <= max(2 * truth_s, 1e-5) or upper_s == np.inf
