"""The client for asyncio, with or without uvloop. Its methods ask `session.py`, which `driver.py` runs."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import add
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeAlias, TypeVar, cast, get_args

import numpy as np
import numpy.typing as npt

from instep_client.arguments import Indices, check_time, counts, good_names, group_frames, row_indices
from instep_client.connection import Call
from instep_client.driver import Driver
from instep_client.frames import TimedOutputs
from instep_client.key_files import read_client_keys
from instep_client.links import Links, all_of
from instep_client.protocol.codes import HAVE_ALL
from instep_client.protocol.errors import (
    FramesRefused,
    InvalidInput,
    StepTimeout,
    StreamEvicted,
    StreamRefused,
)
from instep_client.protocol.state_spec import U8
from instep_client.protocol.wire import DEFAULT_ENDPOINT, F32, U64, Code, Place, ServerInfo
from instep_client.replies import ListedStream, ServedModel
from instep_client.requests import Opening
from instep_client.session import Session
from instep_client.states import GivenState, State, StreamSnapshot, as_state, state_rows
from instep_client.streams import StreamHandle

A = TypeVar("A", bound=npt.NDArray[Any])
R = TypeVar("R")
T = TypeVar("T")

StreamPlace: TypeAlias = Literal["connected", "parked", "hibernating"]
_PAGE: Final = 4096
IfExists: TypeAlias = Literal["error", "resume", "replace"]
_MOST_ATTEMPTS: Final = 3
"""The most attempts of `open`, because others may open and close streams of that name meanwhile."""
_LARGEST: Final = re.compile(r"_(p50|p99|mean|busy|ratio|(?<!_per_)s)$")
"""Matches the names of quantiles, means, shares and times, of which several shards have the largest."""
_SUMMED: Final = ("streams", "connections", "frames")
_LEAST: Final = ("ready", "exact", "copied", "recording_free_bytes")
_MOVED_ON: Final = frozenset({Code.UNKNOWN_STREAM, Code.EXPIRED, Code.IDLE, Code.FENCED, Code.STATE_LOST})


class StreamView:
    """The properties of an `AsyncStream` and a `Stream`, which send nothing to the server."""

    _session: Session
    _handle: StreamHandle

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} next_seq={self.next_seq} epoch={self.epoch}>"

    @property
    def name(self) -> str:
        """The stream's name."""
        return self._handle.names[0]

    @property
    def next_seq(self) -> int:
        """The seq of the next frame to send.

        While nothing is unanswered, the server applies the frame of this seq next.
        """
        return int(self._session.table.next_seqs(self._handle)[0])

    @property
    def epoch(self) -> int:
        """The number of this ownership of the stream, for `resume`. It changes with each new connection."""
        return int(self._session.table.epochs(self._handle)[0])

    @property
    def moved_at(self) -> int | None:
        """The seq of the first frame that the present version of the model computes.

        None if the server has not swapped the model since the stream was opened.
        """
        seq = int(self._session.table.moved_at[self._handle.rows[0]])
        return None if seq < 0 else seq


class GroupPart(NamedTuple):
    """The streams of a group that belong to one shard."""

    driver: Driver
    where: Indices
    """Their indices in the group, in ascending order."""
    handle: StreamHandle


class GroupView:
    """The properties of an `AsyncGroup` and a `Group`, which send nothing to the server."""

    _names: tuple[str, ...]
    _parts: Sequence[GroupPart]

    def _gather(self, arrays: Iterable[A]) -> A:
        """One array of the group from the arrays [N, …] of its parts."""
        order = np.argsort(np.concatenate([part.where for part in self._parts]))
        return cast(A, np.concatenate(list(arrays))[order])

    def __repr__(self) -> str:
        first, last = self.names[0], self.names[-1]
        return f"<{type(self).__name__} of {len(self)}: {first!r}{f' … {last!r}' if len(self) > 1 else ''}>"

    def __len__(self) -> int:
        return len(self._names)

    @property
    def names(self) -> tuple[str, ...]:
        """The streams' names."""
        return self._names

    @property
    def next_seqs(self) -> U64:
        """The seq of the next frame of each stream, uint64 [N]."""
        return self._gather(driver.session.table.next_seqs(handle) for driver, _, handle in self._parts)

    @property
    def epochs(self) -> U64:
        """The epoch of each stream, uint64 [N]; see `AsyncStream.epoch`."""
        return self._gather(driver.session.table.epochs(handle) for driver, _, handle in self._parts)

    @property
    def moved_at(self) -> npt.NDArray[np.int64]:
        """`AsyncStream.moved_at` of each stream, int64 [N], with -1 for None."""
        return self._gather(driver.session.table.moved_at[handle.rows] for driver, _, handle in self._parts)


class AsyncStream(StreamView):
    """One stream: frames in, outputs out, in order.

    Frames are sent in the order in which `step` and `send` were called. A frame that the server refuses does not change
    the stream; frames that were sent after it, before the refusal arrived, are refused too, with SEQ_GAP. A call that
    is cancelled while its frames wait for credit withdraws them; sent frames stay sent (see `next_seq`).

    A lost connection is replaced (see `AsyncClient`): calls take longer, and every frame is still applied once.

    Every method raises StreamEvicted (or its subclass DataLoss) once the stream has ended, ConnectionFailed once the
    server is gone for good, and ClientClosed after `close`.
    """

    def __init__(self, driver: Driver, handle: StreamHandle) -> None:
        """The methods of `AsyncClient` make these."""
        self._driver = driver
        self._session = driver.session
        self._handle = handle

    def _state(self, rows: U8) -> State:
        return as_state(rows, self._session.info.state, single=True)

    async def step(self, x: npt.ArrayLike, timeout_s: float | None = None) -> F32:
        """Send a frame [features] or a chunk [T, features] and return its outputs, [outputs] or [T, outputs].

        It waits for at most `timeout_s` seconds, by default for as long as there is a connection or hope for one.

        Raises:
            StepTimeout: when the answer did not come in time; `sent` says whether the frames are applied nevertheless.
            FramesRefused: when some frames were not applied.
            InvalidInput: for another shape, or values that float32 cannot hold.
        """
        return (await self.step_timed(x, timeout_s)).outputs

    async def step_timed(self, x: npt.ArrayLike, timeout_s: float | None = None) -> TimedOutputs:
        """Like `step`, but return the server's times too."""
        check_time(timeout_s)
        call = self._session.step(self._handle, x)
        await self._driver.until_answered(call, timeout_s)
        return call.result()

    async def send(self, x: npt.ArrayLike) -> None:
        """Send a frame or chunk without waiting for its outputs. Iterate over the stream to get them.

        Waits while the server's credit is used up, and while there are as many unread outputs as that credit.

        Raises:
            InvalidInput: for another shape, or values that float32 cannot hold.
            InstepError: when nobody has read the waiting outputs for the client's `timeout_s`.
        """
        call = self._session.step(self._handle, x, keep=True)
        await self._driver.until_woken(call)
        if not call.sent:
            call.result()  # raises what it failed with

    def finish(self) -> None:
        """Send nothing more: iterating ends after the last output, and `send` and `step` are refused."""
        self._session.finish(self._handle)
        self._driver.wake()

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> F32:
        """The outputs of the next `send`, in the shape that `step` would return.

        Raises:
            FramesRefused: when frames were refused; iterating may continue.
        """
        call = await self.next_call()
        if call is None:
            raise StopAsyncIteration
        return call.result().outputs

    async def next_call(self) -> Call[TimedOutputs] | None:
        """The next call of `send` that has ended, or None after the last one. Iterating gives the outputs of each."""
        while True:
            call = self._session.take(self._handle)
            if call is not None:
                self._driver.wake()
                return call
            if self._session.outputs_end(self._handle):
                return None
            await self._driver.wait_news(self._handle)

    async def read_state(self) -> tuple[int, State]:
        """Return the seq of the next frame and the present state.

        The state does not include frames that were sent but not applied yet.
        """
        seqs, states = await self._driver.wait(self._session.read_state(self._handle))
        return int(seqs[0]), self._state(states)

    async def reset(self, state: GivenState | None = None) -> None:
        """Set the state, by default to the initial one, after all sent frames were answered. Seqs continue.

        Raises:
            StreamRefused: when the server refuses.
            InvalidInput: for a state of another shape.
        """
        await self._driver.wait(self._session.reset(self._handle, state))

    async def fork(self, name: str) -> AsyncStream:
        """Open a new stream with this one's state and seq, after all sent frames were answered.

        In a cluster the name must belong to this stream's shard (`wire.shard_of`), or is refused with WRONG_SHARD;
        `client.restore(await stream.snapshot(), name)` takes any name.

        Raises:
            StreamRefused: when the server refuses the new stream.
            ConnectionFailed: when the connection was lost and the new stream may be open.
            InvalidInput: for a bad name.
        """
        handle = await self._driver.wait(self._session.fork(self._handle, [name]))
        return AsyncStream(self._driver, handle)

    async def snapshot(self) -> StreamSnapshot:
        """Read the state with its seq and model, to save it or restore it on any server of that model."""
        seq, state = await self.read_state()
        info = self._session.info
        return StreamSnapshot(self.name, seq, state, info.fingerprint, info.model)

    async def close(self) -> State:
        """Close the stream after all sent frames were answered, and return its final state.

        Raises:
            StreamRefused: when the server refuses.
        """
        return self._state(await self._driver.wait(self._session.close(self._handle)))


class AsyncGroup(GroupView):
    """Streams that are stepped together with one array. Each of them can be refused or evicted alone.

    They may belong to several shards. A call then ends when each of these has answered, and if one of them is gone for
    good it raises ConnectionFailed, although the others may have carried it out. If streams of several shards are
    refused, the error names the first one of one shard, and `failures` are in the order of the shards.
    """

    def __init__(self, names: tuple[str, ...], parts: Sequence[GroupPart]) -> None:
        """The methods of `AsyncClient` make these."""
        self._names = names
        self._parts = parts

    @classmethod
    async def _opened(
        cls,
        names: tuple[str, ...],
        parts: Sequence[tuple[Driver, Indices, T]],
        ask: Callable[[Session, Indices, T], Opening],
    ) -> AsyncGroup:
        """The group of the streams that the calls of these parts open: all of them, or none."""
        calls = await all_of((driver, ask(driver.session, where, own)) for driver, where, own in parts)
        opened = [(part[0], call.result()) for part, call in zip(parts, calls, strict=True) if call.error is None]
        if len(opened) < len(calls) and calls[0].begins_streams:
            await all_of((driver, driver.session.close(handle)) for driver, handle in opened)
        answered = zip(parts, calls, strict=True)
        return cls(names, [GroupPart(driver, where, call.result()) for (driver, where, _), call in answered])

    async def _ask(self, ask: Callable[[Session, Indices, StreamHandle], Call[R]]) -> list[R]:
        asked = ((driver, ask(driver.session, where, handle)) for driver, where, handle in self._parts)
        return [call.result() for call in await all_of(asked)]

    def _state(self, rows: Sequence[U8]) -> State:
        return as_state(self._gather(rows), self._parts[0].driver.session.info.state, single=False)

    async def step(self, x: npt.ArrayLike, rows: npt.ArrayLike | None = None, timeout_s: float | None = None) -> F32:
        """Send one frame for each stream [N, features], or T frames [T, N, features]; return outputs in the same form.

        `rows` are the distinct indices of the N streams that take the step; None for all. `timeout_s` is as in
        `AsyncStream.step`; after a StepTimeout some of the frames may have been sent, and `next_seqs` says which.

        Raises:
            StepTimeout: when some answer did not come in time.
            FramesRefused: when some frames were not applied; its `outputs` contain the others'.
            StreamEvicted: when one of the streams has ended. If it ended after the call, `outputs` contain the others';
                if it had ended before, `outputs` is None and nothing was sent. Leave the stream out with `rows`.
            InvalidInput: for another shape, bad rows, or values that float32 cannot hold.
        """
        return (await self.step_timed(x, rows, timeout_s)).outputs

    async def step_timed(
        self, x: npt.ArrayLike, rows: npt.ArrayLike | None = None, timeout_s: float | None = None
    ) -> TimedOutputs:
        """Like `step`, but return the server's times too."""
        check_time(timeout_s)
        if len(self._parts) > 1:
            return await self._step_shards(x, rows, timeout_s)
        driver, _, handle = self._parts[0]
        call = driver.session.step(handle, x, rows)
        await driver.until_answered(call, timeout_s)
        return call.result()

    async def _step_shards(self, x: npt.ArrayLike, rows: npt.ArrayLike | None, timeout_s: float | None) -> TimedOutputs:
        began = asyncio.get_running_loop().time()
        info = self._parts[0].driver.session.info
        taken = np.arange(len(self)) if rows is None else row_indices(rows, len(self))
        frames, prefix = group_frames(x, len(taken), info.features)
        shares = [(part, np.flatnonzero(np.isin(taken, part.where))) for part in self._parts]
        shares = [(part, columns) for part, columns in shares if len(columns)]
        calls = await all_of(
            (
                (driver, driver.session.step(handle, frames[:, columns], np.searchsorted(where, taken[columns])))
                for (driver, where, handle), columns in shares
            ),
            lambda driver, call: driver.until_answered(call, timeout_s, began),
        )
        if timeout_s is not None and any(isinstance(call.error, StepTimeout) for call in calls):
            raise StepTimeout(timeout_s, any(call.sent or call.started for call in calls))
        outputs = np.empty((*frames.shape[:2], info.outputs), np.float32)
        errors = list[FramesRefused | StreamEvicted]()
        for (_, columns), call in zip(shares, calls, strict=True):
            if isinstance(call.error, FramesRefused | StreamEvicted):
                errors.append(call.error)
                outputs[:, columns] = call.error.outputs
            else:
                outputs[:, columns] = call.result().outputs
        answer = outputs.reshape(*prefix, info.outputs)
        if errors:
            raise _joined(errors, answer)
        return TimedOutputs(answer, *map(max, zip(*(call.result()[1:] for call in calls), strict=True)))

    async def read_state(self) -> tuple[U64, State]:
        """Return seqs, uint64 [N], and the states of N streams; see `AsyncStream.read_state`."""
        parts = await self._ask(lambda session, where, handle: session.read_state(handle))
        seqs, states = zip(*parts, strict=True)
        return self._gather(seqs), self._state(states)

    async def reset(self, states: GivenState | None = None) -> None:
        """Set all states, by default to the initial one, after all sent frames were answered.

        Raises:
            StreamRefused: naming the first stream that the server refuses; others may have been reset.
            InvalidInput: for states of another shape.
        """
        for driver, _, handle in self._parts:
            driver.session.check_handle(handle)  # so that none is asked if another one cannot be
        own = _shares(states, self._parts[0].driver.session, len(self))
        await self._ask(lambda session, where, handle: session.reset(handle, own(where)))

    async def fork(self, names: Sequence[str]) -> AsyncGroup:
        """Open a new stream for each of these, with its state and seq; see `AsyncStream.fork`.

        In a cluster each name must belong to the shard of the stream that it copies.
        """
        names = good_names(names)
        if len(names) != len(self):
            raise InvalidInput(f"{len(self)} streams are copied, there are names for {len(names)}")
        own = np.array(names, object)
        return await self._opened(
            names, self._parts, lambda session, where, handle: session.fork(handle, own[where].tolist())
        )

    async def close(self) -> State:
        """Close all streams and return their final states, in which floats of ended streams are NaN.

        Raises:
            StreamRefused: when the server refuses one that is open.
        """
        for part in self._parts:
            part.driver.session.check_open()  # so that none is asked if another one cannot be
        return self._state(await self._ask(lambda session, where, handle: session.close(handle)))


def _shares(states: GivenState | None, session: Session, count: int) -> Callable[[Indices], GivenState | None]:
    """Return a function that gives a group's part its states, by the indices of its streams."""
    if states is None:
        return lambda where: None
    spec = session.info.state
    rows = state_rows(states, spec, count)
    return lambda where: as_state(rows[where], spec, single=False)


def _joined(errors: Sequence[FramesRefused | StreamEvicted], outputs: F32) -> FramesRefused | StreamEvicted:
    """The errors of a step's parts as one. It is StreamEvicted if a stream has ended, as of a single server."""
    first = min(errors, key=lambda error: isinstance(error, FramesRefused))
    failures = tuple(chain.from_iterable(error.failures for error in errors))
    if isinstance(first, FramesRefused):
        return FramesRefused(first.code, first.sentence, failures, outputs)
    first.failures, first.outputs = failures, outputs
    return first


class AsyncClient:
    """A client of one model of a server or cluster. One event loop owns it; use `async with AsyncClient() as client`.

    Frames that many tasks send in the same turn of the event loop travel together.

    When the connection is lost, or the server is restarted, the client connects again, resumes its streams and sends
    unanswered frames again. Calls that wait just take longer: every frame is applied once, and every output comes once
    and in order. Exceptions leave decisions to the caller: a stream has ended meanwhile (StreamEvicted), the server
    lost frames (DataLoss), an opening is in doubt or no server came back in time (ConnectionFailed).
    """

    def __init__(
        self,
        endpoint: str | None = None,
        name: str = "",
        timeout_s: float = 10.0,
        reconnect_s: float = 30.0,
        *,
        model: str | None = None,
        wait: bool = False,
        key_file: str | Path | None = None,
        server_key: str | Path | None = None,
    ) -> None:
        """Nothing is sent before `connect` or `async with`.

        Args:
            endpoint: where the server listens, `tcp://HOST:PORT` or `ipc://PATH`; None for $INSTEP_ENDPOINT, or else
                `tcp://127.0.0.1:5757`. Of a cluster, any server will do, or several of them, separated by commas.
            name: for the server's log at level debug; may be empty.
            timeout_s: seconds to wait for a silent server.
            reconnect_s: seconds to try for another connection after one was lost, and for the first one of several
                endpoints; 0 for none.
            model: the name of the model; None for $INSTEP_MODEL, or else the server's default. A connection belongs to
                one model.
            wait: wait up to `timeout_s` for a server that does not listen yet, instead of failing at once.
            key_file: this client's NAME.key_secret, for a server with keys; None for $INSTEP_KEY_FILE, empty for none.
            server_key: the server's public key, or the file that holds it; None for $INSTEP_SERVER_KEY, empty for none.

        Raises:
            InvalidInput: for a bad endpoint, name, model, time or key file.
        """
        if endpoint is None:
            endpoint = os.environ.get("INSTEP_ENDPOINT", DEFAULT_ENDPOINT)
        if model is None:
            model = os.environ.get("INSTEP_MODEL", "")
        keys = read_client_keys(key_file, server_key)
        self._links = Links(endpoint, keys, name=name, timeout_s=timeout_s, reconnect_s=reconnect_s, model=model)
        self._wait = wait

    def __repr__(self) -> str:
        session = self._links.first.session
        return f"<{type(self).__name__} {session.endpoint}: {session.state.value}>"

    async def __aenter__(self) -> AsyncClient:
        await self.connect()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def connect(self) -> None:
        """Connect and greet the server; `async with` does it. A client connects only once.

        Raises:
            ConnectionRefused: when nothing listens at the endpoint, unless the client was made with `wait`.
            ConnectionFailed: when nobody answers within `timeout_s`, or, without `wait`, no host of that name is known.
            HandshakeFailed: when the server and this client do not agree on keys.
            Refused: when the server refuses this client, or has no model of that name (UNKNOWN_MODEL).
        """
        await self._links.connect(self._wait)

    async def close(self, park: bool = False) -> None:
        """Close the open streams and the connection; waiting calls fail with ClientClosed. May be called twice.

        With `park` the streams are left open: the server parks them as if the connection was lost, and for
        `info.park_s` seconds they can be resumed.
        """
        await self._links.close(park)

    @property
    def is_connected(self) -> bool:
        """Whether all connections are open: not before `connect`, while one is lost, or after the client's end."""
        return self._links.are_open

    @property
    def info(self) -> ServerInfo:
        """The server's description of itself and of the model; of a cluster, that of the server connected first.

        Raises:
            ClientClosed: before the client was connected.
        """
        return self._links.first.session.info

    async def open(
        self, name: str, initial_state: GivenState | None = None, first_seq: int = 0, if_exists: IfExists = "error"
    ) -> AsyncStream:
        """Open one stream; its state is the model's initial one unless given (see `instep_client.states`).

        Args:
            name: the stream's name.
            initial_state: before its first frame.
            first_seq: the seq of its first frame.
            if_exists: how to treat a stream of this name that is open or parked, for example after its producer
                crashed. `error` raises StreamRefused. `resume` continues it in its own state, after all frames that
                were applied (`next_seq` tells). `replace` closes it first. The last two take it from its owner.

        Raises:
            StreamRefused: when the server refuses it.
            ConnectionFailed: when the connection was lost meanwhile and the stream may be open.
            InvalidInput: for a bad name or seq, a state of another shape, or another `if_exists`.
        """
        if if_exists not in get_args(IfExists):
            raise InvalidInput(f"if_exists is {if_exists!r:.40}: expected {', '.join(get_args(IfExists))}")
        for attempt in range(_MOST_ATTEMPTS):
            driver = await self._links.of_stream(name)
            call = driver.session.open([name], initial_state, single=True, first_seqs=first_seq or None)
            try:
                return AsyncStream(driver, await driver.wait(call))
            except StreamRefused as error:
                if error.code is not Code.NAME_IN_USE or if_exists == "error" or attempt + 1 == _MOST_ATTEMPTS:
                    raise
            try:
                stream = await self.resume(name, take_over=True)
                if if_exists == "resume":
                    return stream
                await stream.close()
            except (StreamRefused, StreamEvicted) as error:
                if error.code not in _MOVED_ON:
                    raise
        raise AssertionError

    async def open_group(self, names: Sequence[str], initial_states: GivenState | None = None) -> AsyncGroup:
        """Open streams to be stepped with one array; `initial_states` are those of N streams.

        Either all are opened or none: those that were opened before one was refused are closed again, and their names
        free, when this raises.

        Raises:
            StreamRefused: naming the first stream that the server refuses.
            InvalidInput: for bad or repeated names, or states of another shape.
        """
        names = good_names(names)
        parts = await self._links.of_streams(names)
        states = _shares(initial_states, self._links.first.session, len(names))
        return await AsyncGroup._opened(
            names, parts, lambda session, where, own: session.open(own, states(where), single=False)
        )

    async def resume(self, name: str, have: int | None = None, epoch: int = 0, take_over: bool = False) -> AsyncStream:
        """Continue a stream that is parked, or that another client owns.

        The stream continues from `have`: send the frames from there on. Frames that the server has applied are answered
        as before if they are the same; it keeps the last `info.window_frames` outputs.

        Args:
            name: the stream's name.
            have: the caller has the outputs of all seqs below it; None continues after the last computed frame.
            epoch: the number of the former ownership (`AsyncStream.epoch`).
            take_over: take the stream from any owner, and continue from the server's seq, even if it is lower.

        Raises:
            StreamRefused: UNKNOWN_STREAM or EXPIRED if there is no such stream, FENCED if its epoch is newer.
            DataLoss: if the server has fewer frames than the user has outputs, or no longer the next outputs.
            ConnectionFailed: when the connection was lost meanwhile and the stream may have been resumed.
            InvalidInput: for a bad name or number.
        """
        driver = await self._links.of_stream(name)
        call = driver.session.resume([name], have, epoch, take_over, single=True)
        return AsyncStream(driver, await driver.wait(call))

    async def resume_group(
        self,
        names: Sequence[str],
        have: npt.ArrayLike | None = None,
        epochs: npt.ArrayLike = 0,
        take_over: bool = False,
    ) -> AsyncGroup:
        """Continue streams as one group; see `resume`. `have` and `epochs` are one number for all, or uint64 [N].

        If one stream is refused, the others belong to this client then, and `take_over` continues them.

        Raises:
            Refused: as `resume`, naming the first stream that the server refuses.
        """
        names = good_names(names)
        seqs = counts(HAVE_ALL if have is None else have, len(names), "have")
        numbers = counts(epochs, len(names), "epochs")
        return await AsyncGroup._opened(
            names,
            await self._links.of_streams(names),
            lambda session, where, own: session.resume(own, seqs[where], numbers[where], take_over, single=False),
        )

    async def read_state(self, name: str) -> tuple[int, State]:
        """Read the state of any stream of the server, even a parked one, without disturbing its owner.

        Returns:
            The seq of the stream's next frame, and its state.

        Raises:
            StreamRefused: UNKNOWN_STREAM or EXPIRED if there is no such stream.
            InvalidInput: for a bad name.
        """
        driver = await self._links.of_stream(name)
        seqs, states = await driver.wait(driver.session.read_state_by_name([name]))
        return int(seqs[0]), as_state(states, self.info.state, single=True)

    async def snapshot(self, name: str) -> StreamSnapshot:
        """Read the state of any stream; see `AsyncStream.snapshot`."""
        seq, state = await self.read_state(name)
        info = self.info
        return StreamSnapshot(name, seq, state, info.fingerprint, info.model)

    async def restore(self, snapshot: StreamSnapshot, name: str | None = None) -> AsyncStream:
        """Open a stream that continues from a snapshot, by default under the snapshot's name.

        Raises:
            InvalidInput: when the snapshot is of another model, or its state holds NaN or infinity.
            StreamRefused: when the server refuses it.
        """
        snapshot.check(self.info)
        return await self.open(snapshot.name if name is None else name, snapshot.state, snapshot.seq)

    async def list_streams(self, prefix: str = "", place: StreamPlace | None = None) -> list[ListedStream]:
        """List the model's streams by prefix of their names and, optionally, by place, whoever owns them.

        Streams that open, close or move meanwhile may be missing or appear twice.

        Raises:
            InvalidInput: for an unknown place, or a prefix that no name can have.
        """
        places = get_args(StreamPlace)
        if place is not None and place not in places:
            raise InvalidInput(f"place is {place!r:.40}: expected {', '.join(places)}")
        number = 0 if place is None else int(Place[place.upper()])
        found: list[ListedStream] = []
        for driver in await self._links.all():
            cursor = -1  # 0 begins a list, and ends one
            while cursor:
                page, cursor = await driver.wait(driver.session.list_streams(max(cursor, 0), _PAGE, number, prefix))
                found += page
        return found

    async def remove_streams(self, names: Sequence[str], park: bool = False) -> list[str]:
        """Close streams of others, or park them. Their owners get BY_OPERATOR; only an operator may do this.

        Returns:
            The names of which there is no such stream.

        Raises:
            StreamRefused: when the server refused one for another reason; some of the others are closed or parked.
            Refused: NOT_ALLOWED without the role of an operator.
        """
        missing, names = list[str](), good_names(names)
        for driver, _, own in await self._links.of_streams(names):
            for first in range(0, len(own), _PAGE):
                page = own[first : first + _PAGE]
                for failure in await driver.wait(driver.session.remove(page, park)):
                    if failure.code not in (Code.UNKNOWN_STREAM, Code.EXPIRED):
                        raise StreamRefused(failure.code, failure.sentence, page[failure.column])
                    missing.append(page[failure.column])
        return missing

    async def _ask_all(self, ask: Callable[[Session], Call[R]]) -> list[R]:
        asked = [(driver, ask(driver.session)) for driver in await self._links.all()]
        return [call.result() for call in await all_of(asked)]

    async def list_models(self) -> list[ServedModel]:
        """The models of the server, beginning with the default; of a cluster, with the sums over all shards."""
        found: dict[str, ServedModel] = {}
        for models in await self._ask_all(Session.models):
            for model in models:
                if (other := found.get(model.name)) is not None:
                    sums = {key: getattr(model, key) + getattr(other, key) for key in _SUMMED}
                    model = model._replace(**sums)
                found[model.name] = model
        return list(found.values())

    async def ping(self) -> float:
        """The time of a round trip to the server, in seconds; of a cluster, to the one connected first."""
        driver = await self._links.of_shard(self._links.first.session.shard)
        return await driver.wait(driver.session.ping(time.monotonic()))

    async def stats(self) -> dict[str, float]:
        """The server's numbers for this client's model, by name, and `loop_lag_s`.

        At a server with keys, `principal_frames_total{principal="NAME"}` and other such names are the numbers of the
        principals that this client may see, over all models.

        `loop_lag_s` is the longest delay of this process's event loop in the last 30 to 60 seconds. Frames and outputs
        wait that long here, which the server's times do not show.

        For the shards of a cluster, counters, rates and numbers of things are added up. Of quantiles, means, times and
        shares the largest is given, and the smallest of `ready`, `exact` and `recording_free_bytes`.
        """
        numbers: dict[str, float] = {}
        for shard in await self._ask_all(Session.statistics):
            for name, value in shard.items():
                among = min if name in _LEAST else max if _LARGEST.search(name) else add
                numbers[name] = among(numbers[name], value) if name in numbers else value
        return numbers | {"loop_lag_s": self._links.first.loop_lag_s}
