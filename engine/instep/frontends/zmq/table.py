"""What compiled code knows of models, and of connections that have said HELLO."""

from __future__ import annotations

from typing import Final

import numpy as np

from instep.core.typing import I64, U32
from instep.streaming.api import Origin

PEER: Final = np.dtype(
    [
        ("routing_id", "<u8"),  # its bytes and then zeros
        ("last_heard_ns", "<i8"),
        ("arrival", "<i8"),  # as an origin
        ("sent_bytes", "<i8"),  # handed to ZeroMQ so far
        ("read_bytes", "<i8"),  # the value of `sent_bytes` up to which it has confirmed that it has read
        ("asked_bytes", "<i8"),  # the value of `sent_bytes` when it was last asked whether it reads
        ("origin", "<i4"),  # its number; NOBODY where the row is free
        ("model", "<i4"),
        ("waits", "<i4"),  # what is sent next must not overtake messages that wait for it
        ("counts", "<i4"),  # it has a usage, to which what it is sent is added
    ]
)
MODEL: Final = np.dtype([("features", "<i8"), ("max_block_frames", "<i8"), ("accepts", "<i8")])
"""A model, and whether it accepts frames now."""
NOBODY: Final = -1


class PeerTable:
    """Peers by row, and models by number.

    Args:
        max_peers: the most peers at a time.
    """

    def __init__(self, max_peers: int) -> None:
        self.peers = np.zeros(max_peers, PEER)
        self.models = np.zeros(0, MODEL)
        self.rows: list[I64] = []
        """By model, the rows of its origins, int64 [origins]; a row may belong to another peer by now."""
        self.routing_ids: U32 = np.zeros(0, np.uint32)
        """The numbers in all routing ids, in order, uint32 [N]."""
        self.rows_of_ids: I64 = np.zeros(0, np.int64)
        """int64 [N]."""
        self._free: list[int] = []
        """Rows that were used before."""

    @property
    def is_full(self) -> bool:
        """Whether there may be no more peers."""
        return len(self.rows_of_ids) >= len(self.peers)

    def add_model(self, features: int, max_block_frames: int, max_origins: int) -> int:
        """The number of another model, whose blocks have at most so many frames of so many features."""
        self.models = np.append(self.models, np.array([(features, max_block_frames, 0)], MODEL))
        self.rows.append(np.full(max_origins, NOBODY, np.int64))
        return len(self.models) - 1

    def move(self, former: int, model: int) -> None:
        """Make the peers of a model those of another, which takes over its origins."""
        self.peers["model"][self.peers["model"] == former] = model
        self.rows[model] = self.rows[former]

    def add_peer(self, routing_id: bytes, origin: Origin, model: int, now_ns: int, *, counts: bool = False) -> int:
        """The row of another peer, which is an origin of a model, and was heard now."""
        number = number_of(routing_id)
        row = self._free.pop() if self._free else len(self.rows_of_ids)
        place = np.searchsorted(self.routing_ids, number)
        self.routing_ids = np.insert(self.routing_ids, place, number)
        self.rows_of_ids = np.insert(self.rows_of_ids, place, row)
        self.peers[row] = np.zeros((), PEER)
        fields = number << 8, now_ns, origin.arrival, origin.number, model, counts
        for name, value in zip(
            ("routing_id", "last_heard_ns", "arrival", "origin", "model", "counts"), fields, strict=True
        ):
            self.peers[name][row] = value
        self.rows[model][origin.number] = row
        return row

    def remove_peer(self, row: int) -> None:
        """Forget a peer."""
        others = self.rows_of_ids != row
        self.routing_ids, self.rows_of_ids = self.routing_ids[others], self.rows_of_ids[others]
        self.peers["origin"][row] = NOBODY
        self._free.append(row)


def number_of(routing_id: bytes) -> int:
    """The number in a routing id of ZeroMQ's, behind its first byte, which is 0."""
    return int.from_bytes(routing_id[1:5], "little")
