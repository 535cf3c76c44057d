"""What waits: for frames to be answered, for the worker, for other streams to end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from instep.core.streams import StreamTable
from instep.core.typing import F32, I64, U32
from instep.runtime.worker import Job, Worker

MOST_JOBS = 64
"""Openings, closings and the like that wait for the worker."""
MOST_WAITING = 256
"""Closings, resumes and looks that wait for answers or for ends of streams: each batch goes through all of them."""


@dataclass(frozen=True, slots=True)
class _Answering:
    """Something to do with streams as soon as nothing of theirs is pending."""

    slots: I64
    act: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Ending:
    """Something to do as soon as streams that are closing have ended."""

    slots: I64
    openings: U32
    act: Callable[[], None]


class Waits:
    """Things to do with streams, each as soon as what it waits for has come.

    Args:
        table: the streams.
        worker: does what has to do with states.
    """

    def __init__(self, table: StreamTable, worker: Worker) -> None:
        self._table = table
        self._worker = worker
        self._answering: list[_Answering] = []
        self._ending: list[_Ending] = []
        self._jobs = 0

    def until_told(self, act: Callable[[], None]) -> Callable[[], None]:
        """`act`, which somebody will call later; what it tells counts as a job until then, since it is in memory."""
        self._jobs += 1

        def told() -> None:
            self._jobs -= 1
            act()

        return told

    @property
    def is_quiet(self) -> bool:
        """Whether nothing waits, but for streams to end."""
        return not (self._answering or self._jobs)

    @property
    def has_room(self) -> bool:
        """Whether more may be asked for: False while too much waits for the worker, frames or ends."""
        return self._jobs < MOST_JOBS and len(self._answering) + len(self._ending) < MOST_WAITING

    def submit(self, call: Callable[[], F32 | None], done: Callable[[F32 | None, Exception | None], None]) -> None:
        """Call in the worker, in order; `done` gets the result, or what was raised, on the loop."""

        def finished(result: F32 | None, error: Exception | None) -> None:
            self._jobs -= 1
            done(result, error)

        self._jobs += 1
        self._worker.submit(Job(call, finished))

    def when_answered(self, slots: I64, act: Callable[[], None]) -> None:
        """Do something as soon as nothing of these streams is pending."""
        if self._table.pending[slots].any():
            self._answering.append(_Answering(slots, act))
        else:
            act()

    def answered(self) -> None:
        """Frames were answered: do what waited for that."""
        if not self._answering:
            return
        due, self._answering = self._answering, []
        for waiting in due:
            self.when_answered(waiting.slots, waiting.act)

    def when_ended(self, slots: I64, act: Callable[[], None]) -> None:
        """Do something as soon as those of these streams that are closing now have ended."""
        self._when_ended(_Ending(slots, self._table.openings(slots), act))

    def ended(self) -> None:
        """Streams have ended: do what waited for that."""
        due, self._ending = self._ending, []
        for ending in due:
            self._when_ended(ending)

    def _when_ended(self, ending: _Ending) -> None:
        table = self._table
        if (table.closing[ending.slots] & (table.openings(ending.slots) == ending.openings)).any():
            self._ending.append(ending)
        else:
            ending.act()
