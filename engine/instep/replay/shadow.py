"""`instep model shadow`: runs a candidate on some streams of a recording, and reports how its outputs differ."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from json import dumps
from math import inf
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from instep.core.typing import F32, I64
from instep.interrupts import Stopped
from instep.models.base import RecurrentModel
from instep.models.errors import ModelError
from instep.models.folder import load_model
from instep.models.numerics import prepare
from instep.models.registry import build
from instep.recording.errors import UnavailableRecording
from instep.recording.reader import RecordingReader
from instep.recording.records import Checkpoint
from instep.recording.segments import Closed, Mark, Opened, Segment
from instep.replay.following import Follower
from instep.replay.replay import StateTable
from instep_tools.terminal import progress, say
from instep_tools.words import counted, finite

COMPARED: Final = 0
DIFFERS: Final = 1
NOT_COMPARED: Final = 2
WARM_UP: Final = 256
MOST_LISTED: Final = 1024
_SHOWN: Final = 10
_PAUSE_S: Final = 0.25
"""The pause between two looks at the recording."""


@dataclass(frozen=True, slots=True)
class Shadowing:
    """The arguments of the command; see `instep model shadow --help`."""

    recording: Path
    folder: Path
    share: float
    seconds: float | None
    warm_up: int | None
    tolerance: float | None
    json: bool


def run(asked: Shadowing, console: Console) -> int:
    """Run a candidate on a recording until the time is over, it ends, or a signal comes, and print the result.

    Returns:
        The exit status: 0 after a comparison, 1 when a value differed by more than the tolerance, 2 when nothing was
        compared.

    Raises:
        ModelError: when the candidate cannot be loaded, or its frames or outputs have another size.
        RecordingError: when the recording cannot be read.
    """
    errors, loading_since = Console(stderr=True), time.monotonic()
    with progress(errors, "loading", inf, "s", lambda: time.monotonic() - loading_since):
        shadow = make_shadow(asked)
    seconds, since = inf if asked.seconds is None else asked.seconds, time.monotonic()

    def found() -> str:
        return f"{counted(shadow.frames, 'frame')} of {counted(shadow.following, 'stream')}"

    # A signal ends it, and it reports.
    with suppress(Stopped), progress(errors, "comparing", seconds, "s", lambda: time.monotonic() - since, found):
        _follow(shadow, since + seconds)
    report = shadow.report()
    if not report.frames and shadow.unavailable is not None:
        raise shadow.unavailable
    if asked.json:
        console.file.write(dumps(report.as_json(asked), allow_nan=False) + "\n")
    else:
        report.render(console)
    if not report.frames:
        return NOT_COMPARED
    return DIFFERS if asked.tolerance is not None and report.largest > asked.tolerance else COMPARED


def make_shadow(asked: Shadowing) -> Shadow:
    """Make a candidate that has not followed anything yet. Raises the same errors as `run`."""
    prepare()
    with RecordingReader(asked.recording) as reader:
        header = reader.header
    model = load_model(asked.folder)
    for what in ("features", "outputs"):
        here, there = getattr(model.description, what), getattr(header, what)
        if here != there:
            raise ModelError(f"{asked.folder} has {here} {what}, and {asked.recording} is of a model with {there}")
    network = build(model, torch.device("cpu"))
    warm_up = asked.warm_up
    if warm_up is None and network.state != header.state_spec:
        warm_up = WARM_UP
    return Shadow(asked.recording, network, warm_up, asked.share)


def _follow(shadow: Shadow, until: float) -> None:
    is_all = shadow.follow()
    while not (is_all and shadow.is_finished) and (now := time.monotonic()) < until:
        if is_all:
            time.sleep(min(_PAUSE_S, until - now))
        is_all = shadow.follow()


@dataclass(slots=True)
class StreamDifference:
    """How a stream's outputs differ."""

    name: str
    frames: int = 0
    """The number of compared frames."""
    largest: float = 0.0
    """The largest absolute difference of a value; infinite if either is not finite and they differ."""


@dataclass(frozen=True, slots=True)
class Differences:
    """The differences of all compared frames. Quantiles are over the largest difference of each frame."""

    frames: int
    """The number of compared frames."""
    equal: int
    """The number of frames whose outputs have the same bits."""
    largest: float
    mean: float
    """The mean absolute difference of all values."""
    quantiles: dict[float, float]
    """Quantiles by share of frames, accurate to a tenth."""
    streams: list[StreamDifference]
    """The streams that differ most, in descending order."""
    streams_total: int
    """The number of compared streams."""

    def as_json(self, asked: Shadowing) -> dict[str, Any]:
        """Plain values for JSON, which has no infinity: it becomes null."""
        fields = asdict(self) | {
            "recording": str(asked.recording),
            "candidate": str(asked.folder),
            "equal_share": self.equal / self.frames if self.frames else None,
            "quantiles": {f"p{round(100 * share)}": value for share, value in self.quantiles.items()},
        }
        found: dict[str, Any] = finite(fields)
        return found

    def render(self, console: Console) -> None:
        """Print the differences."""
        if self.streams:
            table = Table("stream", box=None, header_style="bold")
            for column in ("frames", "max |difference|"):
                table.add_column(column, justify="right")
            for each in self.streams[:_SHOWN]:
                table.add_row(Text(each.name), f"{each.frames:,}", f"{each.largest:.3g}")
            console.print(table)
        if self.streams_total > _SHOWN:
            say(console, f"and {counted(self.streams_total - _SHOWN, 'more stream')}, which differ less")
        if not self.frames:
            say(console, "nothing was compared: no frame of a chosen stream was recorded meanwhile")
            return
        quantiles = ", ".join(f"p{round(100 * share)} {value:.3g}" for share, value in self.quantiles.items())
        differences = f"|difference| of a frame: {quantiles}, max {self.largest:.3g}"
        say(console, f"{differences}; of all values, mean {self.mean:.3g}")
        compared = f"{counted(self.frames, 'frame')} of {counted(self.streams_total, 'stream')}"
        say(console, f"{compared} were compared; {self.equal / self.frames:.1%} have equal bits")


_PARTS: Final = 8
"""The number of bins for each doubling of a difference."""
_SMALLEST: Final = -64
_BINS: Final = 128 * _PARTS
"""The number of bins, from 2^-64 to 2^64. The first also counts 0, the last also infinite differences."""


class Shadow(Follower):
    """Steps recorded frames of some streams in a candidate, and compares its outputs with the recorded ones.

    Args:
        path: the recording of the served version.
        network: the candidate.
        warm_up: None to begin in the served version's states; N to begin in the candidate's initial state and not
            compare the first N frames of each stream.
        share: of the streams. Whether a stream is followed depends on its name alone.
    """

    def __init__(self, path: Path, network: RecurrentModel, warm_up: int | None, share: float) -> None:
        super().__init__(path, StateTable(network))
        self.unavailable: UnavailableRecording | None = None
        """The reason that the recording could not be read at the last look."""
        self._warm_up = warm_up
        self._share = share
        self._found: dict[int, StreamDifference] = {}
        """Differences of followed streams, by number."""
        self._compared_from: dict[int, int] = {}
        self._past: list[StreamDifference] = []
        """Differences of streams that have ended."""
        self._frames = self._equal = 0
        self._largest = self._total = 0.0
        self._outputs = network.description.outputs
        self._bins: I64 = np.zeros(_BINS, np.int64)

    @property
    def frames(self) -> int:
        """The number of frames compared so far."""
        return self._frames

    @property
    def following(self) -> int:
        """The number of followed streams."""
        return len(self._streams)

    def follow(self) -> bool:
        """Step some or all committed frames; return whether nothing is left to read."""
        try:
            is_all, self.unavailable = self.look(1), None
        except UnavailableRecording as error:
            is_all, self.unavailable = True, error
        return is_all

    def begin(self, reader: RecordingReader, checkpoint: Checkpoint) -> int:
        """See `Follower`; forgets streams that have ended."""
        for number in [number for number in self._found if reader.open_stream(number) is None]:
            self._end(number)
        return super().begin(reader, checkpoint)

    def meet(self, numbers: Sequence[int]) -> None:
        """See `Follower`; adds the chosen streams."""
        for number in numbers:
            found = self.reader.open_stream(number)
            if found is not None and self._is_chosen(found.name):
                self.add(number, found.seq, None if self._warm_up is not None else found.state)
                self._found.setdefault(number, StreamDifference(found.name))
                self._compared_from[number] = found.seq + (self._warm_up or 0)

    def take(self, segment: Segment) -> None:
        """Step a segment and compare its outputs."""
        marks, foreign = list[Mark](), set[tuple[int, int]]()
        for mark in segment.marks:
            if isinstance(mark, Opened):
                if not self._is_chosen(mark.name):
                    continue
                self._found[mark.stream] = StreamDifference(mark.name)
            if not isinstance(mark, Closed) and mark.stream is not None and mark.state is not None and self._warm_up:
                seq = mark.first_seq if isinstance(mark, Opened) else mark.seq
                foreign.add((mark.stream, seq or 0))
            is_foreign = self._warm_up is not None and not isinstance(mark, Closed)
            marks.append(replace(mark, state=None) if is_foreign else mark)
        stretches = self.plan(replace(segment, marks=marks))
        found = list[tuple[StreamDifference, I64]]()
        columns = (stretches.streams, stretches.first_seqs, stretches.starts, stretches.lengths)
        for row, (number, seq, start, length) in enumerate(zip(*(each.tolist() for each in columns), strict=True)):
            if row in stretches.given:
                self._compared_from[number] = seq + ((number, seq) in foreign) * (self._warm_up or 0)
            left_out = min(length, max(0, self._compared_from[number] - seq))
            found.append((self._found[number], stretches.order[start + left_out : start + length]))
        y, _ = self.step(stretches)
        for of_stream, places in found:
            places = places[stretches.frames.answered[places]]
            if len(places):
                self._compare(of_stream, y[places], stretches.frames.y[places])
        for number in stretches.closed:
            self._end(number)

    def report(self) -> Differences:
        """The findings so far."""
        streams = [*self._past, *(found for found in self._found.values() if found.frames)]
        edges = 2.0 ** ((np.arange(_BINS) + 1) / _PARTS + _SMALLEST)
        counts, quantiles = np.cumsum(self._bins), dict[float, float]()
        for share in (0.5, 0.9, 0.99):
            found = int(np.searchsorted(counts, share * self._frames)) if self._frames else 0
            quantiles[share] = min(float(edges[found]), self._largest) if found else 0.0
        values = self._frames * self._outputs
        return Differences(
            frames=self._frames,
            equal=self._equal,
            largest=self._largest,
            mean=self._total / values if values else 0.0,
            quantiles=quantiles,
            streams=sorted(streams, key=lambda each: -each.largest)[:MOST_LISTED],
            streams_total=len(streams),
        )

    def _end(self, number: int) -> None:
        found, _ = self._found.pop(number), self._compared_from.pop(number, None)
        if found.frames:
            self._past.append(found)

    def _is_chosen(self, name: str) -> bool:
        return zlib.crc32(name.encode()) < self._share * 2**32

    def _compare(self, found: StreamDifference, y: F32, recorded: F32) -> None:
        equal = (y.view(np.uint32) == recorded.view(np.uint32)).all(axis=1)
        with np.errstate(invalid="ignore"):
            apart = np.abs(y.astype(np.float64) - recorded)
        apart[equal] = 0  # infinity minus infinity is not a number
        apart[~np.isfinite(apart)] = np.inf
        largest = apart.max(axis=1)
        found.frames += len(y)
        found.largest = max(found.largest, float(largest.max()))
        self._frames += len(y)
        self._equal += int(equal.sum())
        self._largest = max(self._largest, found.largest)
        self._total += float(apart.sum())
        with np.errstate(divide="ignore"):
            bins = np.ceil((np.log2(largest) - _SMALLEST) * _PARTS) - 1
        np.add.at(self._bins, np.clip(bins, 0, _BINS - 1).astype(np.int64), 1)
