"""One model several times, so that several threads can compute with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue

from instep.models.gru.network import GruNetwork


class Networks:
    """Equal networks, each of which is used by one thread at a time.

    Args:
        networks: as many as there are threads, so that none has to wait.
    """

    def __init__(self, networks: list[GruNetwork]) -> None:
        self.state_layers = networks[0].state_layers
        self.state_size = networks[0].state_size
        self._free: SimpleQueue[GruNetwork] = SimpleQueue()
        for network in networks:
            self._free.put(network)

    @contextmanager
    def one(self) -> Iterator[GruNetwork]:
        """One that nobody else uses meanwhile."""
        network = self._free.get()
        try:
            yield network
        finally:
            self._free.put(network)
