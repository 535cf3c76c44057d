"""Runs of `instep send` against a fake server."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from instep_client.protocol.codes import Code
from instep_client.protocol.wire import F32, Kind
from instep_tools.connect import Target
from instep_tools.pacing import Stop
from instep_tools.problems import Exit
from instep_tools.send import SendJob, send
from tests.support.fake_server import FakeServer, Message
from tests.tools.helpers import JumpingClock, RememberingTerminal, info_with


class SendRun:
    """One run of the command against a fake server."""

    def __init__(self, *, as_json: bool = False, **info: Any) -> None:
        self.terminal = RememberingTerminal(as_json)
        self.stop = Stop()
        self.clock = JumpingClock()
        self.server = FakeServer(info_with(**info))
        self.opened: dict[str, None] = {}
        self.most_open = 0
        self.server.rules.fault = self._watch
        self.keeps: set[str] = set()
        """Streams of others."""

    async def __call__(self, stdin: Path | None = None, **what: Any) -> Exit:
        """Run it, with the lines of a file on standard input."""
        with ExitStack() as stack:
            server = stack.enter_context(self.server)
            if stdin is not None:
                stack.enter_context(patch("sys.stdin", stack.enter_context(stdin.open())))
            job = SendJob(Target(server.endpoint), **what)
            ending = await send(job, self.terminal, self.stop, self.clock)
            assert server.rules.names.keys() == self.keeps, "streams are left open"
        return ending

    @property
    def compared(self) -> tuple[int, int]:
        """The number of frames that were compared, and of those that differ."""
        check = self.terminal.json()["check"]
        return check["frames"], check["different"]

    def _watch(self, header: list[Any], frames: list[bytes]) -> None:
        self.opened |= dict.fromkeys(self.server.rules.names)
        self.most_open = max(self.most_open, len(self.server.rules.names))

    def printed(self) -> dict[str, F32]:
        """The outputs by stream; checks that seqs count from 0."""
        rows: dict[str, list[list[str]]] = {}
        head, *lines = self.terminal.data.splitlines()
        assert head == "stream,seq,y0,y1"
        for line in lines:
            stream, seq, *values = line.split(",")
            assert int(seq) == len(rows.setdefault(stream, []))
            rows[stream].append(values)
        return {stream: np.array(values, np.float32) for stream, values in rows.items()}


def end_at_block(server: FakeServer, number: int, handle: int, code: Code) -> None:
    """Let the server end a stream (handles count from 1) just before that block, from 1, and tell."""
    rules = server.rules

    def fault(header: list[Any], frames: list[bytes]) -> list[Message] | None:
        if len(rules.blocks) != number or header[0] != Kind.STEP:
            return None
        rules.fault = None
        rules.notices = rules.evict([handle], code)
        return None

    rules.fault = fault


def lines_of(frames: F32) -> str:
    return "".join(" ".join(str(value) for value in frame) + "\n" for frame in frames)
