"""Where the shards of a cluster are, as far as a client knows: rules without sockets, clock or event loop."""

from __future__ import annotations

from instep_client.arguments import checked_endpoint
from instep_client.protocol.errors import InvalidInput, MalformedMessage
from instep_client.protocol.wire import ShardTable


class ShardMap:
    """The highest term that a client has seen of each shard, and the endpoint of that term's server.

    A client follows no table, and stays with no server, of a lower term: another node has taken the shard over, and the
    server of the lower term may not have noticed yet.
    """

    def __init__(self, shards: int) -> None:
        self.terms = [0] * shards
        self.endpoints = [""] * shards
        """The newest endpoint of each shard; empty until one is known."""

    def __len__(self) -> int:
        return len(self.terms)

    def take(self, table: ShardTable, asked: str = "") -> None:
        """Learn a table, except what it says of shards whose term in it is lower.

        Args:
            table: from any server of the cluster, perhaps an old one.
            asked: the endpoint over which it came, whose host replaces the host `*`.

        Raises:
            MalformedMessage: for another number of shards, or an endpoint that no server can have.
        """
        if len(table.endpoints) != len(self):
            raise MalformedMessage(f"a table of {len(table.endpoints)} shards came from a cluster of {len(self)}")
        host = asked.removeprefix("tcp://").rpartition(":")[0] if asked.startswith("tcp://") else "127.0.0.1"
        for shard, (term, endpoint) in enumerate(zip(table.terms.tolist(), table.endpoints, strict=True)):
            endpoint = endpoint.replace("tcp://*:", f"tcp://{host}:", 1)
            try:
                self.learn(shard, term, endpoint and checked_endpoint(endpoint))
            except InvalidInput as error:
                raise MalformedMessage(f"the table of shards is not valid: {error}") from None

    def learn(self, shard: int, term: int, endpoint: str) -> bool:
        """Learn the term of a shard's server and, unless it is empty, its endpoint.

        Returns False, and learns nothing, for a term below the highest one: no client may follow or stay there.
        """
        if term < self.terms[shard]:
            return False
        self.terms[shard] = term
        self.endpoints[shard] = endpoint or self.endpoints[shard]
        return True
