"""Signals in tests, and programs that are interrupted at every moment of their lives."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from instep import interrupts

LAUNCHER: Final = """
import os, signal, sys
for number in (2, 15, 1):
    signal.signal(number, lambda number, _: os._exit(128 + number))  # before the first line
from {module} import main
sys.argv[0] = "program"
sys.stderr.write("first line\\n")
sys.stderr.flush()
main()
"""


@dataclass(frozen=True)
class Ending:
    """How a program ended that was interrupted so long after its first line."""

    delay_s: float
    status: int
    stderr: str


def interrupted_at_every_moment(
    module: str,
    arguments: Sequence[str],
    cwd: Path,
    step_s: float,
    last_s: float,
    number: signal.Signals = signal.SIGINT,
) -> Iterator[Ending]:
    """Start `module.main` again and again and send it a signal later and later, until `last_s` after its first line.

    Args:
        module: whose `main` the program is.
        arguments: of the program.
        cwd: where it runs.
        step_s: from one delay to the next.
        last_s: the last delay.
        number: the signal.
    """
    command = [sys.executable, "-c", LAUNCHER.format(module=module), *arguments]
    steps = round(last_s / step_s)
    for step in range(steps + 1):
        process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None
            assert process.stderr.readline() == "first line\n"
            time.sleep(step * step_s)
            process.send_signal(number)
            said = process.communicate(timeout=60)[1]
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()
        yield Ending(step * step_s, process.returncode, said)


@contextmanager
def reporting(same_signal_s: float) -> Iterator[None]:
    """Signals are handled as in a command that cleans up when one comes."""
    before = {number: signal.getsignal(number) for number in interrupts.ENDINGS}
    interrupts.end_at_once()
    interrupts.raise_stopped(same_signal_s)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
