"""`instep serve --restart`: a process that restarts the server when a signal has killed it.

The supervisor loads and compiles the models, forks the server, and waits. It has no threads and no sockets, so little
in it can fail, and the next server is a fork with everything loaded.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from typing import Final

import structlog

from instep.interrupts import end_with_parent, signal_name

MOST_RESTARTS: Final = 5
WITHIN_S: Final = 60.0
"""The period in which the number of restarts is limited, because more would not help."""
_FORWARDED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def supervise(log: structlog.stdlib.BoundLogger) -> bool:
    """Fork, and return in the child; fork again whenever a signal has killed the child.

    SIGINT, SIGTERM and SIGHUP are passed on to the child, which has its own process group, so that a terminal's Ctrl-C
    reaches it once. If the supervisor dies, the child gets SIGTERM.

    Returns:
        In the child: whether another child ran before it.

    Raises:
        SystemExit: in the supervisor, with the status of the last child, or 128 + N if signal N killed it.
    """
    heard = {number for number in _FORWARDED if signal.getsignal(number) is not signal.SIG_IGN}  # as nohup has SIGHUP
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*heard, signal.SIGCHLD})
    supervisor = os.getpid()
    deaths = deque[float](maxlen=MOST_RESTARTS + 1)
    while True:
        child = os.fork()
        if child == 0:
            _become_server(supervisor)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return bool(deaths)
        status, was_told_to_end = _wait(child, heard)
        if os.WIFEXITED(status):
            raise SystemExit(os.WEXITSTATUS(status))
        number = os.WTERMSIG(status)
        deaths.append(time.monotonic())
        gives_up = len(deaths) > MOST_RESTARTS and deaths[-1] - deaths[0] < WITHIN_S
        reason = f"the server was killed by {signal_name(number)}"
        if was_told_to_end and number in heard:  # a second one, when the server had drained
            raise SystemExit(128 + number)
        if was_told_to_end or gives_up:
            why = f", {MOST_RESTARTS} restarts within a minute have not helped" if gives_up else ""
            log.error("failed", reason=reason + why)
            raise SystemExit(128 + number)
        log.error("restarting", reason=reason)


def _become_server(supervisor: int) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # the log may go to a terminal that this group does not own
    end_with_parent(supervisor)


def _wait(child: int, heard: set[signal.Signals]) -> tuple[int, bool]:
    """Pass signals on until the child has ended; return its wait status, and whether it was asked to end."""
    was_told_to_end = False
    while True:
        number = signal.sigwait({*heard, signal.SIGCHLD})
        if number != signal.SIGCHLD:
            was_told_to_end |= number != signal.SIGHUP
            os.kill(child, number)  # it is there until it is waited for
        ended = -1
        while ended:  # as the first process of a container it also gets what a server that died leaves behind
            ended, status = os.waitpid(-1, os.WNOHANG)
            if ended == child:
                return status, was_told_to_end
