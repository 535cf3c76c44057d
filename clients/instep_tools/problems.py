"""What ends a command early, and the exit statuses all commands share."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Exit statuses of `instep-client`."""

    OK = 0
    FOUND_PROBLEMS = 1
    """It ran to the end, and something was refused, malformed or different; or the server is not ready."""
    COULD_NOT_RUN = 2
    """Nobody answers, a file cannot be used, or the arguments do not fit together."""
    MEASURED_ITSELF = 3
    """A load test's own sending was late: it measured the load generator and not the server."""
    INTERRUPTED = 130
    """Ctrl-C: what was sent has been answered and the streams are closed."""


class CommandProblem(Exception):
    """The command cannot do what was asked; the message is one sentence saying why and what to do."""


class BadFile(CommandProblem):
    """A file cannot be read as what it should be; the message names it."""
