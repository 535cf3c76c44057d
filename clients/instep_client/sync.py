"""The client for threads: the same verbs as `aio.py`, without await.

A client owns one daemon thread with an event loop in it, where an `AsyncClient` lives. Any number of threads may use
the client and its streams at once; frames that they send in the same moment travel in one message.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import threading
import weakref
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Final, TypeVar

import numpy.typing as npt

from instep_client.aio import AsyncClient, AsyncGroup, AsyncStream
from instep_client.calls import Answer
from instep_client.errors import ClientClosed, ConnectionFailed, InstepError
from instep_client.wire import DEFAULT_ENDPOINT, F32, U64, ServerInfo

R = TypeVar("R")

_log = logging.getLogger("instep_client")

_JOIN_S: Final = 5.0
"""The longest that closing waits for the thread."""


class Client:
    """A connection to one server, usable from many threads; use it as `with Client() as client`.

    A client that is dropped without `close` closes itself, at the latest when the interpreter exits. After a fork it
    works in the process that made it only.
    """

    def __init__(self, endpoint: str = DEFAULT_ENDPOINT, name: str = "", timeout_s: float = 10.0) -> None:
        """Nothing is sent before `connect` or `with`.

        Args:
            endpoint: where the server listens, as ZeroMQ writes it.
            name: told to the server in the greeting, which checks it and shows it nowhere; may be empty.
            timeout_s: how long a silent server is waited for, in seconds.

        Raises:
            InvalidInput: for a bad name or timeout.
        """
        self._client = AsyncClient(endpoint, name, timeout_s)
        self._thread = _LoopThread(self._client)
        self._finalizer = weakref.finalize(self, self._thread.stop)

    def __enter__(self) -> Client:
        self.connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def connect(self) -> None:
        """Connect and greet the server, once; `with` does it.

        Raises:
            ConnectionFailed: when nobody answers within `timeout_s`, or this process has no room for an event loop.
            Refused: when the server does not take this client.
        """
        self._thread.start()
        try:
            self._thread.run(self._client.connect())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the open streams and the connection; what waits fails with ClientClosed. May be called twice."""
        self._finalizer()

    @property
    def info(self) -> ServerInfo:
        """What the server said of itself.

        Raises:
            ClientClosed: before the client was connected.
        """
        return self._client.info

    def open(self, name: str, initial_state: npt.ArrayLike | None = None) -> Stream:
        """Open one stream; see `AsyncClient.open`."""
        return Stream(self, self._thread, self._thread.run(self._client.open(name, initial_state)))

    def open_group(self, names: Sequence[str], initial_states: npt.ArrayLike | None = None) -> Group:
        """Open many streams to be stepped by one array; see `AsyncClient.open_group`."""
        return Group(self, self._thread, self._thread.run(self._client.open_group(names, initial_states)))

    def ping(self) -> float:
        """The seconds that a message takes to the server and back."""
        return self._thread.run(self._client.ping())

    def stats(self) -> dict[str, float]:
        """The server's numbers by name."""
        return self._thread.run(self._client.stats())


class Stream:
    """One stream; see `AsyncStream`. It keeps its client alive."""

    def __init__(self, client: Client, thread: _LoopThread, stream: AsyncStream) -> None:
        """Made by `Client.open`."""
        self._client = client
        self._thread = thread
        self._stream = stream

    @property
    def name(self) -> str:
        """The name it was opened by."""
        return self._stream.name

    @property
    def next_seq(self) -> int:
        """The seq of the next frame that is sent; with nothing on its way, the number of frames applied."""
        return self._stream.next_seq

    def step(self, x: npt.ArrayLike) -> F32:
        """Send a frame or chunk and wait for its outputs; see `AsyncStream.step`."""
        return self._thread.run(self._stream.step(x))

    def step_timed(self, x: npt.ArrayLike) -> Answer:
        """Like `step`, with the server's times beside the outputs."""
        return self._thread.run(self._stream.step_timed(x))

    def send(self, x: npt.ArrayLike) -> None:
        """Send without waiting for the outputs, which iterating over the stream gives; see `AsyncStream.send`."""
        self._thread.run(self._stream.send(x))

    def finish(self) -> None:
        """Nothing more will be sent with `send`: iterating ends after the last output."""
        self._thread.run(_finish(self._stream))

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> F32:
        """The outputs of the next `send`; see `AsyncStream.__anext__`."""
        outputs = self._thread.run(self._stream.next_outputs())
        if outputs is None:
            raise StopIteration
        return outputs

    def close(self) -> F32:
        """Close it; its final state; see `AsyncStream.close`."""
        return self._thread.run(self._stream.close())


class Group:
    """Many streams stepped by one array; see `AsyncGroup`. It keeps its client alive."""

    def __init__(self, client: Client, thread: _LoopThread, group: AsyncGroup) -> None:
        """Made by `Client.open_group`."""
        self._client = client
        self._thread = thread
        self._group = group

    def __len__(self) -> int:
        return len(self._group)

    @property
    def names(self) -> tuple[str, ...]:
        """The names they were opened by."""
        return self._group.names

    @property
    def next_seqs(self) -> U64:
        """The seq of the next frame of each stream, uint64 [N]."""
        return self._group.next_seqs

    def step(self, x: npt.ArrayLike, rows: npt.ArrayLike | None = None) -> F32:
        """Send one frame for each stream, or T, and wait for the outputs; see `AsyncGroup.step`."""
        return self._thread.run(self._group.step(x, rows))

    def step_timed(self, x: npt.ArrayLike, rows: npt.ArrayLike | None = None) -> Answer:
        """Like `step`, with the server's times beside the outputs."""
        return self._thread.run(self._group.step_timed(x, rows))

    def close(self) -> F32:
        """Close all; their final states; see `AsyncGroup.close`."""
        return self._thread.run(self._group.close())


class _LoopThread:
    """An event loop in a daemon thread, which closes the client at its end.

    It knows nothing of the `Client`, so that a client that nobody holds can be finalized while the thread runs.

    However the thread ends, nobody is left waiting: what waits then fails, and so does every later call.
    """

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._main, name="instep-client", daemon=True)
        self._is_up = threading.Event()
        self._stopping = False
        self._failure: BaseException | None = None
        self._waiting: set[concurrent.futures.Future[Any]] = set()

    def start(self) -> None:
        """Start the thread; once.

        Raises:
            ConnectionFailed: when it cannot make its event loop.
        """
        with self._lock:
            if self._stopping or self._thread.ident is not None:
                raise ClientClosed("this client was connected before; make a new one to connect again")
            self._thread.start()
        self._is_up.wait()
        if self._stop is None:
            raise ConnectionFailed(
                f"the client's thread could not make its event loop ({self._failure}); free what this process holds, "
                "or raise its limits, and make a new client"
            ) from self._failure

    def run(self, work: Coroutine[Any, Any, R]) -> R:
        """Run a coroutine in the loop and wait for it; when the wait is interrupted, the coroutine is cancelled."""
        if os.getpid() != self._process:
            work.close()
            raise ClientClosed("this client belongs to the process that was forked; make a new one in this process")
        with self._lock:
            if self._stopping or self._loop is None:
                work.close()
                raise self._ended("the client was closed or is not connected")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
            self._waiting.add(future)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise self._ended("the client was closed") from None
        except BaseException:
            future.cancel()
            raise
        finally:
            self._waiting.discard(future)

    def stop(self) -> None:
        """Close the client and end the thread, if this is the process that has it."""
        if os.getpid() != self._process:
            return
        with self._lock:
            was_stopping, self._stopping = self._stopping, True
            if was_stopping or self._loop is None or self._stop is None:
                return
            self._loop.call_soon_threadsafe(self._stop.set)
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_S)

    def _main(self) -> None:
        # The inner one keeps the failure before the runner cancels what waits, so that it can be told why.
        with (
            self._failure_kept(),
            asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner,
            self._failure_kept(),
        ):
            runner.run(self._serve())
        for future in list(self._waiting):  # a loop that failed may not even have cancelled them
            with suppress(concurrent.futures.InvalidStateError):
                future.set_exception(self._ended("the client was closed"))
        self._is_up.set()

    @contextmanager
    def _failure_kept(self) -> Iterator[None]:
        """Keep what goes wrong for those who call, and take no more of their work."""
        try:
            yield
        except BaseException as error:  # an exit or interrupt raised in this thread ends nothing but the thread
            self._failure = self._failure or error
            if self._stop is not None:  # else the starter is told
                _log.exception("the client's thread failed")
        finally:
            with self._lock:
                self._loop = None

    def _ended(self, closed: str) -> InstepError:
        """Why nothing can be run: the thread's failure, or else that it was closed."""
        if self._failure is None:
            return ClientClosed(closed)
        return ConnectionFailed(
            f"the client's thread failed and gave the connection up ({self._failure!r}); make a new client"
        )

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._is_up.set()
        with suppress(asyncio.CancelledError):  # the loop failed, and what can still be closed is
            await self._stop.wait()
        await self._client.close()


async def _finish(stream: AsyncStream) -> None:
    stream.finish()
