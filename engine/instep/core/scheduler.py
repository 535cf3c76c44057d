"""Which streams step next: at most one frame a stream, oldest first, clients by equal share."""

from __future__ import annotations

import numpy as np

from instep.core.typing import I32, I64, U32


class Scheduler:
    """The ready streams (those with a pending frame that is not in a step), and the order in which they step.

    While everything that is ready fits into a batch, the batch is everything. Beyond that, order is by virtual time
    (start-time fair queueing, Goyal, Vin and Cheng 1996): a frame's tag is its client's previous tag plus one, but not
    less than the tag last served. Within a client that is oldest first; between clients it is an equal share, so that
    a client that floods waits behind its own frames.

    Args:
        max_streams: slots run from 1 to this.
        max_clients: client numbers run from 0 to this, exclusive.
        max_batch_size: the most streams in one batch.
        max_queue_delay_ns: how long a batch that is not full may be held, counted from when the first of its frames
            was ready; 0 for never.
    """

    def __init__(self, max_streams: int, max_clients: int, max_batch_size: int, max_queue_delay_ns: int) -> None:
        self.max_batch_size = max_batch_size
        self.max_queue_delay_ns = max_queue_delay_ns
        self.ready_count = 0
        self._ready: U32 = np.zeros(max_streams + 1, np.uint32)
        self._tag: I64 = np.zeros(max_streams + 1, np.int64)
        self._last_tag: I64 = np.zeros(max_clients, np.int64)
        self._served_tag = 0
        self._highest_tag = 0
        self._waiting_since_ns = 0

    def add(self, slots: I64, clients: int | I32, since_ns: int) -> None:
        """Streams became ready.

        Args:
            slots: int64 [N], distinct, none of them ready already.
            clients: the client that owns them, or int32 [N], of each.
            since_ns: when the first of their frames came, on any monotonic clock.
        """
        count = len(slots)
        if count == 0:
            return
        if self.ready_count == 0:
            self._waiting_since_ns = since_ns
        if not isinstance(clients, int) and np.count_nonzero(clients == clients[0]) == len(clients):
            clients = int(clients[0])
        if isinstance(clients, int):
            first = max(int(self._last_tag[clients]), self._served_tag)
            self._tag[slots] = np.arange(first, first + count)
            self._last_tag[clients] = first + count
            highest = first + count - 1
        else:
            tags = np.maximum(self._last_tag[clients], self._served_tag) + _former(clients)
            self._tag[slots] = tags
            self._last_tag[clients] = tags + 1  # of a client's entries the last one counts, and is the highest
            highest = int(tags.max())
        self._highest_tag = max(self._highest_tag, highest)
        self._ready[self.ready_count : self.ready_count + count] = slots
        self.ready_count += count

    def hold_ns(self, now_ns: int, open_count: int) -> int:
        """How much longer to wait for a fuller batch; 0 when one may be taken now."""
        full = self.ready_count >= min(self.max_batch_size, open_count)
        if full or self.max_queue_delay_ns == 0:
            return 0
        return max(0, self._waiting_since_ns + self.max_queue_delay_ns - now_ns)

    def next_batch(self) -> I64:
        """Take the streams that step next: int64 [0 … max_batch_size], in order of age."""
        ready = self._ready[: self.ready_count].astype(np.int64)
        if self.ready_count <= self.max_batch_size:
            batch, self.ready_count = ready, 0
            self._served_tag = self._highest_tag  # which it has, or a batch before it had
        else:
            # Tags come in a few rising runs, which a stable sort merges in one pass.
            ready = ready[self._tag[ready].argsort(kind="stable")]
            batch = ready[: self.max_batch_size]
            self.ready_count -= self.max_batch_size
            self._ready[: self.ready_count] = ready[self.max_batch_size :]
            self._served_tag = max(self._served_tag, int(self._tag[batch[-1]]))
        return batch


def _former(clients: I32) -> I64:
    """How many entries before each one are of the same client: int32 [N] → int64 [N]."""
    order = clients.argsort(kind="stable")
    ordered, places = clients[order], np.arange(len(clients))
    begins = np.zeros_like(places)
    begins[1:] = np.where(ordered[1:] != ordered[:-1], places[1:], 0)
    former = np.empty_like(places)
    former[order] = places - np.maximum.accumulate(begins)
    return former
