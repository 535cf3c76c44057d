"""The step worker: one thread that runs the device's work in order, and never dies in silence."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Job:
    """A call to make in the worker, and what to do with its result on the caller's side."""

    call: Callable[[], Any]
    done: Callable[[Any, Exception | None], None]
    """Called with the result, or with None and what the call raised."""


class Worker:
    """Runs jobs one after another in a thread of its own.

    Args:
        hand_back: takes a function to run on the caller's thread (`loop.call_soon_threadsafe`).
        on_death: called on the caller's thread when the worker stops although nobody asked it to.
    """

    def __init__(
        self,
        hand_back: Callable[[Callable[[], None]], object],
        on_death: Callable[[BaseException], None],
    ) -> None:
        self._hand_back = hand_back
        self._on_death = on_death
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="instep-step-worker", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job; what is submitted first runs first. The caller bounds how many are under way."""
        self._jobs.put(job)

    def stop(self, timeout_s: float | None = None) -> None:
        """Run what is queued, then end the thread; after `timeout_s`, leave it to end with the process."""
        self._jobs.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                self._hand_back(_finish(job))
        except BaseException as error:
            reason = error
            self._hand_back(lambda: self._on_death(reason))


def _finish(job: Job) -> Callable[[], None]:
    try:
        result = job.call()
    except Exception as error:
        failure = error
        return lambda: job.done(None, failure)
    return lambda: job.done(result, None)
