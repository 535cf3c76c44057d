"""A small server, and what the commands on states say of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from instep_client import Client
from instep_tools.app import app
from tests.support.fake_server import FakeServer, reference
from tests.support.ring_server import RING_INFO, RingServer
from tests.support.session_link import X


class Place:
    """A server, and what the command line says of it."""

    def __init__(self, ring: RingServer, endpoint: str) -> None:
        self.ring = ring
        self.endpoint = endpoint

    def run(self, *arguments: str | Path) -> Result:
        return CliRunner().invoke(app, ["state", *map(str, arguments), "-e", self.endpoint])

    def json(self, *arguments: str | Path) -> dict[str, Any]:
        result = self.run(*arguments, "--json")
        assert result.exit_code == 0, result.stderr
        values: dict[str, Any] = json.loads(result.stdout)
        return values

    def refused(self, *arguments: str | Path) -> str:
        """What is said of what is not done."""
        before = {name: (stream.epoch, stream.next_seq) for name, stream in self.ring.streams.items()}
        result = self.run(*arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert {name: (stream.epoch, stream.next_seq) for name, stream in self.ring.streams.items()} == before
        (line,) = result.stderr.splitlines()
        return line.removeprefix("error: ")


@pytest.fixture
def place() -> Iterator[Place]:
    ring = RingServer()
    with FakeServer(RING_INFO, ring.handle) as server:
        yield Place(ring, server.endpoint)


@pytest.fixture
def owner(place: Place) -> Iterator[Client]:
    """A client that has the stream `mic`, five frames of which were applied."""
    with Client(place.endpoint) as client:
        client.open("mic").step(X[:5])
        yield client


STATE = reference(X[:5])[1]


def assert_waits(place: Place, said: str, name: str, seq: int) -> None:
    """The stream is there, and goes on for who does what was said."""
    (epoch,) = re.findall(rf"keeps it for 300 s for .* with client\.resume\('{name}', epoch=(\d+)\)", said)
    with Client(place.endpoint) as client:
        stream = client.resume(name, epoch=int(epoch))
        assert stream.next_seq == seq
        assert stream.step(X[5]).tolist() == reference(X[:6])[0][5].tolist()
