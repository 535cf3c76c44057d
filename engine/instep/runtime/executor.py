# ruff: noqa: D102 - `StepExecutor` documents what every executor has
"""Executors of steps: in a thread, or in a process (`process_executor`)."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from instep.core.typing import I64


class StateLost(Exception):
    """The states of the stepped streams can no longer be trusted."""


Step: TypeAlias = Callable[[I64, I64], None]
"""Steps the streams of slots, int64 [B], with the frames in rows, int64 [B]."""


@dataclass(slots=True)
class RunResult:
    """A run that has ended: one or more steps of the same streams."""

    began_ns: int
    ended_ns: int
    """`began_ns` and `ended_ns` are on the monotonic clock."""
    steps: int
    """The number of steps that were applied, from the first on."""
    error: Exception | None
    """The exception of the step after those; None if all were applied."""


class ExecutorDied(Exception):
    """No step can be executed any more.

    Attributes:
        killed_by: the number of the signal that killed the stepping process; None for any other end.
    """

    def __init__(self, sentence: str, killed_by: int | None = None) -> None:
        super().__init__(sentence)
        self.killed_by = killed_by


class StepExecutor(Protocol):
    """Runs steps in the order in which they began."""

    @property
    def capacity(self) -> int:
        """The number of runs that may be under way, including the one being stepped."""

    @property
    def signal_fd(self) -> int | None:
        """A file that becomes readable when a run has ended after `begin`; None if all runs end within `begin`."""

    @property
    def has_ended(self) -> bool:
        """Whether `ended` has a result, without a signal."""

    def begin(self, slots: I64, rows: I64, expected_ns: int, loop_ns: int = 0) -> None:
        """Begin a run.

        Args:
            slots: of the streams, int64 [B].
            rows: of their frames, int64 [steps, B].
            expected_ns: the approximate duration of the steps; 0 if unknown.
            loop_ns: the approximate time that the loop needs at least for the messages of these frames.
        """

    def ended(self) -> list[RunResult]:
        """The runs that have ended since the last call, in order.

        Raises:
            ExecutorDied: if the executor has died.
        """

    def take_signal(self) -> None:
        """Consume the signal after `signal_fd` became readable.

        Raises:
            ExecutorDied: if the executor has died.
        """

    def stop(self, timeout_s: float | None = None) -> None:
        """Finish the runs that have begun, then end; killed after the timeout. May be called twice."""


def run_steps(step: Step, slots: I64, rows: I64) -> RunResult:
    """Step the streams of `slots`, int64 [B], with the frames of each of `rows`, int64 [steps, B], until one fails."""
    began_ns, steps, error = time.monotonic_ns(), 0, None
    try:
        for rows_of_step in rows:
            step(slots, rows_of_step)
            steps += 1
    except Exception as raised:
        error = raised
    return RunResult(began_ns, time.monotonic_ns(), steps, error)


class ThreadExecutor:
    """Steps in a thread, for devices that compute while the interpreter does other work."""

    capacity = 2

    def __init__(self, step: Step) -> None:
        self._step = step
        self._runs: queue.SimpleQueue[tuple[I64, I64] | None] = queue.SimpleQueue()
        self._results: deque[RunResult] = deque()
        self._died: BaseException | None = None
        self.signal_fd, self._signal = os.pipe()
        os.set_blocking(self.signal_fd, False)
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="instep-steps", daemon=True)
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        return bool(self._results)

    def begin(self, slots: I64, rows: I64, expected_ns: int, loop_ns: int = 0) -> None:
        self._runs.put((slots, rows))

    def ended(self) -> list[RunResult]:
        return [self._results.popleft() for _ in range(len(self._results))]

    def take_signal(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self.signal_fd, 64)
        if self._died is not None:
            raise ExecutorDied(f"the thread that steps has died: {self._died!r}")

    def stop(self, timeout_s: float | None = None) -> None:
        if self._is_stopped:
            return
        self._is_stopped = True
        self._runs.put(None)
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            os.close(self.signal_fd)
            os.close(self._signal)

    def _run(self) -> None:
        try:
            while (run := self._runs.get()) is not None:
                self._results.append(run_steps(self._step, *run))
                os.write(self._signal, b"\0")
        except BaseException as error:
            self._died = error
            os.write(self._signal, b"\0")


def usable_cores() -> int:
    """The number of cores that this process may use, by its affinity and the CPU quota of its control groups.

    The quota is read from control groups version 2, as containers and systemd set it, and rounded down, and at least 1.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *_shares()]))


def _shares() -> list[int]:
    """Return the limits in cores of this process's control group and its ancestors."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    shares = []
    for group in [Path("/sys/fs/cgroup") / line.removeprefix("0::/") for line in lines if line.startswith("0::/")]:
        for place in (group, *group.parents):
            try:
                quota_us, period_us = (place / "cpu.max").read_text().split()
            except OSError:
                continue
            if quota_us != "max":
                shares.append(int(quota_us) // int(period_us))
    return shares
