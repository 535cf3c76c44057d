"""The commands that need no engine, by topic."""

from __future__ import annotations

from typing import Final

from instep_tools.command_line import CommandLine, LazyCommands, add_root_options

TOPICS: Final = {
    "Send": {"send": "instep_tools.send", "loadtest": "instep_tools.load.app"},
    "Watch": {
        "ping": "instep_tools.server",
        "top": "instep_tools.top",
        "streams": "instep_tools.streams",
        "state": "instep_tools.state",
    },
}


class _ClientCommands(LazyCommands):
    topics = TOPICS


app: Final = CommandLine(cls=_ClientCommands, name="instep", help="Send frames to an instep server, and watch it.")
add_root_options(app)
