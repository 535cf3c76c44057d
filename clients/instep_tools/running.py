"""How a command runs in an event loop of its own, and how Ctrl-C and SIGTERM end it in order."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Final

from instep_client.protocol.errors import InstepError
from instep_tools import SAME_SIGNAL_S, EndingSignals
from instep_tools.pacing import Stop, loop_factory
from instep_tools.problems import CommandProblem, Exit
from instep_tools.terminal import Terminal


class StoppedBeforeSending(KeyboardInterrupt):
    """A signal before there was a connection: nothing is lost, and nothing needs to be said.

    Args:
        status: the exit status that it leads to.
    """

    def __init__(self, status: Exit) -> None:
        super().__init__(status)
        self.status = status


Command = Callable[[Terminal, Stop], Awaitable[Exit]]
_ENDINGS: Final = {signal.SIGINT: Exit.INTERRUPTED, signal.SIGTERM: Exit.TERMINATED}


def run_command(command: Command, terminal: Terminal, same_signal_s: float = SAME_SIGNAL_S) -> Exit:
    """Run a command in an event loop of its own and turn what ends it into one sentence and an exit status.

    The first Ctrl-C or SIGTERM requests a stop: the command drains and closes. The second one ends it at once, unless
    it comes within `same_signal_s`: then it is the first one, passed on once more. The first one ends it at once as
    long as nothing was sent because there is no connection. The status of such a command is INTERRUPTED or TERMINATED,
    also when it ends with an error, which is said.

    Raises:
        BrokenPipeError: at the end, where nobody read what was written to stdout.
    """
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            status = runner.run(_with_stop(command, terminal, same_signal_s))
        terminal.check_read()
        return status
    except (CommandProblem, InstepError) as error:
        terminal.fail(str(error))
        return Exit.COULD_NOT_RUN
    except StoppedBeforeSending as stopped:
        return stopped.status
    except KeyboardInterrupt:
        terminal.note("stopped at once; what was sent may not have been answered")
        return Exit.INTERRUPTED


def run_undrained(command: Command, terminal: Terminal) -> Exit:
    """`run_command` for a command that has nothing to drain: the first signal cancels it, whatever it waits for."""

    async def until_stopped(terminal: Terminal, stop: Stop) -> Exit:
        stop.drains = False
        task = asyncio.current_task()
        assert task is not None
        canceller = asyncio.create_task(_cancel_at(stop, task))
        try:
            return await command(terminal, stop)
        except asyncio.CancelledError:
            if not stop.requested:
                raise
            task.uncancel()
            return Exit.INTERRUPTED
        finally:
            canceller.cancel()

    return run_command(until_stopped, terminal)


async def _cancel_at(stop: Stop, task: asyncio.Task[Exit]) -> None:
    await stop.wait()
    task.cancel()


async def _with_stop(command: Command, terminal: Terminal, same_signal_s: float) -> Exit:
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        return await command(terminal, stop)
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    before = {number: signal.getsignal(number) for number in _ENDINGS}
    ending: Exit | None = None
    signals = EndingSignals(same_signal_s)

    def end() -> None:
        if stop.connected:
            stop.request()
        else:
            task.cancel()

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal ending
        if not signals.take(time.monotonic()):
            return
        is_interrupt = number == signal.SIGINT
        ending = _ENDINGS[signal.Signals(number)]
        if not stop.connected:
            loop.call_soon_threadsafe(end)
            if signals.count > 1 or asyncio.current_task(loop) is not None:
                raise StoppedBeforeSending(ending)
            return  # a callback of the loop may print what is raised in it, and go on
        if signals.count > 1:
            if is_interrupt:
                raise KeyboardInterrupt
            signal.signal(number, before[signal.SIGTERM])
            signal.raise_signal(number)
            return
        if stop.drains:
            name = "Ctrl-C" if is_interrupt else "SIGTERM"
            terminal.note(f"stopping: waiting for the answers ({name} again ends at once)")
        loop.call_soon_threadsafe(stop.request)

    for number in before:
        signal.signal(number, on_signal)
    try:
        exit_status = await command(terminal, stop)
    except asyncio.CancelledError:
        if ending is None:
            raise
        task.uncancel()
        return ending
    except (CommandProblem, InstepError) as error:
        if ending is None:
            raise
        terminal.fail(str(error))
        return ending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return exit_status if ending is None else ending
