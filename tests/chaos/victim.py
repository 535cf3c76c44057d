"""A server that is killed and started again."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from instep.models.folder import write_model
from instep.models.model import Model
from tests.support.models import SMALL
from tests.support.warm import WarmProcess

QUICK = ("--set", "recording.recovery_target_s=0.05")
_PATIENCE_S = 60.0


class Victim:
    """A server process on one port and one recording, started and killed again and again.

    Args:
        folder: for its model, its recording and its log.
        durability: what answers wait for.
        arguments: further arguments of `instep serve`.
        model: what it serves; None for what the arguments say.
        recording: another place for the recording.
    """

    def __init__(
        self,
        folder: Path,
        durability: str,
        arguments: Sequence[str] = QUICK,
        model: Model | None = SMALL,
        recording: Path | None = None,
    ) -> None:
        if model is not None:
            write_model(folder / "model", model)
        self.recording = recording or folder / "recording.instep"
        self._held = _held_port()
        self.endpoint = f"tcp://127.0.0.1:{self._held.getsockname()[1]}"
        self._arguments = [
            *("serve", *([] if model is None else [str(folder / "model")])),
            *("--endpoint", self.endpoint, "--http", "off"),
            *(
                "--record",
                str(self.recording),
                "--set",
                f"recording.durability={durability}",
                "--set",
                "log.format=json",
            ),
            *arguments,
        ]
        self._log = folder / "server.log"
        self._process: WarmProcess | None = None

    async def start(self) -> dict[str, Any]:
        """Start it; what it says of its recovery, once it is ready."""
        self._log.unlink(missing_ok=True)  # what is there is of its former life
        self._process = process = await asyncio.to_thread(WarmProcess, self._arguments, output=self._log)
        deadline = time.monotonic() + _PATIENCE_S
        while process.returncode is None and time.monotonic() < deadline:
            lines = [line for line in self.said().splitlines(keepends=True) if line.endswith("\n")]
            said: dict[str, dict[str, Any]] = {
                each["event"]: each for each in map(json.loads, (line for line in lines if line.startswith("{")))
            }
            if "serving" in said:
                return said.get("recovered", {})
            await asyncio.sleep(0.005)
        raise RuntimeError(f"the server did not start: {self.said()}")

    def hang_up(self) -> None:
        """Have it read its configuration again."""
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)

    def kill(self) -> None:
        """Kill -9."""
        assert self._process is not None
        assert self._process.returncode is None, self.said()
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """Ask it to end, and wait."""
        assert self._process is not None
        self._process.terminate()
        self._process.wait(_PATIENCE_S)
        assert self._process.returncode == 0, self.said()

    def close(self) -> None:
        """See that it is gone, whatever became of it."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            self._process.wait()
        self._held.close()

    def said(self) -> str:
        """What it has logged since it was started."""
        return self._log.read_text() if self._log.exists() else ""


def _held_port() -> socket.socket:
    """A port that nobody else is given while the server is down, and that a server can listen on all the same.

    Nor can a client that tries for the dead server be given it, and so be connected with itself.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held
