"""`instep state …`: read a stream's state, save it, and continue from it.

Reading and saving need no ownership and do not disturb the owner. When a command that has opened a stream ends, the
server parks the stream.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import numpy.typing as npt
import typer

from instep_client.aio import AsyncClient, AsyncStream
from instep_client.protocol.errors import InvalidInput, StreamRefused
from instep_client.protocol.state_spec import StateSpec
from instep_client.protocol.wire import Code, ServerInfo
from instep_client.states import State, StreamSnapshot
from instep_tools.command_line import CommandLine
from instep_tools.connect import Target, connected
from instep_tools.pacing import Stop
from instep_tools.problems import BadFile, CommandProblem, Exit, check_new, made_new, reads_or_writes
from instep_tools.terminal import Terminal

app: Final = CommandLine(
    help="Read, save and restore the state of a stream.\n\n"
    "The exit status is 0 on success, and 2 with an error that says why."
)
FIRST_VALUES: Final = 3
"""The number of values of a layer that are shown."""

Name = Annotated[str, typer.Argument(metavar="NAME", help="The stream; any client may own it.")]


@app.server_command("read", examples=["instep state read mic-7"])
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
    """A state as a table: range, mean and first values for each row along the last axis of a leaf."""
    rows = [(label, values) for leaf, array in state.items() for label, values in _rows(leaf, array)]
    width = max(len(label) for label, _ in rows)
    lines = [f"{'row':>{width}} {'min':>12} {'mean':>12} {'max':>12}  first values"]
    with np.errstate(all="ignore"):  # a network may have computed NaN or infinity, which is shown as such
        for label, values in rows:
            low, mean, high = (_short(value) for value in (values.min(), values.mean(dtype=np.float64), values.max()))
            first = " ".join(_short(value) for value in values[:FIRST_VALUES])
            more = " …" if len(values) > FIRST_VALUES else ""
            lines.append(f"{label:>{width}} {low:>12} {mean:>12} {high:>12}  {first}{more}")
    return lines


@app.server_command("save", examples=["instep state save mic-7 --output mic-7.safetensors"])
async def save(
    target: Target,
    terminal: Terminal,
    stop: Stop,
    name: Name,
    output: Annotated[Path, typer.Option(metavar="FILE", help="A new file; existing files are never overwritten.")],
) -> Exit:
    """Save a stream's seq and state in a new safetensors file. Its owner notices nothing."""
    check_new(output, "--output")
    async with connected(target, "state save", terminal, stop) as client:
        taken = await client.snapshot(name)
    save_new(taken, output)
    if terminal.as_json:
        terminal.result({"stream": name, "seq": taken.seq, **_of_model(client.info), "file": str(output)})
    terminal.summary(
        f"saved {name!r} as it is before frame {taken.seq} (model {taken.model}, {taken.fingerprint[:12]}) in {output}"
    )
    return Exit.OK


@app.server_command("restore", examples=["instep state restore mic-7.safetensors --as mic-7-again"])
async def restore(
    target: Target,
    terminal: Terminal,
    stop: Stop,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that `state save` made.")],
    name: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="Name of the new stream. (default: the name in the file)")
    ] = None,
) -> Exit:
    """Open a stream that continues from a snapshot, on this or another server of the same model.

    The server parks it until a producer resumes it, for the time that the answer names.
    """
    try:
        with reads_or_writes(file, "read"):
            taken = StreamSnapshot.load(file)
    except InvalidInput as error:
        raise BadFile(str(error)) from None
    async with leaving(target, "restore", terminal, stop) as client:
        try:
            taken.check(client.info)
        except InvalidInput as error:
            raise CommandProblem(f"{file}: {error}") from None
        stream = await restored(client, taken, name)
        tell_parked(terminal, f"{stream.name!r} continues from {file}", stream, client.info, {"file": str(file)})
    return Exit.OK


@asynccontextmanager
async def leaving(target: Target, verb: str, terminal: Terminal, stop: Stop) -> AsyncIterator[AsyncClient]:
    """A connected client whose streams the server parks at the end."""
    async with connected(target, f"state {verb}", terminal, stop, park=True) as client:
        if client.info.park_s <= 0:
            raise CommandProblem(
                f"the server at {target.endpoint} keeps no stream without its connection (its limits.park_s is 0): the "
                f"stream would end with this command; {verb} it in the program that will use it"
            )
        yield client


def tell_parked(terminal: Terminal, what: str, stream: AsyncStream, info: ServerInfo, more: dict[str, Any]) -> None:
    """Print the result for a stream, and the time for which the server keeps it parked."""
    if terminal.as_json:
        about = {"stream": stream.name, "seq": stream.next_seq, "epoch": stream.epoch, "park_s": info.park_s}
        terminal.result({**about, **_of_model(info), **more})
    terminal.summary(
        f"{what} with frame {stream.next_seq}; the server keeps it for {info.park_s:g} s for a producer that "
        f"continues it with client.resume({stream.name!r}, epoch={stream.epoch})"
    )


def save_new(taken: StreamSnapshot, path: Path, option: str = "--output") -> None:
    """Write a snapshot to a new file.

    Raises:
        BadFile: when a file of that name exists, or it cannot be written.
    """
    with made_new(path, option):
        taken.save(path, overwrite=False)


async def restored(client: AsyncClient, taken: StreamSnapshot, name: str | None, option: str = "--as") -> AsyncStream:
    """Open a stream that continues from a snapshot, by default under the snapshot's name; `option` gives another."""
    try:
        return await client.restore(taken, name)
    except StreamRefused as refused:
        if refused.code is not Code.NAME_IN_USE:
            raise
        raise CommandProblem(f"{refused}; name another one with {option}") from None


def _of_model(info: ServerInfo) -> dict[str, str]:
    return {"model": info.model, "fingerprint": info.fingerprint}


def _short(value: np.floating[Any]) -> str:
    return f"{value:.6g}"


def _rows(leaf: str, array: npt.NDArray[Any]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    lines = array.reshape(-1, array.shape[-1] if array.ndim else 1) * 1
    for index, values in enumerate(lines):
        yield (f"{leaf}[{index}]" if array.ndim > 1 else leaf), values


def plain(state: Any) -> Any:
    """A state as JSON values: a dict or nested lists, with `nan`, `inf` and `-inf` as text."""
    if isinstance(state, dict):
        return {name: plain(leaf) for name, leaf in state.items()}
    if isinstance(state, np.ndarray):
        return plain(state.tolist())
    if isinstance(state, list):
        return [plain(value) for value in state]
    return str(state) if isinstance(state, float) and not math.isfinite(state) else state
