"""The client for threads: the same verbs as `aio.py`, without await.

A client owns one daemon thread with an event loop in it, where an `AsyncClient` lives. Any number of threads may use
the client and its streams at once; frames that they send in the same moment travel together.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Generic, TypeVar

import numpy.typing as npt

from instep_client.aio import AsyncClient, IfExists
from instep_client.aio_streams import AsyncGroup, AsyncStream, GroupView, StreamView
from instep_client.connection import Call
from instep_client.frames import TimedOutputs
from instep_client.loop_thread import InThread, LoopThread, blocking
from instep_client.protocol.wire import F32, ServerInfo
from instep_client.snapshots import StreamSnapshot
from instep_client.states import State

H = TypeVar("H", bound=AsyncStream | AsyncGroup)


class Client(InThread[AsyncClient]):
    """A connection to one model of one server, usable from many threads; use it as `with Client() as client`.

    Verbs and their arguments are those of `AsyncClient`.

    A client that is dropped without `close` closes itself, at the latest when the interpreter exits. After a fork it
    works only in the process that made it.
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
    ) -> None:
        """Nothing is sent before `connect` or `with`; the arguments are those of `AsyncClient`."""
        client = AsyncClient(endpoint, name, timeout_s, reconnect_s, model=model, wait=wait)
        super().__init__(LoopThread(client), client)
        weakref.finalize(self, self._thread.stop)

    def __repr__(self) -> str:
        return repr(self._inner).replace("Async", "", 1)

    def __enter__(self) -> Client:
        self.connect()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def connect(self) -> None:
        """Connect and greet the server, once; `with` does it.

        Raises:
            ConnectionRefused: when nothing listens at the endpoint, unless the client was made with `wait`.
            ConnectionFailed: when nobody answers within `timeout_s`, without `wait` no host of that name is known, or
                this process has no room for an event loop.
            Refused: when the server does not take this client, or has no model of that name (UNKNOWN_MODEL).
        """
        self._thread.start()
        try:
            self._thread.run(self._inner.connect())
        except KeyboardInterrupt as interrupt:
            self.close()
            raise interrupt.with_traceback(None)  # noqa: B904 (it is the same)
        except BaseException:
            self.close()
            raise

    def close(self, park: bool = False) -> None:
        """Close the connection and its streams, or leave them to be parked; see `AsyncClient.close`.

        May be called twice; the first call decides.
        """
        self._thread.stop(park)

    @property
    def info(self) -> ServerInfo:
        """The server's description of itself.

        Raises:
            ClientClosed: before the client was connected.
        """
        return self._inner.info

    read_state = blocking(AsyncClient.read_state)
    snapshot = blocking(AsyncClient.snapshot)
    list_streams = blocking(AsyncClient.list_streams)
    list_models = blocking(AsyncClient.list_models)
    ping = blocking(AsyncClient.ping)
    stats = blocking(AsyncClient.stats)

    def open(
        self, name: str, initial_state: State | None = None, first_seq: int = 0, if_exists: IfExists = "error"
    ) -> Stream:
        """Open one stream; see `AsyncClient.open`."""
        stream = self._thread.run(self._inner.open(name, initial_state, first_seq, if_exists))
        return Stream(self, self._thread, stream)

    def open_group(self, names: Sequence[str], initial_states: State | None = None) -> Group:
        """Open many streams to be stepped by one array; see `AsyncClient.open_group`."""
        return Group(self, self._thread, self._thread.run(self._inner.open_group(names, initial_states)))

    def resume(self, name: str, have: int | None = None, epoch: int = 0, take_over: bool = False) -> Stream:
        """Go on with a stream that is parked, or that another client has; see `AsyncClient.resume`."""
        return Stream(self, self._thread, self._thread.run(self._inner.resume(name, have, epoch, take_over)))

    def resume_group(
        self,
        names: Sequence[str],
        have: npt.ArrayLike | None = None,
        epochs: npt.ArrayLike = 0,
        take_over: bool = False,
    ) -> Group:
        """Go on with many streams as one group; see `AsyncClient.resume_group`."""
        group = self._thread.run(self._inner.resume_group(names, have, epochs, take_over))
        return Group(self, self._thread, group)

    def restore(self, snapshot: StreamSnapshot, name: str | None = None) -> Stream:
        """Open a stream that continues from a snapshot; see `AsyncClient.restore`."""
        return Stream(self, self._thread, self._thread.run(self._inner.restore(snapshot, name)))


class _ThreadHandle(InThread[H], Generic[H]):
    """The base of streams and groups. It keeps its client alive."""

    def __init__(self, client: object, thread: LoopThread, handle: H) -> None:
        """Made by a `Client`."""
        super().__init__(thread, handle)
        self._client = client
        self._session, self._handle = handle._session, handle._handle


class Stream(_ThreadHandle[AsyncStream], StreamView):
    """One stream, with the methods of `AsyncStream`. It keeps its client alive.

    Ctrl-C while iterating loses no outputs: iterating again gives them. After a Ctrl-C in `step`, `next_seq` tells
    whether the frames were sent; their outputs are lost. Use `send` and iterate if that matters.
    """

    def __init__(self, client: object, thread: LoopThread, handle: AsyncStream) -> None:
        """Made by a `Client`."""
        super().__init__(client, thread, handle)
        self._taken: deque[Call[TimedOutputs] | None] = deque()
        """Ended calls whose outputs iterating gives next; after a call of `next`, only where that was interrupted."""

    step = blocking(AsyncStream.step)
    step_timed = blocking(AsyncStream.step_timed)
    send = blocking(AsyncStream.send)
    read_state = blocking(AsyncStream.read_state)
    reset = blocking(AsyncStream.reset)
    snapshot = blocking(AsyncStream.snapshot)
    close = blocking(AsyncStream.close)

    def finish(self) -> None:
        """Send nothing more; iterating ends after the last output; see `AsyncStream.finish`."""
        self._thread.run(_finish(self._inner))

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> F32:
        """The outputs of the next `send`; see `AsyncStream.__anext__`."""
        while True:
            if not self._taken:
                self._thread.run(self._take())
            with suppress(IndexError):  # another thread that iterates was quicker
                call = self._taken.popleft()
                break
        if call is None:
            raise StopIteration
        return call.result().outputs

    async def _take(self) -> None:
        if not self._taken:  # one that was interrupted may have taken a call meanwhile
            self._taken.append(await self._inner.next_call())

    def fork(self, name: str) -> Stream:
        """A new stream that begins with this one's state and seq; see `AsyncStream.fork`."""
        return Stream(self._client, self._thread, self._thread.run(self._inner.fork(name)))


class Group(_ThreadHandle[AsyncGroup], GroupView):
    """Many streams stepped by one array; see `AsyncGroup`, whose verbs these are. It keeps its client alive."""

    step = blocking(AsyncGroup.step)
    step_timed = blocking(AsyncGroup.step_timed)
    read_state = blocking(AsyncGroup.read_state)
    reset = blocking(AsyncGroup.reset)
    close = blocking(AsyncGroup.close)

    def fork(self, names: Sequence[str]) -> Group:
        """New streams that begin with their states and seqs; see `AsyncGroup.fork`."""
        return Group(self._client, self._thread, self._thread.run(self._inner.fork(names)))


async def _finish(stream: AsyncStream) -> None:
    stream.finish()
