"""A server's place among the shards of a cluster."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from instep.core.typing import I32, I64, Bool
from instep.recording.writer import SecondPlace
from instep_client.protocol.codes import Code
from instep_client.protocol.wire import ShardTable, shard_of


def for_table(endpoint: str) -> str:
    """The endpoint as a table has it: one at all addresses of a machine is at the host by which a client asked.

    The path of a socket file is absolute, because clients may run in other folders.
    """
    if endpoint.startswith("ipc://") and not endpoint.startswith("ipc://@"):
        return f"ipc://{os.path.abspath(endpoint[6:])}"
    return re.sub(r"//(0\.0\.0\.0|\[::\]):", "//*:", endpoint)


@dataclass(slots=True)
class Shard:
    """The shard that a server is; by default it is the only one."""

    number: int = 0
    count: int = 1
    term: int = 0
    """The number of this server among those that the shard has had on any node; 0 without a directory."""
    table: ShardTable | None = None
    """Where all shards are served, which may change while the server runs; None for a server on its own."""
    second_place: SecondPlace | None = None
    """Where recordings are copied to; None without other nodes."""
    admin: Path | None = None
    """The Unix socket of the admin server, which the one of all shards asks; None for one at `http.endpoint`."""
    is_copied: bool = False
    """Whether a copy on another node has everything that is answered. It may change at any time."""

    def durability(self, own: str) -> str:
        """The durability that grants name, if that of the server's recording is `own`."""
        return "copied" if self.is_copied and own != "memory" else own

    def are_foreign(self, names: Sequence[str]) -> Bool:
        """Bool [N]: which names belong to other shards."""
        if self.count == 1:
            return np.zeros(len(names), np.bool_)
        return np.array([shard_of(name, self.count) != self.number for name in names], np.bool_)

    def redirect(self, names: Sequence[str], codes: I32, expected_seqs: I64) -> None:
        """Refuse unknown streams whose names belong to other shards with WRONG_SHARD and the number of that shard."""
        for index in np.flatnonzero((codes == Code.UNKNOWN_STREAM) | (codes == Code.WRONG_SHARD)).tolist():
            if (shard := shard_of(names[index], self.count)) != self.number:
                codes[index], expected_seqs[index] = Code.WRONG_SHARD, shard
