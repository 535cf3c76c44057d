"""The client for asyncio, with uvloop or without: verbs over `session.py`, run by `driver.py`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Final, Literal, TypeAlias, get_args

import numpy.typing as npt

from instep_client.aio_streams import AsyncGroup, AsyncStream
from instep_client.connection import OPEN
from instep_client.driver import Driver
from instep_client.protocol.errors import InvalidInput, StreamEvicted, StreamRefused
from instep_client.protocol.wire import DEFAULT_ENDPOINT, Code, Place, ServerInfo
from instep_client.replies import ListedStream, ServedModel
from instep_client.session import Session
from instep_client.snapshots import StreamSnapshot
from instep_client.states import State, as_state

StreamPlace: TypeAlias = Literal["connected", "parked", "hibernating"]
_PAGE: Final = 4096
IfExists: TypeAlias = Literal["error", "resume", "replace"]
_MOST_ATTEMPTS: Final = 3
"""Others may open and close streams of the same name meanwhile."""
_MOVED_ON: Final = frozenset({Code.UNKNOWN_STREAM, Code.EXPIRED, Code.IDLE, Code.FENCED, Code.STATE_LOST})


class AsyncClient:
    """A connection to one model of one server. One event loop owns it; use it as `async with AsyncClient() as client`.

    Frames that many tasks send in the same turn of the event loop travel together.

    When the connection is lost, or the server is restarted, the client connects again, resumes its streams and sends
    unanswered frames again. Calls that wait just take longer: every frame is applied once, and every output comes once
    and in order. Exceptions leave decisions to the caller: a stream has ended meanwhile (StreamEvicted), the server
    lost frames (DataLoss), an opening is in doubt or no server came back in time (ConnectionFailed).
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
        """Nothing is sent before `connect` or `async with`.

        Args:
            endpoint: where the server listens, `tcp://HOST:PORT` or `ipc://PATH`; None for $INSTEP_ENDPOINT, or else
                `tcp://127.0.0.1:5757`.
            name: for the server's log at level debug; may be empty.
            timeout_s: seconds to wait for a silent server.
            reconnect_s: seconds to try for another connection after one was lost; 0 for none.
            model: the name of the model; None for $INSTEP_MODEL, or else the server's default. A connection belongs to
                one model.
            wait: wait up to `timeout_s` for a server that does not listen yet, instead of failing at once.

        Raises:
            InvalidInput: for a bad endpoint, name, model or time.
        """
        if endpoint is None:
            endpoint = os.environ.get("INSTEP_ENDPOINT", DEFAULT_ENDPOINT)
        if model is None:
            model = os.environ.get("INSTEP_MODEL", "")
        self._session = Session(endpoint, name, timeout_s, reconnect_s, model=model)
        self._driver = Driver(self._session)
        self._wait = wait

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._session.endpoint}: {self._session.state.value}>"

    async def __aenter__(self) -> AsyncClient:
        await self.connect()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def connect(self) -> None:
        """Connect and greet the server, once; `async with` does it.

        Raises:
            ConnectionRefused: when nothing listens at the endpoint, unless the client was made with `wait`.
            ConnectionFailed: when nobody answers within `timeout_s`, or, without `wait`, no host of that name is known.
            Refused: when the server does not take this client, or has no model of that name (UNKNOWN_MODEL).
        """
        await self._driver.start(self._wait)

    async def close(self, park: bool = False) -> None:
        """Close the open streams and the connection; waiting calls fail with ClientClosed. May be called twice.

        With `park` the streams are left open: the server parks them as if the connection was lost, and for
        `info.park_s` seconds they can be resumed.
        """
        await self._driver.stop(park)

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection: not before `connect`, while another one is tried for, or after the end."""
        return self._session.state is OPEN

    @property
    def info(self) -> ServerInfo:
        """The server's description of itself and of the model.

        Raises:
            ClientClosed: before the client was connected.
        """
        return self._session.info

    async def open(
        self, name: str, initial_state: State | None = None, first_seq: int = 0, if_exists: IfExists = "error"
    ) -> AsyncStream:
        """Open one stream; its state is the model's initial one unless given (see `instep_client.states`).

        Args:
            name: the stream's name.
            initial_state: before its first frame.
            first_seq: the seq of its first frame.
            if_exists: the treatment of a stream of this name that is open or parked, as after a crash of its producer:
                `error`; `resume` it, after all frames that were applied to it (`next_seq` tells), and in its own state;
                or `replace` it, which closes it. The last two take it from its owner.

        Raises:
            StreamRefused: when the server refuses it.
            ConnectionFailed: when the connection was lost meanwhile and the stream may be open.
            InvalidInput: for a bad name or seq, a state of another shape, or another `if_exists`.
        """
        if if_exists not in get_args(IfExists):
            raise InvalidInput(f"if_exists is {if_exists!r:.40}: expected {', '.join(get_args(IfExists))}")
        for attempt in range(_MOST_ATTEMPTS):
            call = self._session.open([name], initial_state, single=True, first_seqs=first_seq or None)
            try:
                return AsyncStream(self._session, self._driver, await self._driver.wait(call))
            except StreamRefused as error:
                if error.code is not Code.NAME_IN_USE or if_exists == "error" or attempt + 1 == _MOST_ATTEMPTS:
                    raise
            try:
                stream = await self.resume(name, take_over=True)
                if if_exists == "resume":
                    return stream
                await stream.close()
            except (StreamRefused, StreamEvicted) as error:
                if error.code not in _MOVED_ON:
                    raise
        raise AssertionError

    async def open_group(self, names: Sequence[str], initial_states: State | None = None) -> AsyncGroup:
        """Open many streams to be stepped by one array; states are those of N streams.

        Either all are opened or none: those that were opened before one was refused are closed again, and their names
        free, when this raises.

        Raises:
            StreamRefused: naming the first stream that the server refuses.
            InvalidInput: for bad or repeated names, or states of another shape.
        """
        call = self._session.open(names, initial_states, single=False)
        return AsyncGroup(self._session, self._driver, await self._driver.wait(call))

    async def resume(self, name: str, have: int | None = None, epoch: int = 0, take_over: bool = False) -> AsyncStream:
        """Go on with a stream that is parked, or that another client has.

        The stream continues from `have`: send the frames from there on. Frames that the server has applied are answered
        as before if they are the same; it keeps the last `info.window_frames` outputs.

        Args:
            name: the stream's name.
            have: outputs that the user holds, those of seqs below it; None continues after the last computed frame.
            epoch: the number of the former ownership (`AsyncStream.epoch`).
            take_over: take the stream from any owner, and continue from what the server has, even if it is less.

        Raises:
            StreamRefused: UNKNOWN_STREAM or EXPIRED if there is none, FENCED if its epoch is newer.
            DataLoss: if the server has fewer frames than the user has outputs, or no longer the next outputs.
            ConnectionFailed: when the connection was lost meanwhile and the stream may have been resumed.
            InvalidInput: for a bad name or number.
        """
        call = self._session.resume([name], have, epoch, take_over, single=True)
        return AsyncStream(self._session, self._driver, await self._driver.wait(call))

    async def resume_group(
        self,
        names: Sequence[str],
        have: npt.ArrayLike | None = None,
        epochs: npt.ArrayLike = 0,
        take_over: bool = False,
    ) -> AsyncGroup:
        """Go on with many streams as one group; `have` and `epochs` are numbers for all, or uint64 [N].

        When one is refused nothing is given; the others are this client's then, and can be taken with `take_over`.

        Raises:
            Refused: as `resume`, naming the first stream that the server refuses.
        """
        call = self._session.resume(names, have, epochs, take_over, single=False)
        return AsyncGroup(self._session, self._driver, await self._driver.wait(call))

    async def read_state(self, name: str) -> tuple[int, State]:
        """Read the state of any stream of the server, parked ones included; its owner notices nothing.

        Returns:
            The seq of the stream's next frame, and its state.

        Raises:
            StreamRefused: UNKNOWN_STREAM or EXPIRED if there is none.
            InvalidInput: for a bad name.
        """
        seqs, states = await self._driver.wait(self._session.read_state_by_name([name]))
        info = self.info
        return int(seqs[0]), as_state(states, info.state, single=True)

    async def snapshot(self, name: str) -> StreamSnapshot:
        """The state with its seq and model: it can be saved, and restored on any server of that model."""
        seq, state = await self.read_state(name)
        info = self.info
        return StreamSnapshot(name, seq, state, info.fingerprint, info.model)

    async def restore(self, snapshot: StreamSnapshot, name: str | None = None) -> AsyncStream:
        """Open a stream that continues from a snapshot, by default under the snapshot's name.

        Raises:
            InvalidInput: when the snapshot is of another model, or its state holds NaN or infinity.
            StreamRefused: when the server refuses it.
        """
        snapshot.check(self.info)
        return await self.open(snapshot.name if name is None else name, snapshot.state, snapshot.seq)

    async def list_streams(self, prefix: str = "", place: StreamPlace | None = None) -> list[ListedStream]:
        """List the model's streams by the beginning of their names and, if given, by place, whoever owns them.

        Streams that open, close or move meanwhile may be missing or appear twice.

        Raises:
            InvalidInput: for another place, or a prefix that no name can begin with.
        """
        places = get_args(StreamPlace)
        if place is not None and place not in places:
            raise InvalidInput(f"place is {place!r:.40}: expected {', '.join(places)}")
        number = 0 if place is None else int(Place[place.upper()])
        found: list[ListedStream] = []
        cursor = 0
        while True:
            page, cursor = await self._driver.wait(self._session.list_streams(cursor, _PAGE, number, prefix))
            found += page
            if not cursor:
                return found

    async def list_models(self) -> list[ServedModel]:
        """The models of the server, the one for clients that name none first."""
        return await self._driver.wait(self._session.models())

    async def ping(self) -> float:
        """The seconds that a message takes to the server and back."""
        return await self._driver.wait(self._session.ping(time.monotonic()))

    async def stats(self) -> dict[str, float]:
        """The numbers of this client's model by name."""
        return await self._driver.wait(self._session.statistics())
