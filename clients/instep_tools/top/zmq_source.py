"""Snapshots over ZeroMQ: STATS, MODELS and LIST, as `instep-client stats`, `models` and `streams list` ask them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from instep_client.aio import AsyncClient
from instep_client.protocol.errors import InstepError
from instep_client.replies import ListedStream
from instep_tools.connect import PATIENCE_S
from instep_tools.top.snapshot import ModelTotals, Numbers, ObservedModel, ObservedStream, Snapshot, StreamQuery, select

LEAST_APART_S: Final = 0.5
"""Between two lists: a rate over less is mostly noise."""
LIST_SHARE: Final = 10
"""A list that took T seconds is followed by another one after this many T at the earliest: it reads every stream."""


class ZmqSource:
    """A client of one model of a server.

    Only the model that is looked at has a connection: one to each would keep old versions of swapped models alive.
    """

    def __init__(self, endpoint: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.endpoint = endpoint
        self._clock = clock
        self._client: AsyncClient | None = None
        self._asked_for = ""
        self._names: list[str] = []
        self._streams: list[ObservedStream] = []
        self._seqs: dict[str, int] = {}
        self._listed_at = self._list_again_at = float("-inf")
        self._selected_for: StreamQuery | None = None
        self._selected: tuple[list[ObservedStream], int] = [], 0
        """Of a million streams this takes a second, so it is not done again for the same ones."""

    async def read(self, query: StreamQuery) -> Snapshot:
        """Ask the server; connects where there is no connection.

        Raises:
            InstepError: nobody answers, or the server has no such model.
        """
        try:
            return await self._read(query)
        except InstepError:
            await self.close()
            raise

    async def _read(self, query: StreamQuery) -> Snapshot:
        if query.model != self._asked_for:
            await self.close()
        client = self._client or await self._connect(query.model)
        models = await client.list_models()
        names = [model.name for model in models]
        if self._names and names != self._names:  # one was swapped perhaps, and the connection is to its old version
            await self.close()
            client = await self._connect(query.model)
        self._names = names
        numbers, now = Numbers(await client.stats()), self._clock()
        if now >= self._list_again_at:
            self._listed(await client.list_streams(), now)
        if self._selected_for != query:
            self._selected_for, self._selected = query, select(self._streams, query)
        info, (streams, matched) = client.info, self._selected
        newest = {info.model: int(numbers["frames_total"])} if "frames_total" in numbers else {}  # the list's is older
        return Snapshot(
            time_s=now,
            query=query,
            models=[
                ModelTotals(each.name, each.streams, each.connections, newest.get(each.name, each.frames))
                for each in models
            ],
            model=ObservedModel(
                name=info.model,
                fingerprint=info.fingerprint,
                features=info.features,
                outputs=info.outputs,
                device=info.device,
                exactness=info.exactness,
                arithmetic=info.arithmetic,
                max_streams=info.max_streams,
                durability=info.durability,
                numbers=numbers,
            ),
            streams=streams,
            matched=matched,
        )

    async def close(self) -> None:
        """End the connection, if there is one."""
        client, self._client = self._client, None
        self._names, self._seqs = [], {}
        self._listed_at = self._list_again_at = float("-inf")
        if client is not None:
            await client.close()

    async def _connect(self, model: str) -> AsyncClient:
        client = AsyncClient(self.endpoint, "instep top", PATIENCE_S, reconnect_s=0.0, model=model)
        self._client, self._asked_for = client, model
        await client.connect()
        return client

    def _listed(self, streams: Sequence[ListedStream], asked_at: float) -> None:
        now = self._clock()
        middle, before = (asked_at + now) / 2, self._listed_at
        self._streams = [
            ObservedStream(
                name=each.name,
                state=each.place,
                rate=self._rate(each, middle - before),
                seq=each.next_seq,
                pending=each.pending,
                idle_s=each.idle_s,
                expires_in_s=each.expires_in_s,
            )
            for each in streams
        ]
        self._selected_for = None
        self._seqs = {each.name: each.next_seq for each in streams if each.next_seq is not None}
        self._listed_at = middle
        self._list_again_at = now + max(LEAST_APART_S, LIST_SHARE * (now - asked_at))

    def _rate(self, stream: ListedStream, seconds: float) -> float | None:
        if stream.next_seq is None:
            return 0.0
        before = self._seqs.get(stream.name)
        return None if before is None or stream.next_seq < before else (stream.next_seq - before) / seconds
