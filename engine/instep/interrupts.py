"""Ctrl-C, SIGTERM and SIGHUP end the process at once, until a command handles them in order.

Python's own way, an exception anywhere, is swallowed or printed at length when it comes while large packages are
imported, or while the process ends. This is imported before anything else, so it imports next to nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130
"""The exit status, as shells have it."""


def end_at_once() -> None:
    """From here on Ctrl-C ends the process without a word; SIGTERM and SIGHUP, which nobody typed, with a sentence."""
    signal.signal(signal.SIGINT, _end)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has SIGHUP
            signal.signal(number, _end_with_a_sentence)


def raise_again() -> None:
    """From here on Ctrl-C raises where it was `end_at_once`: the command that runs now cleans up behind itself."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def change_nothing() -> None:
    """From here on Ctrl-C does nothing: the work is done, the exit status decided, and the process ends by itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end(number: int, frame: FrameType | None) -> None:
    if sys.stderr is not None and sys.stderr.isatty():
        os.write(2, b"\n")  # behind the terminal's ^C
    os._exit(INTERRUPTED)


def _end_with_a_sentence(number: int, frame: FrameType | None) -> None:
    os.write(2, f"instep was ended by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)
