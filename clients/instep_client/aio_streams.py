"""Streams and groups of `aio.AsyncClient`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from instep_client.connection import Call
from instep_client.driver import Driver
from instep_client.frames import TimedOutputs
from instep_client.protocol.state_spec import U8
from instep_client.protocol.wire import F32, U64
from instep_client.session import Session
from instep_client.snapshots import StreamSnapshot
from instep_client.states import State, as_state
from instep_client.streams import StreamHandle


class StreamView:
    """The properties of an `AsyncStream` and a `Stream`, which need no message to the server."""

    _session: Session
    _handle: StreamHandle

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} next_seq={self.next_seq} epoch={self.epoch}>"

    @property
    def name(self) -> str:
        """The name it was opened by."""
        return self._handle.names[0]

    @property
    def next_seq(self) -> int:
        """The seq of the next frame that is sent; with nothing on its way, that of the next frame applied."""
        return int(self._session.table.next_seqs(self._handle)[0])

    @property
    def epoch(self) -> int:
        """The number of this ownership of the stream, by which it can be resumed; a new one with each connection."""
        return int(self._session.table.epochs(self._handle)[0])

    @property
    def moved_at(self) -> int | None:
        """The seq from which on the present version of the model computes it, where the server has swapped the model.

        None if the model has not been swapped since.
        """
        seq = int(self._session.table.moved_at[self._handle.rows[0]])
        return None if seq < 0 else seq


class GroupView:
    """The properties of an `AsyncGroup` and a `Group`, which need no message to the server."""

    _session: Session
    _handle: StreamHandle

    def __repr__(self) -> str:
        first, last = self.names[0], self.names[-1]
        return f"<{type(self).__name__} of {len(self)}: {first!r}{f' … {last!r}' if len(self) > 1 else ''}>"

    def __len__(self) -> int:
        return len(self._handle.names)

    @property
    def names(self) -> tuple[str, ...]:
        """The names they were opened by."""
        return self._handle.names

    @property
    def next_seqs(self) -> U64:
        """The seq of the next frame of each stream, uint64 [N]."""
        return self._session.table.next_seqs(self._handle)

    @property
    def epochs(self) -> U64:
        """The numbers of these ownerships, uint64 [N]; see `AsyncStream.epoch`."""
        return self._session.table.epochs(self._handle)

    @property
    def moved_at(self) -> npt.NDArray[np.int64]:
        """As `AsyncStream.moved_at`, int64 [N], -1 for None."""
        return self._session.table.moved_at[self._handle.rows]


class _Handle:
    """The base of streams and groups."""

    def __init__(self, session: Session, driver: Driver, handle: StreamHandle) -> None:
        """Made by an `AsyncClient`."""
        self._session = session
        self._driver = driver
        self._handle = handle

    def _state(self, rows: U8) -> State:
        """Rows of states as the user gets them."""
        return as_state(rows, self._session.info.state, single=self._handle.single)


class AsyncStream(_Handle, StreamView):
    """One stream: frames in, outputs out, in order.

    Frames are sent in the order in which `step` and `send` were called. A frame that the server refuses leaves the
    stream as it was; frames that were sent behind it before the refusal came are refused too, with SEQ_GAP. A call that
    is cancelled while its frames wait for credit takes them back; frames that were sent count as sent (`next_seq`
    tells).

    A connection that is lost is made anew (see `AsyncClient`): calls just take longer, and every frame is applied once.

    Every method raises StreamEvicted once the stream has ended (DataLoss is of that kind), ConnectionFailed once the
    server is gone for good, and ClientClosed after `close`.
    """

    async def step(self, x: npt.ArrayLike) -> F32:
        """Send a frame [features] or a chunk [T, features]; its outputs, [outputs] or [T, outputs].

        Raises:
            FramesRefused: when some of it was not applied.
            InvalidInput: for another shape, or values that float32 cannot hold.
        """
        call = self._session.step(self._handle, x)
        await self._driver.until_woken(call)
        return call.result().outputs

    async def step_timed(self, x: npt.ArrayLike) -> TimedOutputs:
        """Like `step`, with the server's times."""
        return await self._driver.wait(self._session.step(self._handle, x))

    async def send(self, x: npt.ArrayLike) -> None:
        """Send a frame or chunk without waiting for its outputs, which iterating over the stream gives.

        Waits while the server's credit is used up, and while as many frames as that credit wait here to be read.

        Raises:
            InvalidInput: for another shape, or values that float32 cannot hold.
            InstepError: when outputs wait and nobody reads any of them for the client's `timeout_s`.
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
        """The outputs of the next `send`, in the shape that `step` would give.

        Raises:
            FramesRefused: in place of outputs; iterating may continue.
        """
        call = await self.next_call()
        if call is None:
            raise StopAsyncIteration
        return call.result().outputs

    async def next_call(self) -> Call[TimedOutputs] | None:
        """The next ended call of `send`, whose outputs iterating gives, or None at its end."""
        while True:
            call = self._session.take(self._handle)
            if call is not None:
                self._driver.wake()
                return call
            if self._session.outputs_end(self._handle):
                return None
            await self._driver.wait_news(self._handle)

    async def read_state(self) -> tuple[int, State]:
        """The state as it is now and the seq of the frame that comes next.

        Frames that are not applied yet are not in it.
        """
        seqs, states = await self._driver.wait(self._session.read_state(self._handle))
        return int(seqs[0]), self._state(states)

    async def reset(self, state: State | None = None) -> None:
        """Set the state, by default to the initial one, once all sent frames are answered; seqs continue.

        Raises:
            StreamRefused: when the server refuses.
            InvalidInput: for a state of another shape.
        """
        await self._driver.wait(self._session.reset(self._handle, state))

    async def fork(self, name: str) -> AsyncStream:
        """A new stream that begins with this one's state and seq, once everything sent was answered.

        Raises:
            StreamRefused: when the server refuses the new stream.
            ConnectionFailed: when the connection was lost and the new stream may be open.
            InvalidInput: for a bad name.
        """
        handle = await self._driver.wait(self._session.fork(self._handle, [name]))
        return AsyncStream(self._session, self._driver, handle)

    async def snapshot(self) -> StreamSnapshot:
        """The state with its seq and model: it can be saved, and restored on any server of that model."""
        seq, state = await self.read_state()
        info = self._session.info
        return StreamSnapshot(self.name, seq, state, info.fingerprint, info.model)

    async def close(self) -> State:
        """Close it once everything sent was answered; its final state.

        Raises:
            StreamRefused: when the server refuses.
        """
        return self._state(await self._driver.wait(self._session.close(self._handle)))


class AsyncGroup(_Handle, GroupView):
    """Many streams stepped by one array; each is a stream of its own, and may be refused or evicted alone."""

    async def step(self, x: npt.ArrayLike, rows: npt.ArrayLike | None = None) -> F32:
        """Send one frame for each stream, or T: [N, features] or [T, N, features]; outputs in the same form.

        With `rows`, distinct indices, only these N streams take a step.

        Raises:
            FramesRefused: when some were not applied; its `outputs` hold the others'.
            StreamEvicted: when one of the streams has ended. If it ended after the call, `outputs` hold the others'; if
                it had ended before, `outputs` is None and nothing was sent. Leave the stream out with `rows`.
            InvalidInput: for another shape, bad rows, or values that float32 cannot hold.
        """
        return (await self.step_timed(x, rows)).outputs

    async def step_timed(self, x: npt.ArrayLike, rows: npt.ArrayLike | None = None) -> TimedOutputs:
        """Like `step`, with the server's times beside the outputs."""
        return await self._driver.wait(self._session.step(self._handle, x, rows))

    async def read_state(self) -> tuple[U64, State]:
        """Seqs uint64 [N] and states of N streams; see `AsyncStream.read_state`."""
        seqs, states = await self._driver.wait(self._session.read_state(self._handle))
        return seqs, self._state(states)

    async def reset(self, states: State | None = None) -> None:
        """Set all states once everything sent was answered, to the initial one unless given.

        Raises:
            StreamRefused: naming the first stream that the server refuses; others may have been reset.
            InvalidInput: for states of another shape.
        """
        await self._driver.wait(self._session.reset(self._handle, states))

    async def fork(self, names: Sequence[str]) -> AsyncGroup:
        """New streams, one for each of these, that begin with their states and seqs; see `AsyncStream.fork`."""
        handle = await self._driver.wait(self._session.fork(self._handle, names))
        return AsyncGroup(self._session, self._driver, handle)

    async def close(self) -> State:
        """Close all; their final states, with NaN in the floats of those that had ended.

        Raises:
            StreamRefused: when the server refuses one that is open.
        """
        return self._state(await self._driver.wait(self._session.close(self._handle)))
