"""The entry point of `instep` and `python -m instep`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading

from instep import interrupts
from instep_tools import INTERRUPTED


def main() -> None:
    """Run the command line and end the process with its exit status."""
    interrupts.end_at_once()
    if sys.argv[1:2] == ["serve"]:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # it waits until the server can reload
    try:
        from instep import cli

        cli.main()
    except SystemExit as end:
        if isinstance(end.code, int):
            _end_without_threads(end.code)
        raise
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package.startswith("instep"):  # a bug
            raise
        sys.stderr.write(f"instep needs the package {package!r}, which is not installed: ")
        sys.stderr.write('pip install "instep[engine]", or pip install -e ".[engine]" in a checkout\n')
        raise SystemExit(2) from None
    finally:
        interrupts.stop_no_more()


def _end_without_threads(status: int) -> None:
    """End the process at once if a thread is still running, such as a load or a step that hangs.

    Python would end such threads itself, and a thread that is in torch at that moment aborts the process.
    """
    if any(thread.daemon for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):  # it is closed, or nobody reads it
                stream.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
