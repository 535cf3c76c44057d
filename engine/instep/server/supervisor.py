"""The process that restarts servers when a signal has killed them: `instep serve --restart` and `--shards N`.

The supervisor loads and compiles the models, forks the servers, and waits. It has no threads and no sockets, so little
in it can fail, and the next server is a fork with everything loaded.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import structlog

from instep.interrupts import end_with_parent, how_ended

MOST_RESTARTS: Final = 5
WITHIN_S: Final = 60.0
"""The period in which the number of restarts is limited, because more would not help."""
_LONGEST_PAUSE_S: Final = 30.0
_FORWARDED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_COULD_NOT_START: Final = 2
"""The exit status of `instep serve`."""


class Deaths:
    """When a process died: with each death it starts later again, and after too many within a minute never."""

    def __init__(self) -> None:
        self._at: deque[float] = deque(maxlen=MOST_RESTARTS + 1)

    def __len__(self) -> int:
        return len(self._at)

    def add(self) -> str:
        """Note a death, and return what to add to its reason if it was one too many."""
        self._at.append(time.monotonic())
        return f", {MOST_RESTARTS} restarts within a minute have not helped" if self.are_final else ""

    @property
    def are_final(self) -> bool:
        """Whether there were too many."""
        return len(self._recent()) > MOST_RESTARTS

    @property
    def are_over(self) -> bool:
        """Whether it may start now: the pauses grow."""
        recent = self._recent()
        return len(recent) < 2 or (not self.are_final and time.monotonic() > recent[-1] + len(recent) / 2)

    def _recent(self) -> list[float]:
        return [at for at in self._at if at > self._at[-1] - WITHIN_S]


@dataclass(slots=True, eq=False)
class Child:
    """A process that is forked, and forked again whenever a signal has killed it or it could not start again."""

    number: int
    name: str
    """The name for the log, such as `the server`."""
    log: structlog.stdlib.BoundLogger
    is_helper: bool = False
    """Whether it is ended once all others have ended, and gets no signals before."""
    pid: int = 0
    status: int | None = None
    """The exit status, or 128 + N if signal N killed it; None while it is to run."""
    pause_s: float = 0.0
    """The time for which the next process waits before it starts."""
    deaths: Deaths = field(default_factory=Deaths)


def supervise(children: Sequence[Child], given_up: Callable[[int], None]) -> Child:
    """Fork all children, and fork again those that are killed by a signal.

    SIGINT, SIGTERM and SIGHUP are passed on to the children, each of which has its own process group, so that a
    terminal's Ctrl-C reaches it once. If the supervisor dies, the children get SIGTERM. A first child that cannot start
    ends all.

    Args:
        children: the processes.
        given_up: called with the number of a server that has ended and will not be started again.

    Returns:
        In a child: itself.

    Raises:
        SystemExit: in the supervisor when all have ended. The status is 0 if all ended with 0, 2 if one could not
            start, and otherwise the lowest of theirs, because those above 128 may be of signals that ended the rest.
    """
    heard = {number for number in _FORWARDED if signal.getsignal(number) is not signal.SIG_IGN}  # as nohup has SIGHUP
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*heard, signal.SIGCHLD})
    supervisor, is_ending = os.getpid(), False
    servers = [child for child in children if not child.is_helper]
    while any(server.status is None for server in servers):
        for child in children:
            if child.status is None and not child.pid:
                child.pid = os.fork()
                if not child.pid:
                    become_child(supervisor, child.name)
                    signal.pthread_sigmask(signal.SIG_SETMASK, before)
                    time.sleep(child.pause_s)
                    return child
        number = signal.sigwait({*heard, signal.SIGCHLD})
        ended = [(child, code) for pid, code in ended_processes() for child in children if child.pid == pid]
        if any(code == _COULD_NOT_START and not child.deaths for child, code in ended) and not is_ending:
            number = signal.SIGTERM
        is_ending |= number in (signal.SIGINT, signal.SIGTERM)
        for child, code in ended:
            _bury(child, code, is_ending, heard, is_only=len(children) == 1)
            if child.status is not None and not child.is_helper:
                given_up(child.number)
        for server in servers:
            if server.pid and number != signal.SIGCHLD:
                os.kill(server.pid, number)  # it is there until it is waited for
    for child in children:
        if child.pid:  # a helper
            os.kill(child.pid, signal.SIGTERM)
            os.waitpid(child.pid, 0)
    statuses = {child.status or 0 for child in children} - {0}
    raise SystemExit(_COULD_NOT_START if _COULD_NOT_START in statuses else min(statuses, default=0))


def become_child(parent: int, name: str, by: signal.Signals = signal.SIGTERM) -> None:
    """Give a process that was just forked a name and a process group, and let a signal end it when its parent dies."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # the log may go to a terminal that this group does not own
    end_with_parent(parent, by, f"instep {name.removeprefix('the ')}")


def ended_processes() -> Iterator[tuple[int, int]]:
    """The processes that have ended, with their exit statuses, or -N if signal N killed them.

    As the first process of a container, the supervisor also gets the processes that a dead server leaves behind.
    """
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            yield ended[0], os.waitstatus_to_exitcode(ended[1])


def _bury(child: Child, code: int, is_ending: bool, heard: set[signal.Signals], *, is_only: bool) -> None:
    """Decide whether a child that has ended is started again: if so, it has neither a status nor a process."""
    child.pid, child.status = 0, code if code >= 0 else 128 - code
    why, is_tried_again = "", code == _COULD_NOT_START and child.deaths and not is_ending
    if (code >= 0 and not is_tried_again) or (is_ending and -code in heard):  # a second one, when it had drained
        if code and not (is_only or is_ending or child.is_helper):
            child.log.error("failed", reason=f"{child.name} ended with status {code}; the others go on")
        return
    if is_tried_again:  # the pauses bound the number of these
        child.pause_s = min(_LONGEST_PAUSE_S, 2 * child.pause_s or 1.0)
    else:
        child.pause_s = 0.0
        why = child.deaths.add()
    reason = f"{child.name} {'could not start again' if code > 0 else how_ended(code)}"
    if is_ending or why:
        child.log.error("failed", reason=reason + why)
        child.status = child.status if is_only else 1
    else:
        child.log.error("restarting", reason=reason)
        child.status = None
