"""A real server in a thread of the test's process, in the place of `instep serve` in a process of its own."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from instep.config import load_config
from instep.models.folder import load_model
from tests.support.running import running

FLAGS = {
    "--device": "engine.device",
    "--record": "recording.path",
}


class ThreadedServer:
    """As `ChildServer`, but for its process: a model is compiled once a test run."""

    def __init__(self, model: Path, arguments: Sequence[str] = ()) -> None:
        flags: dict[str, str] = {}
        others = [argument for argument in arguments if (Path(argument) / "model.yaml").is_file()]
        arguments = [argument for argument in arguments if argument not in others]
        for flag, value in zip(arguments[::2], arguments[1::2], strict=True):
            key, _, value = value.partition("=") if flag == "--set" else (FLAGS[flag], "", value)
            flags[key] = value
        self._sections = load_config(None, flags).model_dump(exclude={"model"})
        self._sections["transport"]["endpoint"] = "tcp://127.0.0.1:*"
        self._sections["http"]["endpoint"] = None
        self._folder = model
        self._models = [load_model(model), *map(load_model, others)]
        self.started: dict[str, str] = {}
        """Of what a process would have logged."""
        self._ready: Future[str] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        self._stop, self._loop = asyncio.Event(), asyncio.get_running_loop()
        try:
            async with running(*self._models, folder=self._folder, **self._sections) as server:
                self.started["exactness"] = server.default.about.exactness
                self._ready.set_result(server.endpoint)
                await self._stop.wait()
        except Exception as error:
            if self._ready.done():
                raise
            self._ready.set_exception(error)

    def __enter__(self) -> ThreadedServer:
        self._thread.start()
        self.endpoint = self._ready.result()
        self.pid = os.getpid()
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
