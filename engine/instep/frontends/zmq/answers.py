"""Answers complete messages in compiled code: from the arrays of `assemble` into the socket."""

from __future__ import annotations

from typing import Final

import numpy as np

from instep.core.compiled import kernel
from instep.core.tables import (
    ARRIVED_NS,
    FAILED,
    FIRST_MESSAGE,
    FIRST_VALUE,
    MESSAGES,
    ORIGIN_OF,
    TIMESTEPS,
    WIDTH,
    Records,
)
from instep.core.typing import F32, I64, U64
from instep.frontends.zmq.native import DONTWAIT, SNDMORE, send_part
from instep.frontends.zmq.table import PEER
from instep.streaming.api import MAX_REPLY_MESSAGES
from instep_client.protocol.wire import STEPPED, STEPPED_HEADER

OBJECTS_BYTES: Final = 256
"""What a message is counted to take besides its parts."""
UNREAD, MOST_UNREAD, PEER_MOST_UNREAD, ASK_EVERY = range(4)
"""Places in `budget`: bytes that all peers may not have read, their bound, that of one peer, and the bytes after which
a peer is asked whether it reads."""
LEFT: Final = -1
"""The outcome of a reply that was not sent."""
_ROUTING_ID_BYTES: Final = 5
_PEER_BYTES: Final = PEER.itemsize
_HEADER_WORDS: Final = STEPPED_HEADER.size // 8
_MOST_US: Final = 2**32 - 1


def new_header() -> U64:
    """Memory for frame 0 of a STEPPED without failures."""
    return np.zeros(_HEADER_WORDS + 2 * MAX_REPLY_MESSAGES, np.uint64)


@kernel
def answer(
    socket: int,
    peers: Records,
    rows: I64,
    model: int,
    budget: I64,
    groups: I64,
    messages: I64,
    y: F32,
    outputs: int,
    began_ns: int,
    compute_ns: int,
    send_ns: int,
    header: U64,
    outcomes: I64,
) -> int:
    """Send the replies that can be sent at once.

    Args:
        socket: the address of a ROUTER.
        peers: PEER.
        rows: `PeerTable.rows` of the model.
        model: its number.
        budget: see the places.
        groups: `Tables.groups` [G] of this call.
        messages: `Tables.reply_messages`.
        y: `Tables.reply_y`.
        outputs: the width of an output.
        began_ns: when the step of the last frames began; 0 if nothing was computed.
        compute_ns: how long it took.
        send_ns: how long ago it ended.
        header: `new_header()`.
        outcomes: int64 [G], set to 0 for a reply that was sent, to its bytes if they are still to be added to the
            peer's usage or the peer is to be asked whether it reads, or to LEFT.

    Returns:
        The number of outcomes that are not 0.
    """
    words, remaining = header.view(np.uint32), 0
    words[4], words[5] = min(compute_ns // 1000, _MOST_US), min(send_ns // 1000, _MOST_US)
    for place in range(len(groups)):
        outcomes[place] = LEFT
        remaining += 1
        row = rows[groups[place, ORIGIN_OF]]
        if row < 0 or peers["origin"][row] != groups[place, ORIGIN_OF] or peers["model"][row] != model:
            continue  # not a connection of this socket, or gone
        count, width, timesteps = groups[place, MESSAGES], groups[place, WIDTH], groups[place, TIMESTEPS]
        y_bytes, header_bytes = 4 * timesteps * width * outputs, 8 * (_HEADER_WORDS + 2 * count)
        size = OBJECTS_BYTES + header_bytes + y_bytes
        unread = peers["sent_bytes"][row] - peers["read_bytes"][row]
        is_over = budget[UNREAD] + size > budget[MOST_UNREAD] and unread > 0
        if groups[place, FAILED] or peers["waits"][row] or is_over or unread > budget[PEER_MOST_UNREAD]:
            peers["waits"][row] = 1
            continue
        queue_us = max(0, began_ns - groups[place, ARRIVED_NS]) // 1000 if began_ns else 0
        words[0], words[1], words[2], words[3] = STEPPED | count << 16, timesteps, width, min(queue_us, _MOST_US)
        for each in range(count):
            header[_HEADER_WORDS + 2 * each] = messages[0, groups[place, FIRST_MESSAGE] + each]
            header[_HEADER_WORDS + 2 * each + 1] = messages[1, groups[place, FIRST_MESSAGE] + each]
        routing_id = peers.ctypes.data + row * _PEER_BYTES
        if send_part(socket, routing_id, _ROUTING_ID_BYTES, SNDMORE | DONTWAIT) < 0:
            peers["waits"][row] = 1
            continue  # its queue is full, or it is gone
        send_part(socket, header.ctypes.data, header_bytes, SNDMORE | DONTWAIT)
        send_part(socket, y.ctypes.data + 4 * groups[place, FIRST_VALUE], y_bytes, DONTWAIT)
        peers["sent_bytes"][row] += size
        budget[UNREAD] += size
        is_due = peers["sent_bytes"][row] - peers["asked_bytes"][row] > budget[ASK_EVERY]
        outcomes[place] = size if is_due or peers["counts"][row] else 0
        remaining -= outcomes[place] == 0
    return remaining
