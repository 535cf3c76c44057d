"""The client for asyncio, with uvloop or without: verbs over `session.py`, run by `driver.py`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

import numpy.typing as npt

from instep_client.calls import Answer
from instep_client.driver import Driver
from instep_client.session import Session
from instep_client.streams import Lane
from instep_client.wire import DEFAULT_ENDPOINT, F32, U64, ServerInfo


class AsyncClient:
    """A connection to one server. One event loop owns it; use it as `async with AsyncClient() as client`.

    Whatever many tasks send in the same turn of the event loop travels in one message.
    """

    def __init__(self, endpoint: str = DEFAULT_ENDPOINT, name: str = "", timeout_s: float = 10.0) -> None:
        """Nothing is sent before `connect` or `async with`.

        Args:
            endpoint: where the server listens, as ZeroMQ writes it.
            name: told to the server in the greeting, which checks it and shows it nowhere; may be empty.
            timeout_s: how long a silent server is waited for, in seconds.

        Raises:
            InvalidInput: for a bad name or timeout.
        """
        self._session = Session(endpoint, name, timeout_s)
        self._driver = Driver(self._session)

    async def __aenter__(self) -> AsyncClient:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def connect(self) -> None:
        """Connect and greet the server, once; `async with` does it.

        Raises:
            ConnectionFailed: when nobody answers within `timeout_s`.
            Refused: when the server does not take this client.
        """
        await self._driver.start()
        try:
            await self._driver.wait(self._session.greeting)
        except BaseException:
            await self._driver.stop()
            raise

    async def close(self) -> None:
        """Close the open streams and the connection; what waits fails with ClientClosed. May be called twice."""
        await self._driver.stop()

    @property
    def info(self) -> ServerInfo:
        """What the server said of itself.

        Raises:
            ClientClosed: before the client was connected.
        """
        return self._session.info

    async def open(self, name: str, initial_state: npt.ArrayLike | None = None) -> AsyncStream:
        """Open one stream; its state is float32 [state_layers, state_size], zeros unless given.

        Raises:
            StreamRefused: when the server refuses it.
            InvalidInput: for a bad name or a state of another shape.
        """
        call = self._session.open([name], initial_state, single=True)
        return AsyncStream(self._session, self._driver, await self._driver.wait(call))

    async def open_group(self, names: Sequence[str], initial_states: npt.ArrayLike | None = None) -> AsyncGroup:
        """Open many streams to be stepped by one array; states are float32 [N, state_layers, state_size].

        Either all are opened or none.

        Raises:
            StreamRefused: naming the first stream that the server refuses.
            InvalidInput: for bad or repeated names, or states of another shape.
        """
        call = self._session.open(names, initial_states, single=False)
        return AsyncGroup(self._session, self._driver, await self._driver.wait(call))

    async def ping(self) -> float:
        """The seconds that a message takes to the server and back."""
        return await self._driver.wait(self._session.ping(time.monotonic()))

    async def stats(self) -> dict[str, float]:
        """The server's numbers by name."""
        return await self._driver.wait(self._session.statistics())


class AsyncStream:
    """One stream: frames in, outputs out, in order.

    Frames are sent in the order in which `step` and `send` were called. A frame that the server refuses leaves the
    stream as it was; frames that were sent behind it before the refusal came are refused too, with SEQ_GAP. A call that
    is cancelled while its frames wait for credit takes them back; frames that were sent count as sent (`next_seq`
    tells).

    Every method raises StreamEvicted once the server has ended the stream, ConnectionFailed once the server is gone,
    and ClientClosed after `close`.
    """

    def __init__(self, session: Session, driver: Driver, lane: Lane) -> None:
        """Made by `AsyncClient.open`."""
        self._session = session
        self._driver = driver
        self._lane = lane

    @property
    def name(self) -> str:
        """The name it was opened by."""
        return self._lane.names[0]

    @property
    def next_seq(self) -> int:
        """The seq of the next frame that is sent; with nothing on its way, the number of frames applied."""
        return int(self._session.next_seqs(self._lane)[0])

    async def step(self, x: npt.ArrayLike) -> F32:
        """Send a frame [features] or a chunk [T, features]; its outputs, [outputs] or [T, outputs].

        Raises:
            FramesRefused: when some of it was not applied.
            InvalidInput: for another shape, or values that float32 cannot hold.
        """
        return (await self.step_timed(x)).outputs

    async def step_timed(self, x: npt.ArrayLike) -> Answer:
        """Like `step`, with the server's times beside the outputs."""
        return await self._driver.wait(self._session.step(self._lane, x))

    async def send(self, x: npt.ArrayLike) -> None:
        """Send a frame or chunk without waiting for its outputs, which iterating over the stream gives.

        Waits while the server's credit is used up, and while as many frames as that credit wait here to be read.

        Raises:
            InvalidInput: for another shape, or values that float32 cannot hold.
            InstepError: when outputs wait and nobody reads any of them for the client's `timeout_s`.
        """
        await self._driver.wait_sent(self._session.step(self._lane, x, keep=True))

    def finish(self) -> None:
        """Nothing more will be sent with `send`: iterating ends after the last output."""
        self._session.finish(self._lane)
        self._driver.wake()

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> F32:
        """The outputs of the next `send`, in the shape that `step` would give.

        Raises:
            FramesRefused: in place of outputs; iterating may go on.
        """
        outputs = await self.next_outputs()
        if outputs is None:
            raise StopAsyncIteration
        return outputs

    async def next_outputs(self) -> F32 | None:
        """What iterating gives next, or None at its end."""
        while True:
            call = self._session.take(self._lane)
            if call is not None:
                self._driver.wake()
                return call.result().outputs
            if self._session.outputs_end(self._lane):
                return None
            await self._driver.wait_news(self._lane)

    async def close(self) -> F32:
        """Close it once everything sent was answered; its final state, float32 [state_layers, state_size].

        Raises:
            StreamRefused: when the server refuses.
        """
        info = self._session.info
        final = await self._driver.wait(self._session.close(self._lane))
        return final.reshape(info.state_layers, info.state_size)


class AsyncGroup:
    """Many streams stepped by one array; each is a stream of its own, and may be refused or evicted alone."""

    def __init__(self, session: Session, driver: Driver, lane: Lane) -> None:
        """Made by `AsyncClient.open_group`."""
        self._session = session
        self._driver = driver
        self._lane = lane

    def __len__(self) -> int:
        return len(self._lane.names)

    @property
    def names(self) -> tuple[str, ...]:
        """The names they were opened by."""
        return self._lane.names

    @property
    def next_seqs(self) -> U64:
        """The seq of the next frame of each stream, uint64 [N]."""
        return self._session.next_seqs(self._lane)

    async def step(self, x: npt.ArrayLike, rows: npt.ArrayLike | None = None) -> F32:
        """Send one frame for each stream, or T: [N, features] or [T, N, features]; outputs in the same form.

        With `rows`, distinct indices, only those streams take a step, and N is their number.

        Raises:
            FramesRefused: when some were not applied; its `outputs` hold the others'.
            StreamEvicted: when one of the streams has ended; nothing is sent then. Leave it out with `rows`.
            InvalidInput: for another shape, bad rows, or values that float32 cannot hold.
        """
        return (await self.step_timed(x, rows)).outputs

    async def step_timed(self, x: npt.ArrayLike, rows: npt.ArrayLike | None = None) -> Answer:
        """Like `step`, with the server's times beside the outputs."""
        return await self._driver.wait(self._session.step(self._lane, x, rows))

    async def close(self) -> F32:
        """Close all; their final states, float32 [N, state_layers, state_size], NaN for those that had ended.

        Raises:
            StreamRefused: when the server refuses one that is open.
        """
        info = self._session.info
        finals = await self._driver.wait(self._session.close(self._lane))
        return finals.reshape(len(self), info.state_layers, info.state_size)
