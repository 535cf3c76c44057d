"""Running the parts of a load test: one in this process, several each in one of its own."""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import RawValue
from typing import Any, Final

import numpy as np

from instep_client.aio import AsyncClient
from instep_client.protocol.errors import InstepError
from instep_tools.connect import PATIENCE_S, Target
from instep_tools.load.generator import LEAD_S, Connect, Load, PartResult
from instep_tools.load.plan import LoadPart
from instep_tools.pacing import Clock, Stop, WallClock, loop_factory
from instep_tools.problems import CommandProblem

READY: Final = "ready"
END: Final = "end"
_ENDINGS: Final = (signal.SIGINT, signal.SIGTERM)


def connector(target: Target) -> Connect:
    """How a load connects to a server."""
    return lambda: AsyncClient(target.endpoint, "instep-client loadtest", PATIENCE_S, model=target.model)


async def run_parts(
    parts: Sequence[LoadPart],
    target: Target,
    stop: Stop,
    clock: Clock | None = None,
    answered: Sequence[ctypes.c_uint64] | None = None,
) -> PartResult:
    """Run all parts at once and merge what they measured.

    One part stays in this process, with `clock` where it is given; several get a process each. `answered`, from
    `counters`, counts the frames of each part that are answered while it runs.

    Raises:
        InstepError: as the client does.
        CommandProblem: when a process failed.
    """
    answered = counters(len(parts)) if answered is None else answered
    if len(parts) > 1:
        return merge(await _run_processes(parts, target, stop, answered))
    with WallClock() as wall_clock:
        chosen = clock or wall_clock

        async def ready() -> float:
            return chosen.now() + LEAD_S

        return await Load(parts[0], connector(target), chosen, stop, answered[0]).run(ready)


def counters(number: int) -> list[ctypes.c_uint64]:
    """Numbers that other processes may change."""
    return [RawValue(ctypes.c_uint64) for _ in range(number)]


def merge(results: Sequence[PartResult]) -> PartResult:
    """The results of several parts as one."""
    merged = PartResult(np.concatenate([result.samples for result in results]))
    for result in results:
        merged.refused.update(result.refused)
        merged.unanswered += result.unanswered
        merged.unsent += result.unsent
        merged.gaps += result.gaps
        merged.gone += result.gone
        merged.stopped |= result.stopped
        merged.gave_up |= result.gave_up
        merged.lost = merged.lost or result.lost
    return merged


async def _run_processes(
    parts: Sequence[LoadPart], target: Target, stop: Stop, answered: Sequence[ctypes.c_uint64]
) -> list[PartResult]:
    """Each process: sends READY, gets the moment of the start, sends its result, gets END (earlier on a stop)."""
    context = multiprocessing.get_context("spawn")
    loop = asyncio.get_running_loop()
    pipes: list[Connection[Any, Any]] = []
    workers = []
    with ThreadPoolExecutor(len(parts)) as threads:

        async def receive(pipe: Connection[Any, Any]) -> Any:
            try:
                message = await loop.run_in_executor(threads, pipe.recv)
            except (EOFError, ConnectionError):  # the latter when it had not read all that it was told
                raise CommandProblem("a process of the load test was killed") from None
            if isinstance(message, Exception):
                raise message
            if isinstance(message, PartResult) and message.gave_up:
                _tell(pipes, END)  # what one part has found is true of all
            return message

        async def receive_all() -> list[Any]:
            """One message of each; when one fails, all are told to end, and waited for."""
            receiving = [asyncio.create_task(receive(pipe)) for pipe in pipes]
            _, pending = await asyncio.wait(receiving, return_when=asyncio.FIRST_EXCEPTION)
            if pending:
                _tell(pipes, END)
                await asyncio.wait(pending)
            return await asyncio.gather(*receiving)  # takes note of every failure, and raises the first

        try:
            for part, counter in zip(parts, answered, strict=True):
                pipe, theirs = context.Pipe()
                worker = context.Process(target=work, args=(part, target, theirs, counter), daemon=True)
                pipes.append(pipe)
                with _held_back():
                    worker.start()
                    workers.append(worker)
                theirs.close()
            await receive_all()
            _tell(pipes, time.monotonic() + LEAD_S)
            ending = asyncio.create_task(_end_on_stop(pipes, stop))
            try:
                return await receive_all()
            finally:
                ending.cancel()
        except (asyncio.CancelledError, KeyboardInterrupt):  # nobody waits for the last answers
            for worker in workers:
                worker.kill()
            raise
        finally:
            _tell(pipes, END)
            for worker in workers:
                await loop.run_in_executor(threads, worker.join)
            for pipe in pipes:
                pipe.close()


@contextmanager
def _held_back() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back: here for the block, in a process that begins in it until `work` ignores them."""
    resource_tracker.ensure_running()  # starting it in the block would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDINGS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


async def _end_on_stop(pipes: Sequence[Connection[Any, Any]], stop: Stop) -> None:
    await stop.wait()
    _tell(pipes, END)


def _tell(pipes: Sequence[Connection[Any, Any]], message: float | str) -> None:
    for pipe in pipes:
        with suppress(OSError):  # it has ended already
            pipe.send(message)


def work(part: LoadPart, target: Target, pipe: Connection[Any, Any], answered: ctypes.c_uint64) -> None:
    """Run one process of the load test; a Ctrl-C or SIGTERM reaches it as its parent's END."""
    for number in _ENDINGS:  # which may be sent to the whole process group
        signal.signal(number, signal.SIG_IGN)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_work(part, target, pipe, answered))


async def _work(part: LoadPart, target: Target, pipe: Connection[Any, Any], answered: ctypes.c_uint64) -> None:
    loop = asyncio.get_running_loop()
    stop = Stop()
    start: asyncio.Future[float] = loop.create_future()

    def on_message(message: float | str) -> None:
        if message == END:
            stop.request()
        if not start.done():
            start.set_result(time.monotonic() if isinstance(message, str) else message)

    def listen() -> None:
        message: float | str = READY
        while message != END:
            try:
                message = pipe.recv()
            except (EOFError, OSError):  # the parent is gone
                message = END
            loop.call_soon_threadsafe(on_message, message)

    async def ready() -> float:
        pipe.send(READY)
        return await start

    listening = loop.run_in_executor(None, listen)
    try:
        with WallClock() as clock:
            load = Load(part, connector(target), clock, stop, answered)
            result: PartResult | CommandProblem = await load.run(ready)
    except InstepError as error:
        result = CommandProblem(str(error))
    except Exception as error:  # the parent waits for a message, whatever happens here
        result = CommandProblem(f"a process of the load test failed: {type(error).__name__}: {error}")
    with suppress(OSError):
        pipe.send(result)
    await listening
