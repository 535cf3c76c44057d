"""The data that `top` shows, from either transport."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple, Protocol

STATES: Final = ("connected", "parked", "hibernating")
SORTS: Final = ("name", "rate", "seq", "pending", "idle")
"""Orders of streams; all except that of names begin with the largest."""


class StreamQuery(NamedTuple):
    """The model and those of its streams that are asked for."""

    model: str = ""
    """Empty for the server's default."""
    contains: str = ""
    """Part of the streams' names."""
    state: str = ""
    """One of `STATES`; empty for all."""
    sort: str = "rate"
    """One of `SORTS`."""
    reverse: bool = False
    """The other way round than usual."""
    limit: int = 50

    @property
    def descending(self) -> bool:
        """Whether the largest comes first."""
        return (self.sort != "name") is not self.reverse


class ObservedStream(NamedTuple):
    """A stream of the model."""

    name: str
    state: str
    """One of `STATES`."""
    rate: float | None
    """Frames per second; None where it is not known yet."""
    seq: int | None
    """The seq of its next frame; None where it hibernates."""
    pending: int
    """Frames admitted and not answered yet."""
    idle_s: float
    expires_in_s: float | None
    """Time (s) for which the server keeps it if it stays idle; None if it never expires."""


class Numbers(dict[str, float]):
    """Those of STATS by name. One that the server does not have, as an older one may not, is NaN, a dash when drawn."""

    def __missing__(self, name: str) -> float:
        return math.nan


@dataclass(frozen=True, slots=True)
class ModelTotals:
    """One entry for each model of the server."""

    name: str
    streams: int
    """Parked and hibernating ones included."""
    connections: int
    frames: int
    """Stepped since the server started the model."""


@dataclass(frozen=True, slots=True)
class ObservedModel:
    """The model that is looked at."""

    name: str
    fingerprint: str
    features: int
    outputs: int
    device: str
    exactness: str
    """`exact` or `tolerance`."""
    arithmetic: str
    max_streams: int
    durability: str
    numbers: Numbers


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A server at one moment."""

    time_s: float
    """On a clock of the source; only differences mean something."""
    query: StreamQuery
    """The question that it answers."""
    models: Sequence[ModelTotals]
    model: ObservedModel
    streams: Sequence[ObservedStream]
    """Those that the query selects, in its order, up to its limit."""
    matched: int
    """Count of streams that the query selects."""


class Source(Protocol):
    """Where snapshots come from."""

    endpoint: str

    async def read(self, query: StreamQuery) -> Snapshot:
        """Ask the server.

        Raises:
            InstepError: a sentence on why there is no answer. The next call connects again.
        """
        ...

    async def close(self) -> None:
        """End the connection, if there is one."""
        ...


def select(streams: Iterable[ObservedStream], query: StreamQuery) -> tuple[list[ObservedStream], int]:
    """The streams that a query asks for, and how many there are without its limit."""
    found = [each for each in streams if query.contains in each.name and (not query.state or each.state == query.state)]
    found.sort(key=lambda each: each.name)
    field = "idle_s" if query.sort == "idle" else query.sort
    if field != "name" or query.descending:
        unknown = -1.0  # below all others
        found.sort(
            key=lambda each: each.name if field == "name" else unknown if (n := getattr(each, field)) is None else n,
            reverse=query.descending,
        )
    return found[: query.limit], len(found)


@dataclass(frozen=True, slots=True)
class SnapshotRates:
    """Rates per second between two snapshots."""

    frames: Mapping[str, float]
    """Frames by model."""
    numbers: Mapping[str, float]
    """The counters of the model that is looked at (`*_total`, `*_s_total` in seconds per second)."""


def rates_between(before: Snapshot | None, now: Snapshot) -> SnapshotRates | None:
    """The rates from one snapshot to the next; None where a counter began anew, as after a restart."""
    if before is None or before.model.name != now.model.name:
        return None
    seconds = now.time_s - before.time_s
    if seconds <= 0:
        return None
    old, new = before.model.numbers, now.model.numbers
    numbers = {name: (value - old.get(name, 0.0)) / seconds for name, value in new.items() if name.endswith("_total")}
    earlier = {model.name: model.frames for model in before.models}
    frames = {model.name: (model.frames - earlier.get(model.name, 0)) / seconds for model in now.models}
    if min([*numbers.values(), *frames.values()], default=0.0) < 0:
        return None
    return SnapshotRates(frames, numbers)


def as_json(endpoint: str, now: Snapshot, rates: SnapshotRates | None) -> dict[str, Any]:
    """One snapshot for machines; rates are per second."""
    per_s = rates.frames if rates else {}
    return {
        "endpoint": endpoint,
        "models": [asdict(model) | {"frames_per_s": per_s.get(model.name)} for model in now.models],
        "model": asdict(now.model) | {"rates": dict(rates.numbers) if rates else None},
        "streams": [stream._asdict() for stream in now.streams],
        "matched": now.matched,
    }
