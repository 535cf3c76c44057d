"""The entry point of `instep` and `python -m instep`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys

from instep import interrupts

_CLIENT_PACKAGES = ("typer", "rich", "jinja2", "matplotlib", "pyarrow", "safetensors")
"""The packages of the extra `cli`, which is what commands need that talk to a server."""


def main() -> None:
    """Run the command line and end the process with its exit status."""
    interrupts.end_at_once()
    if sys.argv[1:2] == ["serve"]:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # it waits until the server can reload
    try:
        from instep import program

        program.main()
    except SystemExit as end:
        if isinstance(end.code, int):
            _end_at_once(end.code)
        raise
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package.startswith("instep"):  # a bug
            raise
        extra = "cli" if package in _CLIENT_PACKAGES else "engine"
        sys.stderr.write(f"this command needs the package {package!r}, which is not installed: ")
        sys.stderr.write(f'pip install "instep[{extra}]", or pip install -e ".[{extra}]" in a checkout\n')
        raise SystemExit(2) from None
    finally:
        interrupts.stop_no_more()


def _end_at_once(status: int) -> None:
    """End the process without what Python does at the end, which takes it up to a second where torch is loaded.

    Python would also end threads that still run, such as a load or a step that hangs, and a thread that is in torch at
    that moment aborts the process.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # it is closed, or nobody reads it
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
