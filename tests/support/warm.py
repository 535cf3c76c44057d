"""Commands of `instep` in processes of their own that need not import anything first.

One process imports what commands need and does nothing else: it has no thread of Python, no socket and has computed
nothing. Each command is a fork of it, and else a process like any other, to be killed and replaced by a new one. So a
start costs what the server itself does (some 0.1 s with few buckets to certify), and not the import of torch (2 s).
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import instep.__main__
import instep.cli  # imported by the one process, so that its forks need not
import instep.server.serve
import instep.verify.command

_context: ForkServerContext = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__])


def warm_instep(arguments: Sequence[str], log: Path) -> ForkServerProcess:
    """Begin `instep` with these arguments; what it prints goes to `log`."""
    process = _context.Process(target=_run, args=(tuple(arguments), log), name="instep")
    process.start()
    return process


def _run(arguments: tuple[str, ...], log: Path) -> None:
    assert threading.active_count() == 1, "forked from a process with threads"
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    sys.argv = ["instep", *arguments]
    instep.__main__.main()
