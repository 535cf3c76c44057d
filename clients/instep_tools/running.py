"""Runs a command in its own event loop, which Ctrl-C and SIGTERM end cleanly."""

from __future__ import annotations

import asyncio
import math
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Final

from instep_client.protocol.errors import InstepError
from instep_tools.pacing import Stop, loop_factory
from instep_tools.problems import CommandProblem, Exit
from instep_tools.terminal import Terminal

Command = Callable[[Terminal, Stop], Awaitable[Exit]]
SAME_SIGNAL_S: Final = 0.5
"""A signal this soon after another one is the same signal, because programs such as `timeout`, `npm` and `uv run` pass
on a signal that the whole process group has already received.
"""
_ENDINGS: Final = {signal.SIGINT: Exit.INTERRUPTED, signal.SIGTERM: Exit.TERMINATED}


class _StoppedAtOnce(KeyboardInterrupt):
    """Raised by a signal after which a command does not wait."""

    def __init__(self, status: Exit, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence


def run_command(
    command: Command, terminal: Terminal, *, drains: bool = True, same_signal_s: float = SAME_SIGNAL_S
) -> Exit:
    """Run a command in its own event loop, and turn exceptions into a sentence and an exit status.

    The first Ctrl-C or SIGTERM requests a stop: the command drains and closes. Without `drains`, it cancels the
    command. The second signal ends it at once, and so does the first one before there is a connection, because nothing
    was sent. The status is then INTERRUPTED or TERMINATED, even if the command ends with an error, which is printed.

    Raises:
        BrokenPipeError: at the end, if nobody reads stdout.
    """
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            status = runner.run(_with_stop(command, terminal, drains, same_signal_s))
        terminal.check_read()
        return status
    except (CommandProblem, InstepError) as error:
        terminal.fail(str(error))
        return Exit.COULD_NOT_RUN
    except _StoppedAtOnce as stopped:
        if stopped.sentence:
            terminal.note(stopped.sentence)
        return stopped.status


async def _with_stop(command: Command, terminal: Terminal, drains: bool, same_signal_s: float) -> Exit:
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        return await command(terminal, stop)
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    ending: Exit | None = None
    newest_s = -math.inf

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal ending, newest_s
        now = time.monotonic()
        if now - newest_s < same_signal_s:
            return
        is_first, newest_s, ending = ending is None, now, _ENDINGS[signal.Signals(number)]
        if is_first and stop.connected:
            if drains:
                terminal.note("stopping: waiting for the answers (another signal ends at once)")
            loop.call_soon_threadsafe(stop.request if drains else task.cancel)
            return
        loop.call_soon_threadsafe(task.cancel)  # a callback of the loop may print what is raised in it, and go on
        if not is_first or asyncio.current_task(loop) is not None:
            sentence = "" if is_first else "stopped at once; what was sent may not have been answered"
            raise _StoppedAtOnce(ending, sentence)

    before = {number: signal.signal(number, on_signal) for number in _ENDINGS}
    try:
        status = await command(terminal, stop)
        return status if ending is None else ending
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
