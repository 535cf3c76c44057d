"""Messages, progress and summaries for people."""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from instep_tools.words import finite, printable, wrapped

QUIET_S: Final = 2.0
"""Work shorter than this shows no progress."""

DRAW_S: Final = 0.1
BAR_COLUMNS: Final = 20
LOG_S: Final = 5.0
"""The interval of progress lines in a file or a pipe, where a bar cannot be redrawn."""


def say(console: Console, sentence: str, style: str = "", *, first_style: str = "") -> None:
    """Print a sentence: in lines of 80 columns on a terminal, unchanged into a file or a pipe.

    Args:
        console: the destination.
        sentence: may contain line breaks.
        style: of the whole sentence.
        first_style: of its first word.
    """
    lines = printable(sentence).split("\n")
    text = Text("\n".join(map(wrapped, lines) if console.is_terminal else lines), style)
    text.stylize(first_style, 0, len(sentence.split(" ", 1)[0]))
    console.print(text, soft_wrap=True, highlight=False)


class Terminal:
    """Prints results to stdout, and everything else to stderr.

    Args:
        as_json: whether results are one JSON object.

    Attributes:
        data_on_stdout: whether stdout receives JSON or the data itself, so that the summary line goes to stderr.
    """

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self.data_on_stdout = as_json
        self.out = Console(highlight=False, soft_wrap=True)
        self.err = Console(stderr=True, highlight=False, soft_wrap=True)
        self._is_unread = False
        self._has_result = False

    def note(self, sentence: str) -> None:
        """Print a note."""
        say(self.err, sentence)

    def error(self, sentence: str) -> None:
        """Print an error."""
        say(self.err, f"error: {sentence}", first_style="bold red")

    def say(self, sentence: str) -> None:
        """Print a result as text."""
        say(self.out, sentence)

    def fail(self, sentence: str) -> None:
        """Print why the command failed; with --json also as the result, unless there is one already."""
        if self.as_json and not self._has_result:
            self.result({"error": sentence})
        self.error(sentence)

    def write(self, text: str) -> bool:
        """Write data to stdout and flush it; False if nobody reads it any more."""
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or its last flush fails again
            self._is_unread = True
            return False
        return True

    def check_read(self) -> None:
        """Raise BrokenPipeError if nobody read data written to stdout."""
        if self._is_unread:
            raise BrokenPipeError

    def summary(self, line: str, good: bool = True) -> None:
        """Print the last line, unless nobody reads the data any more, because the command then ends quietly."""
        if self._is_unread:
            return
        console = self.err if self.data_on_stdout else self.out
        say(console, line, "bold green" if good else "bold yellow")

    def result(self, values: Mapping[str, Any]) -> None:
        """Print the JSON object; NaN and infinity become null."""
        self._has_result = True
        self.write(json.dumps(finite(values), allow_nan=False) + "\n")

    def table(
        self, headings: Sequence[str], rows: Iterable[Sequence[str | Text]], numbers: slice = slice(1, None)
    ) -> None:
        """Print a table without lines; the columns `numbers` are right-aligned, and an empty head is left out."""
        shown = Table(*headings, box=None, pad_edge=False, show_header=any(headings))
        for column in shown.columns[numbers]:
            column.justify = "right"
        for row in rows:
            shown.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
        self.out.print(shown)

    @asynccontextmanager
    async def waiting(self, what: str) -> AsyncIterator[None]:
        """Print a note if the block takes longer than two seconds."""
        timer = asyncio.get_running_loop().call_later(QUIET_S, self.note, what)
        try:
            yield
        finally:
            timer.cancel()


@contextmanager
def progress(
    console: Console,
    title: str,
    total: float,
    unit: str,
    done: Callable[[], float],
    detail: Callable[[], str] | None = None,
) -> Iterator[None]:
    """Show the progress of the block's work once it takes longer than two seconds.

    Args:
        console: shows a bar on a terminal; a file or a pipe gets a line from time to time.
        title: names the work.
        total: the amount of work; infinite if unknown.
        unit: of `total`.
        done: returns the finished amount; called in another thread.
        detail: returns the text next to it; by default, and for an empty text, the elapsed time is shown.
    """
    started, ended = time.monotonic(), threading.Event()

    def said() -> str:
        return (detail and detail()) or f"{time.monotonic() - started:.0f} s"

    def show() -> None:
        is_over = ended.wait(QUIET_S)
        while not (is_over or console.is_terminal):
            of = "" if math.isinf(total) else f"/{total:,.0f}"
            line = f"{title} {done():,.0f}{of} {unit} · {said()}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            is_over = ended.wait(LOG_S)
        if is_over:
            return
        texts = TextColumn(unit), TextColumn("· {task.fields[detail]}")
        columns = (TextColumn("{task.description}"), BarColumn(BAR_COLUMNS), MofNCompleteColumn(), *texts)
        with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
            task = bar.add_task(title, total=None if math.isinf(total) else total, detail="")
            while not is_over:  # a bar ends at what was done: 100 %, if all was
                is_over = ended.wait(DRAW_S)
                bar.update(task, completed=done(), detail=said(), refresh=True)

    showing = threading.Thread(target=show, daemon=True)
    showing.start()
    try:
        yield
    finally:
        ended.set()
        showing.join()


@contextmanager
def show_progress(title: str) -> Iterator[Callable[[float], None]]:
    """Show progress on stderr; the block calls a function with the finished share (0 to 1)."""
    share = 0.0

    def tell(now: float) -> None:
        nonlocal share
        share = now

    with progress(Console(stderr=True), title, 100, "%", lambda: 100 * share):
        yield tell
