"""The commands that need no engine, by topic."""

from __future__ import annotations

from typing import Final

TOPICS: Final = {
    "Send": {"send": "instep_tools.send", "loadtest": "instep_tools.load.app"},
    "Watch": {
        "ping": "instep_tools.server",
        "top": "instep_tools.top",
        "streams": "instep_tools.streams",
        "state": "instep_tools.state",
    },
}
