"""The thread of a `Client`, and the event loop that runs in it."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from instep_client import Client


class Looked(Exception):
    pass


class Inside:
    """An array that a client converts in its own thread, and that only looks around there."""

    loop: asyncio.AbstractEventLoop
    thread: threading.Thread

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        self.loop, self.thread = asyncio.get_running_loop(), threading.current_thread()
        raise Looked


def inside(client: Client) -> Inside:
    """The thread of a client, and its event loop."""
    found = Inside()
    with pytest.raises(Looked):
        client.open("never", found)
    return found
