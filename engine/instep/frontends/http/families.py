"""Samples of Prometheus from one metric: a number of a model, values by labels, or a histogram."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family

from instep.core.histogram import ENTRIES, entry_of
from instep.core.typing import I64
from instep.streaming.service import ModelService


@dataclass(frozen=True, slots=True)
class ModelNumbers:
    """A model and its numbers at the moment of one exposition."""

    service: ModelService
    numbers: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Scale:
    """The scale on which a histogram of `core.histogram` is shown; its entries have exactly these bounds."""

    bounds: Sequence[int]
    """A bucket counts the values below one of these; each is where an entry begins."""
    unit: int
    """The value that is shown as 1."""
    is_less_one: bool = False
    """Whether the values were counted less one."""


DURATION: Final = Scale([10 * 2**doubling for doubling in range(18)], 1_000_000)
"""Microseconds, from 10 to 1.3 million."""
SIZE: Final = Scale([2**doubling for doubling in range(11)], 1, is_less_one=True)

Labelled: TypeAlias = Iterable[tuple[tuple[str, ...], float]]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: a row of the table."""

    name: str
    """With the prefix and the unit of Prometheus."""
    help: str
    source: str | Callable[[ModelNumbers], Labelled] = ""
    """The name of a number or, of a histogram, of the attribute of `EngineStats`, where it is not the metric's without
    prefix; or the values by labels."""
    labels: tuple[str, ...] = ("model",)
    scale: Scale | None = None
    """Of a histogram."""

    @property
    def type(self) -> Literal["counter", "gauge", "histogram"]:
        """As Prometheus calls it."""
        if self.scale is not None:
            return "histogram"
        return "counter" if self.name.endswith("_total") else "gauge"

    def family(self, models: Sequence[ModelNumbers]) -> Family:
        """Its samples of all models; one that does not have the number has no sample."""
        if self.scale is not None:
            histogram = HistogramMetricFamily(self.name, self.help, labels=self.labels)
            for model in models:
                counted: I64 = getattr(model.service.engine.stats, self._number)
                histogram.add_metric([model.service.name], *_buckets(counted, self.scale))
            return histogram
        make = CounterMetricFamily if self.type == "counter" else GaugeMetricFamily
        family = make(self.name, self.help, labels=self.labels)
        for labels, value in self._values(models):
            family.add_metric(labels, value)
        return family

    @property
    def _number(self) -> str:
        return str(self.source or self.name.removeprefix("instep_"))

    def _values(self, models: Sequence[ModelNumbers]) -> Iterator[tuple[tuple[str, ...], float]]:
        for model in models if self.labels else models[:1]:
            own = (model.service.name,) if self.labels else ()
            if callable(self.source):
                yield from (((*own, *labels), value) for labels, value in self.source(model))
            elif self._number in model.numbers:
                yield own, model.numbers[self._number]


def _buckets(histogram: I64, scale: Scale) -> tuple[list[tuple[str, float]], float]:
    """Upper bound and how many values are at most that, the last one for all; and the sum."""
    counted = np.cumsum(histogram[:ENTRIES])
    count = float(counted[-1])
    upto = [(str(bound / scale.unit), float(counted[entry_of(bound - 1)])) for bound in scale.bounds]
    total = float(histogram[ENTRIES]) + (count if scale.is_less_one else 0.0)
    return [*upto, ("+Inf", count)], total / scale.unit
