"""`instep verify --follow`: a recording is checked while it is written, from outside, in the foreground."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any, Final

from rich.console import Console
from rich.live import Live
from rich.text import Text

from instep.interrupts import drop_unread, first_signal_calls
from instep.models.numerics import one_thread
from instep.recording.errors import RecordingError, with_advice
from instep.verify.following import Follower, model_of
from instep.verify.left_out import in_words, share_compared
from instep.verify.portion import FOLLOW_LIMITS, FollowLimits
from instep.verify.report import CannotVerify, Verdict
from instep.verify.throttle import PATIENCE, Patience, Status, follow
from instep_tools.terminal import say
from instep_tools.words import counted, wrapped

_MOST_REASONS: Final = 2
"""In a line."""
_LIVE_EVERY_S: Final = 0.25
_LINE_EVERY_S: Final = 5.0
_JSON_EVERY_S: Final = 1.0


class Following:
    """Follows a recording, tells of it now and then, and sums it up.

    Args:
        file: the recording.
        model_folder: the model; None for where the recording says.
        streams: names or numbers of the streams to follow; none for all.
        patience: how long it waits between looks.
        limits: of the memory for frames and mismatches.
    """

    def __init__(
        self,
        file: Path,
        model_folder: Path | None,
        streams: Sequence[str],
        patience: Patience = PATIENCE,
        limits: FollowLimits = FOLLOW_LIMITS,
    ) -> None:
        self._file = file
        self._patience = patience
        self._follower = Follower(file, model_of(file, model_folder), wanted=streams, limits=limits)
        self._error = ""
        """Why it ended before its time, although mismatches were found."""

    def in_words(self, for_s: float, console: Console) -> Verdict:
        """Follow until a signal, or for some seconds: a live line on a terminal, or some lines, and the end."""
        with _until_told_to_end() as stopped:
            self._in_words(stopped, for_s, console)
        return self._verdict

    def _in_words(self, stopped: Event, for_s: float, console: Console) -> None:
        with Live(console=console, transient=True, auto_refresh=False) as live:

            def show(status: Status) -> None:
                for wrong in status.mismatches:
                    where = f"mismatch in stream {wrong.number} ({wrong.stream}): {wrong.sentence}"
                    say(console, where, "red")
                if console.is_terminal:
                    lines = "\n".join(map(wrapped, _line(status).split("\n")))
                    live.update(Text(lines, "red" if status.mismatches_total else ""), refresh=True)
                else:
                    say(console, _line(status))

            self._follow(stopped, show, _LIVE_EVERY_S if console.is_terminal else _LINE_EVERY_S, for_s)
        for note in self._follower.notes:
            say(console, f"bits were not required to be equal: {note}", "yellow")
        if reasons := in_words(self._follower.skipped_by, self._follower.waiting):
            say(console, f"not compared: {reasons}", "yellow")
        style = "bold green" if self._verdict in ("exact", "within tolerance") else "bold red"
        say(console, self._summary(), style)

    def in_json(self, for_s: float, write: Callable[[dict[str, Any]], None]) -> Verdict:
        """Likewise, as an object a second and one at the end."""
        with _until_told_to_end() as stopped:
            self._in_json(stopped, for_s, write)
        return self._verdict

    def _in_json(self, stopped: Event, for_s: float, write: Callable[[dict[str, Any]], None]) -> None:
        newest: dict[str, Any] = {}

        def tell(status: Status) -> None:
            newest.update(status.as_json())
            write({**newest, "final": False})

        self._follow(stopped, tell, _JSON_EVERY_S, for_s)
        verified = self._verdict in ("exact", "within tolerance")
        about = {"file": str(self._file), "verified": verified, "verdict": self._verdict, "summary": self._summary()}
        everything = [wrong.as_json() for wrong in self._follower.mismatches.kept]
        write({**about, **newest, "mismatches": everything, "final": True})

    def _follow(self, stopped: Event, on_status: Callable[[Status], None], every_s: float, for_s: float) -> None:
        try:
            with one_thread():
                follow(self._follower, on_status, stopped, every_s=every_s, for_s=for_s, patience=self._patience)
        except (RecordingError, CannotVerify) as error:
            if not self._follower.mismatches.total:
                raise
            self._error = with_advice(error)  # what was found before counts for more

    @property
    def _verdict(self) -> Verdict:
        """About all frames that were compared."""
        follower = self._follower
        if follower.mismatches.total:
            return "mismatch"
        if not follower.frames:
            return "not checked"
        return "within tolerance" if follower.differs else "exact"

    def _summary(self) -> str:
        follower, verdict = self._follower, self._verdict
        checked = f"{counted(follower.streams_total, 'stream')}, {counted(follower.frames, 'frame')}"
        mismatches = counted(follower.mismatches.total, "mismatch", "mismatches")
        count = follower.skipped + follower.waiting
        left_out = f"; {counted(count, 'frame')} not compared" if count else ""
        if verdict in ("mismatch", "not checked"):
            unread = f"; what follows is not checked: {self._error}" if self._error else ""
            return f"not verified: {checked}, {mismatches}{left_out}{unread}"
        return f"verified: {checked}, {verdict}, {mismatches}{left_out}"


def _line(status: Status) -> str:
    """The state of things; more than a line where the file cannot be read or frames are not compared."""
    share = "" if status.share == 1 else f" (1 of {1 / status.share:,.0f})"
    mismatches = counted(status.mismatches_total, "mismatch", "mismatches")
    compared = f"{counted(status.streams, 'stream')}{share}, {counted(status.frames, 'frame')}"
    line = f"{compared}, {mismatches}, {status.lag_s:.1f} s behind"
    if status.unreadable:
        return f"{line}\n  {status.unreadable}"
    if not status.skipped and not status.waiting:
        return line
    percent = math.floor(100 * share_compared(status.frames, status.skipped))
    left_out = in_words(status.skipped_by, status.waiting, _MOST_REASONS)
    return f"{line}\n  {percent}% compared; {left_out}"


@contextmanager
def _until_told_to_end() -> Iterator[Event]:
    """An event that is set by the first signal that ends the command while the block runs; a second one raises.

    The block also ends once nobody can read what it writes, because the terminal has closed.
    """
    stopped = Event()
    try:
        # In a thread: `stopped.wait`, which the signal may interrupt, can hold the lock that `set` needs.
        with first_signal_calls(lambda raised: Thread(target=stopped.set).start()):
            yield stopped
    except OSError:
        if not drop_unread():
            raise
