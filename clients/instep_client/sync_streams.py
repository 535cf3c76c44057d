"""Streams and groups of `sync.Client`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from instep_client.aio_streams import AsyncGroup, AsyncStream, GroupView, StreamView
from instep_client.loop_thread import InThread, LoopThread, blocking
from instep_client.protocol.wire import F32

H = TypeVar("H", bound=AsyncStream | AsyncGroup)


class _Handle(InThread[H], Generic[H]):
    """The base of streams and groups. It keeps its client alive."""

    def __init__(self, client: object, thread: LoopThread, handle: H) -> None:
        """Made by a `Client`."""
        super().__init__(thread, handle)
        self._client = client
        self._session, self._handle = handle._session, handle._handle


class Stream(_Handle[AsyncStream], StreamView):
    """One stream; see `AsyncStream`, whose verbs these are. It keeps its client alive."""

    step = blocking(AsyncStream.step)
    step_timed = blocking(AsyncStream.step_timed)
    send = blocking(AsyncStream.send)
    read_state = blocking(AsyncStream.read_state)
    reset = blocking(AsyncStream.reset)
    snapshot = blocking(AsyncStream.snapshot)
    close = blocking(AsyncStream.close)

    def finish(self) -> None:
        """Nothing more will be sent: iterating ends after the last output; see `AsyncStream.finish`."""
        self._thread.run(_finish(self._inner))

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> F32:
        """The outputs of the next `send`; see `AsyncStream.__anext__`."""
        outputs = self._thread.run(self._inner.next_outputs())
        if outputs is None:
            raise StopIteration
        return outputs

    def fork(self, name: str) -> Stream:
        """A new stream that begins with this one's state and seq; see `AsyncStream.fork`."""
        return Stream(self._client, self._thread, self._thread.run(self._inner.fork(name)))


class Group(_Handle[AsyncGroup], GroupView):
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
