"""`instep recordings state`: a recorded stream before any of its frames, on the terminal or in a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.text import Text

from instep.core.typing import U8
from instep.recording.commands import write_json
from instep.recording.reader import RecordingReader
from instep.recording.schema import RecordingHeader
from instep.replay.past import Moment, Past
from instep.replay.recorded_model import recorded_model
from instep_client.protocol.state_spec import StateSpec
from instep_client.snapshots import StreamSnapshot
from instep_client.states import as_state
from instep_tools.state import check_new, plain, save_new, state_lines
from instep_tools.words import folded

DONE: Final = 0
NOT_DONE: Final = 2


@dataclass(frozen=True, slots=True)
class Look:
    """The arguments of the command."""

    file: Path
    """The recording."""
    stream: str
    """Name or number."""
    seq: int | None = None
    """Of the frame; None for after the last one."""
    model_folder: Path | None = None
    """None for where the recording says."""
    out: Path | None = None
    """A new snapshot file."""
    json: bool = False
    """Write one JSON object to standard output and nothing else."""


def run(what: Look, console: Console) -> None:
    """Show a recorded stream's state before a frame, and save it where that is asked for.

    Raises:
        RecordingError, CannotVerify, CommandProblem: when the state cannot be had exactly, or a file not be written.
    """
    if what.out is not None:
        check_new(what.out, "--out")
    with travelling(what.file, what.stream, what.model_folder) as (past, header):
        moment = past.before(what.seq)
        taken = as_snapshot(moment, header)
        if what.out is not None:
            save_new(taken, what.out, "--out")
    norms = _norms(moment.state[None], header.state_spec)
    if what.json:
        write_json(_as_json(what, moment, taken, {leaf: float(norm[0]) for leaf, norm in norms.items()}))
        return
    leaves = ", ".join(
        f"{leaf.name} {leaf.dtype} {list(leaf.shape)} with norm {norms[leaf.name][0]:.6g}"
        for leaf in header.state_spec.leaves
    )
    several = f", the newest of {moment.openings} of this name," if moment.openings > 1 else ""
    about = f"stream {moment.info.stream} ({moment.info.name!r}){several} before frame {moment.seq}: {leaves}"
    results = [moment.in_words(), f"saved in {what.out}" if what.out is not None else ""]
    for line in [*folded(about), *state_lines(taken.state, header.state_spec)]:
        console.print(Text(line), soft_wrap=True, highlight=False)
    for line in folded("; ".join(filter(None, results))):
        console.print(Text(line, "bold green"), soft_wrap=True, highlight=False)


@contextmanager
def travelling(file: Path, stream: str, model_folder: Path | None) -> Iterator[tuple[Past, RecordingHeader]]:
    """The past of a stream, with the header of its recording."""
    with RecordingReader(file) as reader:
        model = recorded_model(reader.header, model_folder)
        yield Past(reader, model, stream), reader.header


def as_snapshot(moment: Moment, header: RecordingHeader) -> StreamSnapshot:
    """The state as a client takes it from a live stream."""
    state = as_state(moment.state[None], header.state_spec, single=True)
    return StreamSnapshot(moment.info.name, moment.seq, state, header.model_fingerprint, header.model_name)


def _as_json(what: Look, moment: Moment, taken: StreamSnapshot, norms: dict[str, float]) -> dict[str, Any]:
    return {
        "file": str(what.file),
        "stream": moment.info.name,
        "number": moment.info.stream,
        "seq": moment.seq,
        "model": taken.model,
        "fingerprint": taken.fingerprint,
        "origin": moment.origin,
        "origin_seq": moment.origin_seq,
        "replayed_frames": moment.replayed,
        "compared_frames": moment.compared,
        "norm": {leaf: plain(norm) for leaf, norm in norms.items()},
        "state": plain(taken.state),
        "out": None if what.out is None else str(what.out),
    }


def _norms(rows: U8, spec: StateSpec) -> dict[str, Any]:
    """The Euclidean norm of each leaf, float64 [N], by name."""
    with np.errstate(all="ignore"):  # a network may have computed NaN or infinity
        return {
            name: np.linalg.norm(leaf.reshape(len(rows), -1).astype(np.float64), axis=1)
            for name, leaf in spec.unpack(rows).items()
        }
