"""`instep recordings state`: a recorded stream before any of its frames, on the terminal or in a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from instep.recording.commands import write_json
from instep.recording.reader import RecordingReader
from instep.recording.schema import RecordingHeader
from instep.replay.past import Moment, Past
from instep.replay.recorded_model import recorded_model
from instep_client.snapshots import StreamSnapshot
from instep_client.states import as_state
from instep_tools.problems import check_new
from instep_tools.state import plain, save_new, state_lines
from instep_tools.words import folded


def run(
    file: Path,
    stream: str,
    seq: int | None,
    *,
    model_folder: Path | None,
    out: Path | None,
    json: bool,
    console: Console,
) -> None:
    """Show a recorded stream's state before a frame, or after the last one, and save it in a new file if asked to.

    Raises:
        RecordingError, CannotVerify, CommandProblem: when the state cannot be had exactly, or a file not be written.
    """
    if out is not None:
        check_new(out, "--out")
    with travelling(file, stream, model_folder) as (past, header):
        moment = past.before(seq)
    taken = as_snapshot(moment, header)
    if out is not None:
        save_new(taken, out, "--out")
    with np.errstate(all="ignore"):  # a network may have computed NaN or infinity
        norms = {
            name: float(np.linalg.norm(leaf.reshape(-1).astype(np.float64)))
            for name, leaf in header.state_spec.unpack(moment.state[None]).items()
        }
    if json:
        write_json(
            {
                "file": str(file),
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
                "out": None if out is None else str(out),
            }
        )
        return
    leaves = ", ".join(
        f"{leaf.name} {leaf.dtype} {list(leaf.shape)} with norm {norms[leaf.name]:.6g}"
        for leaf in header.state_spec.leaves
    )
    several = f", the newest of {moment.openings} of this name," if moment.openings > 1 else ""
    about = f"stream {moment.info.stream} ({moment.info.name!r}){several} before frame {moment.seq}: {leaves}"
    results = [moment.in_words(), f"saved in {out}" if out is not None else ""]
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
