"""The client for threads: the same verbs as `aio.py`, without await.

A client owns one daemon thread with an event loop in it, where an `AsyncClient` lives. Any number of threads may use
the client and its streams at once; frames that they send in the same moment travel together.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy.typing as npt

from instep_client.aio import AsyncClient, IfExists, StreamPlace
from instep_client.loop_thread import LoopThread
from instep_client.protocol.wire import ServerInfo
from instep_client.replies import ListedStream, ServedModel
from instep_client.snapshots import StreamSnapshot
from instep_client.states import State
from instep_client.sync_streams import Group, Stream


class Client:
    """A connection to one model of one server, usable from many threads; use it as `with Client() as client`.

    A client that is dropped without `close` closes itself, at the latest when the interpreter exits. After a fork it
    works in the process that made it only.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        name: str = "",
        timeout_s: float = 10.0,
        reconnect_s: float = 30.0,
        *,
        model: str | None = None,
        wait: bool = False,
    ) -> None:
        """Nothing is sent before `connect` or `with`; the arguments are those of `AsyncClient`."""
        self._client = AsyncClient(endpoint, name, timeout_s, reconnect_s, model=model, wait=wait)
        self._thread = LoopThread(self._client)
        self._finalizer = weakref.finalize(self, self._thread.stop)

    def __repr__(self) -> str:
        return repr(self._client).replace("Async", "", 1)

    def __enter__(self) -> Client:
        self.connect()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def connect(self) -> None:
        """Connect and greet the server, once; `with` does it.

        Raises:
            ConnectionRefused: when nothing listens at the endpoint, unless the client was made with `wait`.
            ConnectionFailed: when nobody answers within `timeout_s`, or this process has no room for an event loop.
            Refused: when the server does not take this client, or has no model of that name (UNKNOWN_MODEL).
        """
        self._thread.start()
        try:
            self._thread.run(self._client.connect())
        except KeyboardInterrupt as interrupt:
            self.close()
            raise interrupt.with_traceback(None)  # noqa: B904 (it is the same)
        except BaseException:
            self.close()
            raise

    def close(self, park: bool = False) -> None:
        """Close the connection and its streams, or leave them to be parked; see `AsyncClient.close`.

        May be called twice; the first call decides.
        """
        self._thread.stop(park)

    @property
    def info(self) -> ServerInfo:
        """The server's description of itself.

        Raises:
            ClientClosed: before the client was connected.
        """
        return self._client.info

    def open(
        self, name: str, initial_state: State | None = None, first_seq: int = 0, if_exists: IfExists = "error"
    ) -> Stream:
        """Open one stream; see `AsyncClient.open`."""
        stream = self._thread.run(self._client.open(name, initial_state, first_seq, if_exists))
        return Stream(self, self._thread, stream)

    def open_group(self, names: Sequence[str], initial_states: State | None = None) -> Group:
        """Open many streams to be stepped by one array; see `AsyncClient.open_group`."""
        return Group(self, self._thread, self._thread.run(self._client.open_group(names, initial_states)))

    def resume(self, name: str, have: int | None = None, epoch: int = 0, take_over: bool = False) -> Stream:
        """Go on with a stream that is parked, or that another client has; see `AsyncClient.resume`."""
        return Stream(self, self._thread, self._thread.run(self._client.resume(name, have, epoch, take_over)))

    def resume_group(
        self,
        names: Sequence[str],
        have: npt.ArrayLike | None = None,
        epochs: npt.ArrayLike = 0,
        take_over: bool = False,
    ) -> Group:
        """Go on with many streams as one group; see `AsyncClient.resume_group`."""
        group = self._thread.run(self._client.resume_group(names, have, epochs, take_over))
        return Group(self, self._thread, group)

    def read_state(self, name: str) -> tuple[int, State]:
        """Read the state of any stream of the server; see `AsyncClient.read_state`."""
        return self._thread.run(self._client.read_state(name))

    def snapshot(self, name: str) -> StreamSnapshot:
        """The state of any stream of the server, to be saved and restored; see `AsyncClient.snapshot`."""
        return self._thread.run(self._client.snapshot(name))

    def restore(self, snapshot: StreamSnapshot, name: str | None = None) -> Stream:
        """Open a stream that goes on from a snapshot; see `AsyncClient.restore`."""
        return Stream(self, self._thread, self._thread.run(self._client.restore(snapshot, name)))

    def list_streams(self, prefix: str = "", place: StreamPlace | None = None) -> list[ListedStream]:
        """The streams of the model; see `AsyncClient.list_streams`."""
        return self._thread.run(self._client.list_streams(prefix, place))

    def list_models(self) -> list[ServedModel]:
        """The models of the server, the one for clients that name none first."""
        return self._thread.run(self._client.list_models())

    def load_model(self, name: str, folder: str | Path) -> list[ServedModel]:
        """Have the server load another model; see `AsyncClient.load_model`."""
        return self._thread.run(self._client.load_model(name, folder))

    def swap_model(self, name: str, folder: str | Path, streams: str = "keep") -> list[ServedModel]:
        """Have the server replace a model by another version of it; see `AsyncClient.swap_model`."""
        return self._thread.run(self._client.swap_model(name, folder, streams))

    def unload_model(self, name: str, *, force: bool = False) -> list[ServedModel]:
        """Have the server unload a model; see `AsyncClient.unload_model`."""
        return self._thread.run(self._client.unload_model(name, force=force))

    def ping(self) -> float:
        """The seconds that a message takes to the server and back."""
        return self._thread.run(self._client.ping())

    def stats(self) -> dict[str, float]:
        """The numbers of this client's model by name."""
        return self._thread.run(self._client.stats())
