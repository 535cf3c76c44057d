"""`instep-client state …`: read a stream's state, save it, go on from it, copy it, replace it.

Reading, saving and copying need no ownership: nobody notices. Only a reset takes the stream from its owner, and only
when told to. Streams that a command has opened or taken are left to the server, which parks them, when it ends.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import numpy.typing as npt
import typer

from instep_client.aio import AsyncClient
from instep_client.aio_streams import AsyncStream
from instep_client.protocol.errors import InvalidInput, StreamRefused
from instep_client.protocol.state_spec import StateSpec
from instep_client.protocol.wire import Code, ServerInfo
from instep_client.snapshots import StreamSnapshot
from instep_client.states import State
from instep_tools.command_line import CommandLine
from instep_tools.connect import Target, connected
from instep_tools.pacing import Stop
from instep_tools.problems import BadFile, CommandProblem, Exit, check_writable, reads_or_writes
from instep_tools.terminal import Terminal

app: Final = CommandLine(
    help="Read, save, restore, copy and replace the state of a stream.\n\n"
    "The exit status is 0 on success, and 2 with an error that says why."
)
FIRST_VALUES: Final = 3
"""How many values of a layer are shown."""

Name = Annotated[str, typer.Argument(metavar="NAME", help="The stream, whoever has it.")]


@app.server_command("read", examples=["instep-client state read mic-7"])
async def read(target: Target, terminal: Terminal, stop: Stop, name: Name) -> Exit:
    """Show the seq of a stream's next frame and its state. Its owner is not disturbed.

    --json gives all values.
    """
    async with connected(target, "state read", terminal, stop) as client:
        seq, state = await client.read_state(name)
        info = client.info
    if terminal.as_json:
        terminal.result({"stream": name, "seq": seq, **_of_model(info), "state": plain(state)})
        return Exit.OK
    leaves = ", ".join(f"{leaf.name} {leaf.dtype} {list(leaf.shape)}" for leaf in info.state.leaves)
    terminal.say(f"{name!r} is before frame {seq}; its state is {leaves} of model {info.model}")
    for line in state_lines(state, info.state):
        terminal.out.print(line, markup=False)
    return Exit.OK


def state_lines(state: State, spec: StateSpec) -> list[str]:
    """A state as a table: for each row along the last axis of a leaf its range, mean and first values."""
    arrays = state if isinstance(state, dict) else {spec.leaves[0].name: state}
    rows = [(label, values) for leaf, array in arrays.items() for label, values in _rows(leaf, array)]
    width = max(len(label) for label, _ in rows)
    lines = [f"{'row':>{width}} {'min':>12} {'mean':>12} {'max':>12}  first values"]
    with np.errstate(all="ignore"):  # a network may have computed NaN or infinity, which is shown as such
        for label, values in rows:
            low, mean, high = (_short(value) for value in (values.min(), values.mean(dtype=np.float64), values.max()))
            first = " ".join(_short(value) for value in values[:FIRST_VALUES])
            more = " …" if len(values) > FIRST_VALUES else ""
            lines.append(f"{label:>{width}} {low:>12} {mean:>12} {high:>12}  {first}{more}")
    return lines


@app.server_command("snapshot", examples=["instep-client state snapshot mic-7 --to mic-7.safetensors"])
async def snapshot(
    target: Target,
    terminal: Terminal,
    stop: Stop,
    name: Name,
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="A new file; existing files are never overwritten.")],
) -> Exit:
    """Save a stream's seq and state in a new safetensors file. Its owner notices nothing."""
    check_new(to, "--to")
    async with connected(target, "state snapshot", terminal, stop) as client:
        taken = await client.snapshot(name)
    save_new(taken, to, "--to")
    if terminal.as_json:
        terminal.result({"stream": name, "seq": taken.seq, **_of_model(client.info), "file": str(to)})
    terminal.summary(
        f"saved {name!r} as it is before frame {taken.seq} (model {taken.model}, {taken.fingerprint[:12]}) in {to}"
    )
    return Exit.OK


@app.server_command("restore", examples=["instep-client state restore mic-7.safetensors --as mic-7-again"])
async def restore(
    target: Target,
    terminal: Terminal,
    stop: Stop,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that `state snapshot` made.")],
    name: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="The new stream. Default: the name it had.")
    ] = None,
) -> Exit:
    """Open a stream that continues from a snapshot, on this or another server of the same model.

    The server keeps it parked until a producer resumes it, for as long as the answer says.
    """
    taken = _load(file)
    async with leaving(target, "restore", terminal, stop) as client:
        _check(file, taken, client.info)
        stream = await restored(client, taken, name)
        tell_parked(terminal, f"{stream.name!r} continues from {file}", stream, client.info, {"file": str(file)})
    return Exit.OK


@app.server_command("fork", examples=["instep-client state fork mic-7 mic-7-copy"])
async def fork(
    target: Target,
    terminal: Terminal,
    stop: Stop,
    name: Name,
    copy: Annotated[str, typer.Argument(metavar="NEW", help="The new stream.")],
) -> Exit:
    """Open a stream that continues from the state of another one, without disturbing its owner.

    The server keeps it parked until a producer resumes it, for as long as the answer says.
    """
    async with leaving(target, "fork", terminal, stop) as client:
        stream = await client.restore(await client.snapshot(name), copy)
        tell_parked(terminal, f"{copy!r} continues from {name!r}", stream, client.info, {"from": name})
    return Exit.OK


@app.server_command("reset", examples=["instep-client state reset mic-7 --take-over"])
async def reset(
    target: Target,
    terminal: Terminal,
    stop: Stop,
    name: Name,
    file: Annotated[
        Path | None, typer.Option("--state", metavar="FILE", help="A snapshot's state, in place of the initial one.")
    ] = None,
    take_over: Annotated[
        bool,
        typer.Option("--take-over", help="Take the stream from its owner, who is told, or refused when it resumes."),
    ] = False,
) -> Exit:
    """Replace a stream's state by the initial one, or a snapshot's; its seqs continue.

    It needs --take-over, since the owner must be told: at once (FENCED) if it is connected, otherwise when it resumes.
    Either may take the stream over again.
    """
    taken = None if file is None else _load(file)
    async with leaving(target, "reset", terminal, stop) as client:
        if file is not None and taken is not None:
            _check(file, taken, client.info)  # while its owner still has the stream
        if not take_over:
            await client.read_state(name)  # or there is no such stream
            raise CommandProblem(
                f"stream {name!r} has an owner, connected or expected back, who would continue from a foreign "
                "state; --take-over resets the stream anyway, and its owner is told that it was taken over"
            )
        try:
            stream = await client.resume(name, take_over=True)
        except asyncio.CancelledError:
            terminal.note(f"stream {name!r} may have been taken from its owner, and was not reset")
            raise
        try:
            await stream.reset(None if taken is None else taken.state)
        except BaseException:  # an interrupt, too
            terminal.note(
                f"stream {name!r} was taken from its owner before this; as long as the server keeps it, a producer "
                f"continues it with client.resume({name!r}, epoch={stream.epoch})"
            )
            raise
        state = "the initial state" if file is None else f"the state in {file}"
        about = {"file": None if file is None else str(file)}
        tell_parked(terminal, f"{name!r} continues from {state}", stream, client.info, about)
    return Exit.OK


@asynccontextmanager
async def leaving(target: Target, verb: str, terminal: Terminal, stop: Stop) -> AsyncIterator[AsyncClient]:
    """A client that leaves its streams to be parked."""
    async with connected(target, f"state {verb}", terminal, stop, park=True) as client:
        if client.info.park_s <= 0:
            raise CommandProblem(
                f"the server at {target.endpoint} keeps no stream without its connection (its limits.park_s is 0): the "
                f"stream would end with this command; {verb} it in the program that will use it"
            )
        yield client


def tell_parked(terminal: Terminal, what: str, stream: AsyncStream, info: ServerInfo, more: dict[str, Any]) -> None:
    """What was done with a stream, and for how long it waits for somebody to go on with it."""
    if terminal.as_json:
        about = {"stream": stream.name, "seq": stream.next_seq, "epoch": stream.epoch, "park_s": info.park_s}
        terminal.result({**about, **_of_model(info), **more})
    terminal.summary(
        f"{what} with frame {stream.next_seq}; the server keeps it for {info.park_s:g} s for a producer that "
        f"continues it with client.resume({stream.name!r}, epoch={stream.epoch})"
    )


def _load(file: Path) -> StreamSnapshot:
    try:
        with reads_or_writes(file, "read"):
            return StreamSnapshot.load(file)
    except InvalidInput as error:
        raise BadFile(str(error)) from None


def _check(file: Path, taken: StreamSnapshot, info: ServerInfo) -> None:
    try:
        taken.check(info)
    except InvalidInput as error:
        raise CommandProblem(f"{file}: {error}") from None


def check_new(path: Path, option: str) -> None:
    """Find out before the work, not after it, whether a new file can be made there; `option` names another one."""
    if os.path.lexists(path):
        raise _exists(path, option)
    check_writable(path)


def save_new(taken: StreamSnapshot, path: Path, option: str) -> None:
    """Write a snapshot to a new file.

    Raises:
        BadFile: when there is one of that name, or it cannot be written.
    """
    with reads_or_writes(path, "written"):
        try:
            taken.save(path, overwrite=False)
        except FileExistsError:
            raise _exists(path, option) from None


def _exists(path: Path, option: str) -> BadFile:
    return BadFile(f"{path} exists already and is not written over: move it, or name another file with {option}")


async def restored(client: AsyncClient, taken: StreamSnapshot, name: str | None) -> AsyncStream:
    """A new stream that continues from a snapshot, under its name where no other is given."""
    try:
        return await client.restore(taken, name)
    except StreamRefused as refused:
        if refused.code is not Code.NAME_IN_USE:
            raise
        raise CommandProblem(f"{refused}; restore it under another name with --as NAME") from None


def _of_model(info: ServerInfo) -> dict[str, str]:
    return {"model": info.model, "fingerprint": info.fingerprint}


def _short(value: np.floating[Any]) -> str:
    return f"{value:.6g}"


def _rows(leaf: str, array: npt.NDArray[Any]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """A leaf's rows along its last axis, as numbers, each with its place: `h[0]`."""
    lines = array.reshape(-1, array.shape[-1] if array.ndim else 1) * 1
    for index, values in enumerate(lines):
        yield (f"{leaf}[{index}]" if array.ndim > 1 else leaf), values


def plain(state: Any) -> Any:
    """As JSON can hold it: a dict or nested lists, with `nan`, `inf` and `-inf` as text."""
    if isinstance(state, dict):
        return {name: plain(leaf) for name, leaf in state.items()}
    if isinstance(state, np.ndarray):
        return plain(state.tolist())
    if isinstance(state, list):
        return [plain(value) for value in state]
    return str(state) if isinstance(state, float) and not math.isfinite(state) else state
