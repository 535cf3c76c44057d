"""What a person sees: messages, progress, one summary line; and how Ctrl-C and SIGTERM end a command in order."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from types import FrameType
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from instep_client.protocol.errors import InstepError
from instep_tools import EndingSignals
from instep_tools.pacing import Stop, loop_factory
from instep_tools.problems import CommandProblem, Exit
from instep_tools.words import finite, wrapped

QUIET_S: Final = 2.0
"""Work shorter than this shows no progress."""

DRAW_S: Final = 0.1
BAR_COLUMNS: Final = 20
LOG_S: Final = 5.0
"""How often progress is written where it cannot be redrawn: in a file or a pipe."""


def say(console: Console, sentence: str, style: str = "", *, first_style: str = "") -> None:
    """Print a sentence: in lines of 80 columns on a terminal, and as it is into a file or a pipe.

    Args:
        console: where to.
        sentence: it may have lines of its own.
        style: of all of it.
        first_style: of its first word.
    """
    lines = sentence.split("\n")
    text = Text("\n".join(map(wrapped, lines) if console.is_terminal else lines), style)
    text.stylize(first_style, 0, len(sentence.split(" ", 1)[0]))
    console.print(text, soft_wrap=True, highlight=False)


class Terminal:
    """Results go to stdout, everything else to stderr.

    Args:
        as_json: results as one JSON object.

    Attributes:
        data_on_stdout: stdout carries JSON or the data itself, so the summary line goes to stderr.
    """

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self.data_on_stdout = as_json
        self.out = Console(highlight=False, soft_wrap=True)
        self.err = Console(stderr=True, highlight=False, soft_wrap=True)
        self._is_unread = False
        self._has_result = False

    def note(self, sentence: str) -> None:
        """Something worth knowing."""
        say(self.err, sentence)

    def error(self, sentence: str) -> None:
        """Something wrong."""
        say(self.err, f"error: {sentence}", first_style="bold red")

    def say(self, sentence: str) -> None:
        """A result in words."""
        say(self.out, sentence)

    def fail(self, sentence: str) -> None:
        """Why the command failed: an error, and with --json the result, too, unless there is one already."""
        if self.as_json and not self._has_result:
            self.result({"error": sentence})
        self.error(sentence)

    def write(self, text: str) -> bool:
        """Data on stdout, at once; False when nobody reads it any more."""
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or its last flush fails again
            self._is_unread = True
            return False
        return True

    def check_read(self) -> None:
        """Raise BrokenPipeError where data was written to stdout that nobody read."""
        if self._is_unread:
            raise BrokenPipeError

    def summary(self, line: str, good: bool = True) -> None:
        """The last line; not where nobody reads the data any more, because such a command ends quietly."""
        if self._is_unread:
            return
        console = self.err if self.data_on_stdout else self.out
        say(console, line, "bold green" if good else "bold yellow")

    def result(self, values: Mapping[str, Any]) -> None:
        """The one JSON object; numbers that are not finite become null, because JSON has no others."""
        self._has_result = True
        self.write(json.dumps(finite(values), allow_nan=False) + "\n")

    def table(
        self, headings: Sequence[str], rows: Iterable[Sequence[str | Text]], numbers: slice = slice(1, None)
    ) -> None:
        """Print a table without lines, the columns `numbers` aligned at the right; its head, unless that is empty."""
        shown = Table(*headings, box=None, pad_edge=False, show_header=any(headings))
        for column in shown.columns[numbers]:
            column.justify = "right"
        for row in rows:
            shown.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
        self.out.print(shown)

    @asynccontextmanager
    async def waiting(self, what: str) -> AsyncIterator[None]:
        """Say what the block waits for, once it takes longer than two seconds."""
        timer = asyncio.get_running_loop().call_later(QUIET_S, self.note, what)
        try:
            yield
        finally:
            timer.cancel()


@asynccontextmanager
async def progress(
    console: Console,
    title: str,
    total: float,
    unit: str,
    done: Callable[[], float],
    detail: Callable[[], str] | None = None,
) -> AsyncIterator[None]:
    """Show how far the work in the block is, once it takes longer than two seconds.

    Args:
        console: a bar is drawn on a terminal, and a line written now and then into a file or a pipe.
        title: what is being done.
        total: how much there is to do; infinite where it is not known.
        unit: of `total`.
        done: how much is done by now.
        detail: what to say beside it; how long it takes where there is none.
    """
    started = time.monotonic()
    said = detail or (lambda: f"{time.monotonic() - started:.0f} s")

    async def show() -> None:
        await asyncio.sleep(QUIET_S)
        while not console.is_terminal:
            of = "" if math.isinf(total) else f"/{total:,.0f}"
            line = f"{title} {done():,.0f}{of} {unit} · {said()}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            await asyncio.sleep(LOG_S)
        texts = TextColumn(unit), TextColumn("· {task.fields[detail]}")
        columns = (TextColumn("{task.description}"), BarColumn(BAR_COLUMNS), MofNCompleteColumn(), *texts)
        with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
            task = bar.add_task(title, total=None if math.isinf(total) else total, detail="")
            try:
                while True:
                    bar.update(task, completed=done(), detail=said(), refresh=True)
                    await asyncio.sleep(DRAW_S)
            finally:
                bar.update(task, completed=done(), refresh=True)  # a bar ends at what was done: 100 %, if all was

    showing = asyncio.create_task(show())
    try:
        yield
    finally:
        showing.cancel()
        await asyncio.gather(showing, return_exceptions=True)


@contextmanager
def show_progress(*titles: str) -> Iterator[Callable[[str, float], None]]:
    """As `progress`, without an event loop: show on stderr how far the block is, once it takes longer than two seconds.

    Args:
        titles: what is being done, one after another.

    Yields:
        A function that takes one of the titles and the share (0 to 1) of it that is done.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=console, transient=True)
    tasks = {title: bars.add_task(title, total=1.0) for title in titles}
    started = time.monotonic()
    due = started + QUIET_S
    with ExitStack() as drawn:

        def show(title: str, share: float) -> None:
            nonlocal due
            now = time.monotonic()
            if now < due and share < 1:
                return
            bars.update(tasks[title], completed=share)
            if now < due:
                return
            due = now + (DRAW_S if console.is_terminal else LOG_S)
            if not console.is_terminal:
                console.print(f"{title} {share:.0%} · {now - started:.0f} s")
            elif not bars.live.is_started:
                drawn.enter_context(bars)

        yield show


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


def run_command(command: Command, terminal: Terminal) -> Exit:
    """Run a command in an event loop of its own and turn what ends it into one sentence and an exit status.

    The first Ctrl-C or SIGTERM requests a stop: the command drains and closes. The second one ends it at once, unless
    it comes so soon that it is the first one, passed on once more (`EndingSignals`). The first one ends it at once as
    long as nothing was sent because there is no connection. The status of such a command is INTERRUPTED or TERMINATED,
    also when it ends with an error, which is said.

    Raises:
        BrokenPipeError: at the end, where nobody read what was written to stdout.
    """
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            status = runner.run(_with_stop(command, terminal))
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


async def _with_stop(command: Command, terminal: Terminal) -> Exit:
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        return await command(terminal, stop)
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    before = {number: signal.getsignal(number) for number in _ENDINGS}
    ending: Exit | None = None
    signals = EndingSignals()

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
            if signals.count > 1 or asyncio.current_task(loop) is not None:
                raise StoppedBeforeSending(ending)
            loop.call_soon_threadsafe(end)  # a callback of the loop may print what is raised in it, and go on
            return
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
