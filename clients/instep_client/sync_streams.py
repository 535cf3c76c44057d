"""Streams and groups of `sync.Client`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from instep_client.aio_streams import AsyncGroup, AsyncStream
from instep_client.calls import TimedOutputs
from instep_client.loop_thread import LoopThread
from instep_client.protocol.wire import F32, U64
from instep_client.snapshots import StreamSnapshot
from instep_client.states import State


class Stream:
    """One stream; see `AsyncStream`. It keeps its client alive."""

    def __init__(self, client: object, thread: LoopThread, stream: AsyncStream) -> None:
        """Made by `Client.open`."""
        self._client = client
        self._thread = thread
        self._stream = stream

    def __repr__(self) -> str:
        return repr(self._stream).replace("Async", "", 1)

    @property
    def name(self) -> str:
        """The name it was opened by."""
        return self._stream.name

    @property
    def next_seq(self) -> int:
        """The seq of the next frame that is sent; with nothing on its way, that of the next frame applied."""
        return self._stream.next_seq

    @property
    def epoch(self) -> int:
        """The number of this ownership of the stream; see `AsyncStream.epoch`."""
        return self._stream.epoch

    @property
    def moved_at(self) -> int | None:
        """From which seq on the present version of the model computes it; see `AsyncStream.moved_at`."""
        return self._stream.moved_at

    def step(self, x: npt.ArrayLike) -> F32:
        """Send a frame or chunk and wait for its outputs; see `AsyncStream.step`."""
        return self._thread.run(self._stream.step(x))

    def step_timed(self, x: npt.ArrayLike) -> TimedOutputs:
        """Like `step`, with the server's times beside the outputs."""
        return self._thread.run(self._stream.step_timed(x))

    def send(self, x: npt.ArrayLike) -> None:
        """Send without waiting for the outputs, which iterating over the stream gives; see `AsyncStream.send`."""
        self._thread.run(self._stream.send(x))

    def finish(self) -> None:
        """Nothing more will be sent: iterating ends after the last output; see `AsyncStream.finish`."""
        self._thread.run(_finish(self._stream))

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> F32:
        """The outputs of the next `send`; see `AsyncStream.__anext__`."""
        outputs = self._thread.run(self._stream.next_outputs())
        if outputs is None:
            raise StopIteration
        return outputs

    def read_state(self) -> tuple[int, State]:
        """The state as it is now and the seq of the frame that comes next; see `AsyncStream.read_state`."""
        return self._thread.run(self._stream.read_state())

    def reset(self, state: State | None = None) -> None:
        """Set the state once everything sent was answered, to the initial one unless given; see `AsyncStream.reset`."""
        self._thread.run(self._stream.reset(state))

    def fork(self, name: str) -> Stream:
        """A new stream that begins with this one's state and seq; see `AsyncStream.fork`."""
        return Stream(self._client, self._thread, self._thread.run(self._stream.fork(name)))

    def snapshot(self) -> StreamSnapshot:
        """The state with its seq and model: it can be saved, and restored on any server of that model."""
        return self._thread.run(self._stream.snapshot())

    def close(self) -> State:
        """Close it; its final state; see `AsyncStream.close`."""
        return self._thread.run(self._stream.close())


class Group:
    """Many streams stepped by one array; see `AsyncGroup`. It keeps its client alive."""

    def __init__(self, client: object, thread: LoopThread, group: AsyncGroup) -> None:
        """Made by `Client.open_group`."""
        self._client = client
        self._thread = thread
        self._group = group

    def __repr__(self) -> str:
        return repr(self._group).replace("Async", "", 1)

    def __len__(self) -> int:
        return len(self._group)

    @property
    def names(self) -> tuple[str, ...]:
        """The names they were opened by."""
        return self._group.names

    @property
    def next_seqs(self) -> U64:
        """The seq of the next frame of each stream, uint64 [N]."""
        return self._group.next_seqs

    @property
    def epochs(self) -> U64:
        """The numbers of these ownerships, uint64 [N]; see `AsyncStream.epoch`."""
        return self._group.epochs

    @property
    def moved_at(self) -> npt.NDArray[np.int64]:
        """As `Stream.moved_at`, int64 [N], -1 for None."""
        return self._group.moved_at

    def step(self, x: npt.ArrayLike, rows: npt.ArrayLike | None = None) -> F32:
        """Send one frame for each stream, or T, and wait for the outputs; see `AsyncGroup.step`."""
        return self._thread.run(self._group.step(x, rows))

    def step_timed(self, x: npt.ArrayLike, rows: npt.ArrayLike | None = None) -> TimedOutputs:
        """Like `step`, with the server's times beside the outputs."""
        return self._thread.run(self._group.step_timed(x, rows))

    def read_state(self) -> tuple[U64, State]:
        """Seqs and states of all streams as they are now; see `AsyncGroup.read_state`."""
        return self._thread.run(self._group.read_state())

    def reset(self, states: State | None = None) -> None:
        """Set all states once everything sent was answered; see `AsyncGroup.reset`."""
        self._thread.run(self._group.reset(states))

    def fork(self, names: Sequence[str]) -> Group:
        """New streams that begin with their states and seqs; see `AsyncGroup.fork`."""
        return Group(self._client, self._thread, self._thread.run(self._group.fork(names)))

    def close(self) -> State:
        """Close all; their final states; see `AsyncGroup.close`."""
        return self._thread.run(self._group.close())


async def _finish(stream: AsyncStream) -> None:
    stream.finish()
