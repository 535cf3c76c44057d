"""`instep replay-from`: a new stream on a running server that continues from any frame of a recorded one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from instep.replay.past import Moment, PastFrames
from instep.replay.state import as_snapshot, travelling
from instep_client.aio_streams import AsyncStream
from instep_client.protocol.errors import InvalidInput
from instep_client.protocol.wire import ServerInfo
from instep_client.snapshots import StreamSnapshot
from instep_tools.compare import ReplayComparison, compare
from instep_tools.connect import Target, connected
from instep_tools.pacing import Stop
from instep_tools.problems import CommandProblem, Exit
from instep_tools.running import run_undrained
from instep_tools.sequences import RecordedSequences
from instep_tools.state import leaving, restored, tell_parked
from instep_tools.terminal import Terminal

_CHUNK: Final = 256
"""Frames sent at once, at most."""


def run(
    file: Path,
    stream: str,
    seq: int,
    *,
    name: str | None,
    model_folder: Path | None,
    endpoint: str,
    continues: bool,
    json: bool,
) -> int:
    """Open the stream and leave it parked; if it `continues`, send the recorded frames and compare the outputs.

    Returns:
        The exit status: 0, 1 when outputs differ from the recorded ones, 2 when it could not be done, 130 after Ctrl-C.

    Raises:
        RecordingError, CannotVerify: when the state cannot be had exactly.
    """
    with travelling(file, stream, model_folder) as (past, header):
        moment = past.before(seq)
        rest = past.since(moment) if continues else None
        taken = as_snapshot(moment, header)
    opened = partial(_open, file, name or f"{moment.info.name}@{moment.seq}", Target(endpoint), moment, taken, rest)
    return run_undrained(opened, Terminal(json))


async def _open(
    file: Path,
    name: str,
    target: Target,
    moment: Moment,
    taken: StreamSnapshot,
    rest: PastFrames | None,
    terminal: Terminal,
    stop: Stop,
) -> Exit:
    target = await _with_the_model(target, taken, terminal, stop)
    async with leaving(target, "replay", terminal, stop) as client:
        info = client.info
        try:
            taken.check(info)
        except InvalidInput as error:
            raise CommandProblem(f"{file}: {error}") from None
        stream = await restored(client, taken, name)
        found = None if rest is None else await _continue(stream, rest, info)
        about: dict[str, Any] = {
            "file": str(file),
            "of": moment.info.name,
            "from_seq": moment.seq,
            "origin": moment.origin,
            "origin_seq": moment.origin_seq,
            "replayed_frames": moment.replayed,
            "check": None if found is None else found.as_json(),
        }
        terminal.note(f"the state before frame {moment.seq}: {moment.in_words()}")
        if found is not None:
            if found.first is not None:
                terminal.note(found.first.sentence())
            terminal.note(f"sent the recorded frames from {moment.seq} on: {found.sentence(info.exactness)}")
        tell_parked(terminal, f"{name!r} continues from {moment.info.name!r} in {file}", stream, info, about)
    return Exit.FOUND_PROBLEMS if found is not None and found.different else Exit.OK


async def _with_the_model(target: Target, taken: StreamSnapshot, terminal: Terminal, stop: Stop) -> Target:
    """The server's default model, or the one that is called as in the recording where the default is another."""
    async with connected(target, "replay-from", terminal, stop) as client:
        if client.info.fingerprint == taken.fingerprint:
            return target
        others = {served.name for served in await client.list_models()}
    return target._replace(model=taken.model) if taken.model in others else target


async def _continue(stream: AsyncStream, rest: PastFrames, info: ServerInfo) -> ReplayComparison:
    """Send recorded frames, and compare the outputs with the recorded ones, bit for bit."""
    chunk = min(_CHUNK, info.max_block_frames, info.window_frames, info.credit_frames)
    outputs = np.full(rest.y.shape, np.nan, np.float32)
    for at in range(0, len(rest.x), chunk):
        outputs[at : at + chunk] = await stream.step(rest.x[at : at + chunk])
    lengths = np.array([len(rest.x)], np.int64)
    recorded = RecordedSequences((stream.name,), lengths, rest.x, outputs=rest.y, answered=rest.answered)
    found = compare(recorded, outputs, np.ones(len(rest.x), np.bool_))
    if found.first is None:
        return found
    return replace(found, first=replace(found.first, frame=found.first.frame + rest.first_seq))
