"""The client for threads: the same methods as in `aio.py`, without await.

A client owns one daemon thread with an event loop in it, where an `AsyncClient` lives. Any number of threads may use
the client and its streams at once; frames that they send at the same moment travel together.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, Final, Generic, NoReturn, ParamSpec, TypeVar

from instep_client.aio import AsyncClient, AsyncGroup, AsyncStream, GroupView, StreamView
from instep_client.connection import Call
from instep_client.frames import TimedOutputs
from instep_client.protocol.errors import ClientClosed, ConnectionFailed
from instep_client.protocol.wire import F32, ServerInfo

A = TypeVar("A")
H = TypeVar("H", bound=AsyncStream | AsyncGroup)
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_log = logging.getLogger("instep_client")

_JOIN_S: Final = 5.0


async def _while_wanted(work: Coroutine[Any, Any, R], wanted: concurrent.futures.Future[None]) -> R:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    wanted.add_done_callback(lambda _: task.done() or loop.call_soon_threadsafe(task.cancel))
    return await work


class LoopThread:
    """An event loop in a daemon thread, which closes the client at its end.

    It has no reference to the `Client`, so an unused client can be finalized while the thread runs.
    """

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._parks = False
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        """The event loop, while it accepts work."""
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._main, name="instep-client", daemon=True)
        self._is_up = threading.Event()
        self._stopping = False
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Start the thread; call this once."""
        with self._lock:
            if self._stopping or self._thread.ident is not None:
                raise ClientClosed("this client was connected before; make a new one to connect again")
            self._thread.start()
        self._is_up.wait()

    def run(self, work: Coroutine[Any, Any, R]) -> R:
        """Run a coroutine in the loop and wait for it; an interrupted wait cancels the coroutine."""
        if os.getpid() != self._process:
            work.close()
            raise ClientClosed("this client belongs to the process that was forked; make a new one in this process")
        # Made before the work is handed over, which an interrupt may end half-way.
        wanted: concurrent.futures.Future[None] = concurrent.futures.Future()
        try:
            with self._lock:
                if self._loop is None:
                    work.close()
                    self._raise_ended()
                future = asyncio.run_coroutine_threadsafe(_while_wanted(work, wanted), self._loop)
            return future.result()
        except (concurrent.futures.CancelledError, ClientClosed) as error:
            if self._failure is None and isinstance(error, ClientClosed):
                raise
            work.close()  # where the loop ended before it began
            self._raise_ended()
        except BaseException:
            wanted.cancel()
            raise

    def stop(self, park: bool = False) -> None:
        """Close the client and end the thread, if this process has it; only the first call has an effect.

        Args:
            park: whether to leave its streams to be parked.
        """
        if os.getpid() != self._process:
            return
        with self._lock:
            if self._stopping:
                return
            self._stopping, self._parks = True, park
            if self._loop is None:
                return
            self._loop.call_soon_threadsafe(self._stop.set)
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_S)

    def _main(self) -> None:
        try:
            with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
                try:
                    runner.run(self._serve())
                except BaseException as error:  # before the runner cancels the waiting calls, so that these can name it
                    self._failure = error
                    raise
        except BaseException as error:  # whatever is raised in this thread ends nothing but the thread
            self._failure = self._failure or error
            _log.exception("the client's thread failed")
        self._is_up.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._is_up.set()
        try:
            await self._stop.wait()
        finally:  # also where the loop fails: what can still be closed is
            with self._lock:
                self._loop = None
            await asyncio.sleep(0)  # work that was given in the last moment begins, so that it fails with the client
            await self._client.close(self._parks)

    def _raise_ended(self) -> NoReturn:
        if self._failure is not None:
            raise ConnectionFailed(f"the client's thread failed ({self._failure!r}); make a new client")
        is_new = self._thread.ident is None and not self._stopping
        hint = "is not connected: use `with Client(…) as client:`, or call client.connect()"
        raise ClientClosed(f"the client {hint if is_new else 'was closed'}")


class InThread(Generic[A]):
    """An object of `aio.py` that lives in a thread's loop, for use by other threads."""

    def __init__(self, thread: LoopThread, inner: A) -> None:
        self._thread = thread
        self._inner = inner


def blocking(verb: Callable[Concatenate[A, P], Coroutine[Any, Any, R]]) -> Callable[Concatenate[InThread[A], P], R]:
    """Wrap a method of `aio.py` for use from other threads; it returns when the work is done."""

    @wraps(verb)
    def call(self: InThread[A], /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._thread.run(verb(self._inner, *args, **kwargs))

    _name_for_threads(call)
    return call


def opening(
    verb: Callable[Concatenate[A, P], Coroutine[Any, Any, H]], kind: Callable[[object, LoopThread, H], T]
) -> Callable[Concatenate[InThread[A], P], T]:
    """Wrap a method of `aio.py` that opens streams for use from other threads; `kind` is the class that it returns."""

    @wraps(verb)
    def call(self: InThread[A], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return kind(self, self._thread, self._thread.run(verb(self._inner, *args, **kwargs)))

    signature = inspect.signature(verb).replace(return_annotation=kind.__name__)
    call.__signature__ = signature  # type: ignore[attr-defined]  # what `help` shows
    _name_for_threads(call)
    return call


def _name_for_threads(method: Callable[..., object]) -> None:
    method.__module__ = __name__
    method.__qualname__ = method.__qualname__.removeprefix("Async")


def explained_by(other: Callable[..., object]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that takes a docstring from `aio.py`."""

    def explain(method: Callable[P, R]) -> Callable[P, R]:
        method.__doc__ = (other.__doc__ or "").replace("async with", "with")
        return method

    return explain


class _ThreadHandle(InThread[H], Generic[H]):
    """The base of streams and groups, which keep their client alive."""

    def __init__(self, client: object, thread: LoopThread, handle: H) -> None:
        """The methods of `Client` make these."""
        super().__init__(thread, handle)
        self._client = client


class Stream(_ThreadHandle[AsyncStream], StreamView):
    """One stream, with the methods of `AsyncStream`. It keeps its client alive.

    Ctrl-C while iterating loses no outputs: iterating again returns them. After a Ctrl-C in `step`, `next_seq` shows
    whether the frames were sent; their outputs are lost. Use `send` and iterate if that matters.
    """

    def __init__(self, client: object, thread: LoopThread, handle: AsyncStream) -> None:
        """The methods of `Client` make these."""
        super().__init__(client, thread, handle)
        self._session, self._handle = handle._session, handle._handle
        self._taken: deque[Call[TimedOutputs] | None] = deque()
        """Ended calls whose outputs iterating returns next."""

    step = blocking(AsyncStream.step)
    step_timed = blocking(AsyncStream.step_timed)
    send = blocking(AsyncStream.send)
    read_state = blocking(AsyncStream.read_state)
    reset = blocking(AsyncStream.reset)
    snapshot = blocking(AsyncStream.snapshot)
    close = blocking(AsyncStream.close)

    def finish(self) -> None:
        """Send nothing more; see `AsyncStream.finish`."""
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
        """Open a new stream with this one's state and seq; see `AsyncStream.fork`."""
        return Stream(self._client, self._thread, self._thread.run(self._inner.fork(name)))


class Group(_ThreadHandle[AsyncGroup], GroupView):
    """Streams that are stepped together by one array, with the methods of `AsyncGroup`. It keeps its client alive."""

    def __init__(self, client: object, thread: LoopThread, handle: AsyncGroup) -> None:
        """The methods of `Client` make these."""
        super().__init__(client, thread, handle)
        self._names, self._parts = handle._names, handle._parts

    step = blocking(AsyncGroup.step)
    step_timed = blocking(AsyncGroup.step_timed)
    read_state = blocking(AsyncGroup.read_state)
    reset = blocking(AsyncGroup.reset)
    close = blocking(AsyncGroup.close)

    def fork(self, names: Sequence[str]) -> Group:
        """Open a new stream for each of these; see `AsyncGroup.fork`."""
        return Group(self._client, self._thread, self._thread.run(self._inner.fork(names)))


class Client(InThread[AsyncClient]):
    """A client of one model of a server or cluster, usable from many threads; use it as `with Client() as client`.

    Methods and their arguments are those of `AsyncClient`.

    A client that is dropped without `close` closes itself, at the latest when the interpreter exits. After a fork it
    works only in the process that created it.
    """

    @explained_by(AsyncClient.__init__)
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
        settings: dict[str, Any] = {"wait": wait, "key_file": key_file, "server_key": server_key}
        client = AsyncClient(endpoint, name, timeout_s, reconnect_s, model=model, **settings)
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
        """Connect and greet the server; `with` does it. A client connects only once.

        Raises:
            ConnectionRefused: when nothing listens at the endpoint, unless the client was made with `wait`.
            ConnectionFailed: when nobody answers within `timeout_s`, without `wait` no host of that name is known, or
                this process has no room for an event loop.
            Refused: when the server does not take this client, or has no model of that name (UNKNOWN_MODEL).
        """
        self._thread.start()
        try:
            self._thread.run(self._inner.connect())
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
        """The server's description of itself; see `AsyncClient.info`.

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

    remove_streams = blocking(AsyncClient.remove_streams)

    open = opening(AsyncClient.open, Stream)
    open_group = opening(AsyncClient.open_group, Group)
    resume = opening(AsyncClient.resume, Stream)
    resume_group = opening(AsyncClient.resume_group, Group)
    restore = opening(AsyncClient.restore, Stream)


async def _finish(stream: AsyncStream) -> None:
    stream.finish()
