"""The step worker: runs the device's work in order, and never dies in silence."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from instep.core.typing import I64
from instep.models.numerics import threads_as_here
from instep.runtime.runs import Ended
from instep.runtime.step_process import StepProcess


@dataclass(slots=True)
class Job:
    """A call to make in the worker, and what to do with its result on the caller's side."""

    call: Callable[[], Any]
    done: Callable[[Any, Exception | None], None]
    """Called with the result, or with None and what the call raised."""
    step: tuple[I64, I64] | None = None
    """The slots, int64 [B], and rows, int64 [steps, B], of the run that `call` would do; the result is an `Ended`."""
    is_short: bool = False
    """Whether the caller's thread does the run itself, if nothing else is under way."""


class Worker:
    """Runs jobs one after another, in a thread of its own.

    With a process for steps, those run there, up to two at a time, and other jobs in the thread; a job of one kind
    waits until those of the other kind before it have ended. A short run is done at once by the caller's thread, if
    nothing else is under way; that is quicker under `torch.inference_mode()`.

    Args:
        hand_back: takes a function to run on the caller's thread (`loop.call_soon_threadsafe`).
        on_death: called on the caller's thread when the worker stops although nobody asked it to.
        process: where steps run, if not in the thread. Its owner calls `collect` when its `signal_fd` is readable, and
            `collect_short` soon after `submit`.
    """

    def __init__(
        self,
        hand_back: Callable[[Callable[[], None]], object],
        on_death: Callable[[BaseException], None],
        process: StepProcess | None = None,
    ) -> None:
        self._hand_back = hand_back
        self._on_death = on_death
        self.process = process
        self._line: deque[Job] = deque()
        """Jobs that wait for those of the other kind."""
        self._stepping: deque[Job] = deque()
        """Those that the process has, or that were short and have ended."""
        self._ended: list[Ended] = []
        """What became of the short one, which comes before any that the process has."""
        self._threaded = 0
        """How many the thread has."""
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._set_threads = threads_as_here()
        self._thread = threading.Thread(target=self._run, name="instep-step-worker", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job; what is submitted first runs first. The caller bounds how many are under way."""
        self._line.append(job)
        self._begin()

    def _begin(self) -> None:
        """Begin what may begin now, in order."""
        while self._line:
            job = self._line[0]
            if self.process is not None and job.step is not None:
                if self._threaded:
                    return
                if job.is_short and not self._stepping:
                    self._ended.append(job.call())
                else:
                    self.process.begin(*job.step)
                self._stepping.append(job)
            else:
                if self._stepping:
                    return
                self._threaded += 1
                self._jobs.put(job)
            self._line.popleft()

    @property
    def has_ended(self) -> bool:
        """Whether a short run waits to be told of."""
        return bool(self._ended)

    def collect(self) -> bool:
        """Take what was stepped, if anything; whether there was something. The process may have died."""
        assert self.process is not None
        has_ended = self.collect_short()
        try:
            for ended in self.process.ended():
                has_ended = True
                self._stepping.popleft().done(ended, None)
        except EOFError as error:
            self._on_death(error)
            return False
        self._begin()
        return has_ended

    def collect_short(self) -> bool:
        """Take the short run that has ended, if one has, without asking the process; whether one had."""
        if not self._ended:
            return False
        self._stepping.popleft().done(self._ended.pop(), None)
        self._begin()
        return True

    def stop(self, timeout_s: float | None = None) -> None:
        """Run what has begun, then end both; after `timeout_s` the thread is left alone and the process is killed."""
        try:
            if self._thread.ident is not None:  # it was started
                self._jobs.put(None)
                self._thread.join(timeout_s)
        finally:
            if self.process is not None:
                self.process.stop(timeout_s)

    def _run(self) -> None:
        try:
            self._set_threads()
            with torch.inference_mode():  # once, not for each job, which would be longer by it
                while (job := self._jobs.get()) is not None:
                    self._hand_back(self._finish(job))
        except BaseException as error:
            reason = error
            self._hand_back(lambda: self._on_death(reason))

    def _finish(self, job: Job) -> Callable[[], None]:
        result, error = None, None
        try:
            result = job.call()
        except Exception as failure:
            error = failure

        def finish() -> None:
            self._threaded -= 1
            self._begin()
            job.done(result, error)

        return finish
