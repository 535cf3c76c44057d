"""The commands of `instep-client`: produce, replay, loadtest, ping, state. They need the extra `cli`.

This module is imported before anything else and imports next to nothing itself, so that Ctrl-C ends the process quietly
from the first moment.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130
"""The exit status after Ctrl-C, as in shells."""


def main() -> None:
    """Run the command line and end the process with its exit status."""
    signal.signal(signal.SIGINT, end_quietly)  # until a command handles it
    try:
        from instep_tools.app import app
        from instep_tools.connect import leave_warnings_out

        leave_warnings_out()
        app()
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("typer", "rich", "jinja2", "matplotlib", "pyarrow", "safetensors"):
            raise
        sys.stderr.write(f"instep-client needs the package {package!r}, which is not installed: ")
        sys.stderr.write('pip install "instep[cli]", or pip install -e ".[cli]" in a checkout\n')
        raise SystemExit(2) from None
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the exit status is decided


def end_quietly(number: int, frame: FrameType | None) -> None:
    """End the process without a message; the handler of SIGINT."""
    if sys.stderr is not None and sys.stderr.isatty():
        os.write(2, b"\n")  # behind the terminal's ^C
    os._exit(INTERRUPTED)
