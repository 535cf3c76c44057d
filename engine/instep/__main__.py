"""`instep`, and `python -m instep`."""

from __future__ import annotations

import sys

from instep import interrupts
from instep_tools import INTERRUPTED

EXTRAS = (
    *("matplotlib", "numba", "prometheus_client", "pydantic", "rich", "safetensors", "starlette", "structlog"),
    *("torch", "typer", "uvicorn", "yaml"),
)
"""Packages that only the extra `engine` installs."""


def main() -> None:
    """Run the command line and end the process with its exit status."""
    interrupts.end_at_once(hangups_wait=sys.argv[1:2] == ["serve"])
    try:
        from instep import cli

        cli.main()
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        sys.stderr.write(f"instep needs the package {package!r}, which is not installed: ")
        sys.stderr.write('pip install "instep[engine]", or pip install -e ".[engine]" in a checkout\n')
        raise SystemExit(2) from None
    finally:
        interrupts.change_nothing()


if __name__ == "__main__":
    main()
