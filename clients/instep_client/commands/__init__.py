"""The commands of `instep-client`: produce, replay, loadtest, ping. They need the extra `cli`; the library does not."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and end the process with its exit status."""
    try:
        from instep_client.commands.app import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("typer", "rich"):
            raise
        sys.stderr.write(f"instep-client needs the package {package!r}, which is not installed: ")
        sys.stderr.write('pip install "instep[cli]"\n')
        raise SystemExit(2) from None
    app()
