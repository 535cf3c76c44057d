"""An engine, and the bare echo that it is compared with: equal messages of single frames, sent by the same loops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from instep.bench.connection import Connection
from instep.bench.echo import Echo
from instep.bench.lanes import Feed, Lane, opened
from instep.bench.reference import Subject, check_and_close
from instep.bench.rounds import Run
from instep.server.child import ChildServer

Drive: TypeAlias = Callable[[Connection, Sequence[Lane]], float]
"""One measurement over a connection with these lanes."""
TIMESTEPS = 64
"""Different inputs of a stream; a longer round repeats them."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Both of them, with streams that send one frame a message."""

    subject: Subject
    feeds: Sequence[Feed]
    """One a stream."""
    engine_endpoint: str
    echo_endpoint: str

    def engine(self, drive: Drive) -> float:
        """Measure the engine over a new connection; its outputs are checked afterwards."""
        with Connection(self.engine_endpoint) as connection:
            connection.hello()
            lanes = opened(connection, self.feeds, "single")
            measured = drive(connection, lanes)
            check_and_close(connection, lanes, self.subject.gru)
        return measured

    def echo(self, drive: Drive) -> float:
        """Measure the echo, which knows no streams, over a new connection."""
        with Connection(self.echo_endpoint) as connection:
            handles = np.arange(1, len(self.feeds) + 1, dtype=np.uint64)
            lanes = [Lane(at, handles[at : at + 1], feed) for at, feed in enumerate(self.feeds)]
            return drive(connection, lanes)


@contextmanager
def engine_and_echo(run: Run, name: str, streams: int) -> Iterator[Pair]:
    """Both in processes of their own; the model in a folder of that name."""
    subject = Subject.made(run.folder / name)
    x = subject.inputs(TIMESTEPS, streams)
    feeds = [Feed.of(x[:, stream : stream + 1]) for stream in range(streams)]
    with ChildServer(subject.folder) as engine, Echo(subject.outputs * 4) as echo:
        yield Pair(subject, feeds, engine.endpoint, echo.endpoint)
