"""What a recording is, without reading all of it: one file, or all that follow each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from instep.recording.inspection import how_it_ends
from instep.recording.one_file import bytes_on_disk
from instep.recording.reader import RecordingReader
from instep.recording.schema import RECOVERED_EVENT


@dataclass(frozen=True, slots=True)
class Overview:
    """Facts about some files of a recording, in order."""

    file: str
    """Its name, or that of the one file."""
    files: tuple[str, ...]
    began: str
    """When the recording began, not the oldest file that is left."""
    first_number: int
    """Of the first of these files; 1 where the recording began."""
    ends: str
    """In words."""
    model: str
    features: int
    outputs: int
    model_folder: str
    fingerprint: str
    instep_version: str
    durability: str
    exactness: str
    numerics: dict[str, str]
    """Of the engine that wrote last."""
    streams: int
    open_streams: int
    batches: int
    frames: int
    """Those of steps that failed are counted, too."""
    restarts: int
    states_position: int
    """How far the newest states go; 0 for none."""
    first_position: int
    last_position: int
    bytes: int
    """Of all files and what belongs to them."""


def look_over(name: Path, files: Sequence[Path]) -> Overview:
    """The facts about these files of a recording of that name.

    Raises:
        RecordingError: when one cannot be read, or is damaged where this reads.
    """
    streams, batches, frames, restarts = set[int](), 0, 0, 0
    for at, path in enumerate(files):
        with RecordingReader(path) as reader:
            if at == 0:
                header = reader.header
            opened = reader.streams()
            streams |= {info.stream for info in opened}
            of_file = reader.totals()
            batches, frames = batches + of_file[0], frames + of_file[1]
            restarts += sum(event.kind == RECOVERED_EVENT for event in reader.events())
            if at == len(files) - 1:
                engine, snapshot, ends = reader.engines[-1].header, reader.snapshot(), how_it_ends(reader)
                is_open = sum(info.closed_position is None for info in opened)
                last_position = reader.last_position
    return Overview(
        file=str(name),
        files=tuple(str(path) for path in files),
        began=when(header.created_ns if header.number == 1 else header.family),
        first_number=header.number,
        ends=ends,
        model=header.model_name,
        features=header.features,
        outputs=header.outputs,
        model_folder=header.model_folder,
        fingerprint=header.model_fingerprint,
        instep_version=engine.instep_version,
        durability=engine.durability,
        exactness=engine.exactness,
        numerics=dict(engine.numerics),
        streams=len(streams),
        open_streams=is_open,
        batches=batches,
        frames=frames,
        restarts=restarts,
        states_position=snapshot.position if snapshot else 0,
        first_position=header.first_position,
        last_position=last_position,
        bytes=sum(bytes_on_disk(path) for path in files),
    )


def when(time_ns: int) -> str:
    """A time in nanoseconds since 1970, in words."""
    return datetime.fromtimestamp(time_ns // 10**9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
