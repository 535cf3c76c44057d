"""The thread in which a `sync.Client` runs its event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any, Concatenate, Final, Generic, ParamSpec, TypeVar

from instep_client.aio import AsyncClient
from instep_client.protocol.errors import ClientClosed, ConnectionFailed, InstepError

A = TypeVar("A")
P = ParamSpec("P")
R = TypeVar("R")

_log = logging.getLogger("instep_client")

_JOIN_S: Final = 5.0
"""The longest that closing waits for the thread."""


class LoopThread:
    """An event loop in a daemon thread, which closes the client at its end.

    It knows nothing of the `Client`, so that a client that nobody holds can be finalized while the thread runs.

    However the thread ends, waiting and later calls fail.
    """

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._parks = False
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
        future: concurrent.futures.Future[R] = concurrent.futures.Future()
        try:  # from here on, since an interrupt may come as soon as the loop knows of the work
            with self._lock:
                if self._stopping or self._loop is None:
                    work.close()
                    raise self._ended(
                        "the client was closed"
                        if self._stopping
                        else "the client is not connected: use `with Client(…) as client:`, or call client.connect()"
                    )
                self._waiting.add(future)
                self._loop.call_soon_threadsafe(_begin, self._loop, work, future)
            return future.result()
        except concurrent.futures.CancelledError:
            raise self._ended("the client was closed") from None
        except ClientClosed as error:  # by the failure, if the work began only after it
            if self._failure is None:
                raise
            raise self._ended("") from error
        except KeyboardInterrupt as interrupt:
            raise interrupt.with_traceback(None)  # noqa: B904 (without the frames of waiting, which tell nobody anything)
        finally:
            future.cancel()  # when the wait was interrupted; else it has ended
            self._waiting.discard(future)

    def stop(self, park: bool = False) -> None:
        """Close the client and end the thread, if this is the process that has it; only the first call does anything.

        Args:
            park: leave its streams to be parked.
        """
        if os.getpid() != self._process:
            return
        with self._lock:
            if self._stopping:
                return
            self._stopping, self._parks = True, park
            if self._loop is None or self._stop is None:
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
        """Keep an exception for the callers, and refuse further work."""
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
        await self._client.close(self._parks)


class InThread(Generic[A]):
    """An asynchronous object in the loop of a thread, for the use of other threads."""

    def __init__(self, thread: LoopThread, inner: A) -> None:
        self._thread = thread
        self._inner = inner


def blocking(verb: Callable[Concatenate[A, P], Coroutine[Any, Any, R]]) -> Callable[Concatenate[InThread[A], P], R]:
    """The same verb for other threads, with its signature and documentation: it returns when the work is done."""

    @wraps(verb)
    def call(self: InThread[A], /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._thread.run(verb(self._inner, *args, **kwargs))

    return call


def _begin(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, R], future: concurrent.futures.Future[R]) -> None:
    """Start work whose result a thread waits for; when the thread cancels its future, the work is cancelled.

    As `asyncio.run_coroutine_threadsafe`, which makes the future itself: a thread interrupted before it has that
    future cannot cancel anything.
    """
    if future.cancelled():
        work.close()
        return
    task = loop.create_task(work)

    def settle(task: asyncio.Task[R]) -> None:
        with suppress(concurrent.futures.InvalidStateError):  # cancelled meanwhile
            if task.cancelled():
                future.cancel()
            elif (error := task.exception()) is not None:
                future.set_exception(error)
            else:
                future.set_result(task.result())

    def withdraw(future: concurrent.futures.Future[R]) -> None:
        if future.cancelled():
            with suppress(RuntimeError):  # the loop is closed, and has cancelled its tasks
                loop.call_soon_threadsafe(task.cancel)

    task.add_done_callback(settle)
    future.add_done_callback(withdraw)
