"""Runs the parts of a load test: a single one in this process, several in a process each."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from ctypes import c_double
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.sharedctypes import RawValue
from multiprocessing.synchronize import Barrier, Event
from typing import Final, NamedTuple

import numpy as np

from instep_client.protocol.errors import InstepError
from instep_tools.connect import Target, leave_warnings_out
from instep_tools.load.generator import LEAD_S, Connect, Load, PartResult
from instep_tools.load.plan import LoadPart
from instep_tools.pacing import LONGEST_NAP_S, Clock, Stop, WallClock, loop_factory
from instep_tools.problems import CommandProblem

_ENDINGS: Final = (signal.SIGINT, signal.SIGTERM)


class _Shared(NamedTuple):
    begin: Barrier
    """A barrier that is passed when all processes have opened their streams."""
    start: c_double
    """The time of the first send, on the clock `time.monotonic`."""
    end: Event
    """Set when processes must stop, drain and close."""


_shared: _Shared


def connector(target: Target) -> Connect:
    """A function by which a load connects to a server."""
    return lambda: target.client("loadtest")


async def run_parts(parts: Sequence[LoadPart], target: Target, stop: Stop, clock: Clock | None = None) -> PartResult:
    """Run all parts at once and merge their measurements.

    A single part runs in this process, with `clock` if given; several parts get a process each.

    Raises:
        InstepError: as the client does.
        CommandProblem: a process failed.
    """
    if len(parts) > 1:
        return merge(await _run_processes(parts, target, stop))
    with WallClock() as wall_clock:
        chosen = clock or wall_clock

        async def ready() -> float:
            return chosen.now() + LEAD_S

        return await Load(parts[0], connector(target), chosen, stop).run(ready)


def merge(results: Sequence[PartResult]) -> PartResult:
    """Merge the results of several parts."""
    merged = PartResult(np.concatenate([result.samples for result in results]))
    for result in results:
        merged.refused.update(result.refused)
        merged.unanswered += result.unanswered
        merged.unsent += result.unsent
        merged.stopped |= result.stopped
        merged.lost = merged.lost or result.lost
    return merged


async def _run_processes(parts: Sequence[LoadPart], target: Target, stop: Stop) -> list[PartResult]:
    context, start = multiprocessing.get_context("spawn"), RawValue(c_double)
    shared = _Shared(context.Barrier(len(parts), partial(_set_start, start)), start, context.Event())
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(len(parts), context, _begin, (shared, os.getpid()))
    loop = asyncio.get_running_loop()
    with _held_back():
        running = [loop.run_in_executor(pool, work, part, target) for part in parts]
    ending = asyncio.create_task(_end_on_stop(shared.end, stop))
    try:
        return await asyncio.gather(*running)
    except BrokenProcessPool:
        raise CommandProblem("a process of the load test was killed") from None
    except (asyncio.CancelledError, KeyboardInterrupt):  # nobody waits for the last answers
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
        raise
    finally:
        ending.cancel()
        shared.end.set()
        await asyncio.to_thread(pool.shutdown)


@contextmanager
def _held_back() -> Iterator[None]:
    """Block Ctrl-C and SIGTERM: here for the block, and permanently in processes started in it.

    Both may be sent to the whole process group, but the processes must drain when `end` is set.
    """
    resource_tracker.ensure_running()  # starting it in the block would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDINGS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


async def _end_on_stop(end: Event, stop: Stop) -> None:
    await stop.wait()
    end.set()


def _set_start(start: c_double) -> None:
    start.value = time.monotonic() + LEAD_S


def _begin(shared: _Shared, parent: int) -> None:
    """Start a process of the load test, which ends with its parent."""
    global _shared
    _shared = shared
    leave_warnings_out()

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(LONGEST_NAP_S)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def work(part: LoadPart, target: Target) -> PartResult:
    """Run one process of the load test; if it fails, the others end too.

    Raises:
        CommandProblem: nobody answers, or a stream cannot be opened.
    """
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(_work(part, target))
    except Exception as error:
        _shared.begin.abort()
        if isinstance(error, InstepError):
            raise CommandProblem(str(error)) from None
        raise


async def _work(part: LoadPart, target: Target) -> PartResult:
    stop = Stop()

    async def ready() -> float:
        try:
            await asyncio.to_thread(_shared.begin.wait)
        except threading.BrokenBarrierError:
            stop.request()
            return time.monotonic()
        return _shared.start.value

    async def stop_at_end() -> None:
        while not _shared.end.is_set():  # noqa: ASYNC110  # another process sets it
            await asyncio.sleep(LONGEST_NAP_S)
        stop.request()

    stopping = asyncio.create_task(stop_at_end())
    try:
        with WallClock() as clock:
            return await Load(part, connector(target), clock, stop).run(ready)
    finally:
        stopping.cancel()
