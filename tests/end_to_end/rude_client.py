"""A client for tests to kill, stop or be flooded by: `python rude_client.py ENDPOINT FEATURES BEHAVIOUR`.

It opens streams and sends blocks of theirs. BEHAVIOUR is one of

* `reads`: as fast as its credit allows, reading every answer;
* `never-reads`: a block every two milliseconds, reading nothing after its streams are open;
* `floods`: as fast as it can, reading nothing.

It says `under way` on standard output after some blocks, and ends when somebody ends it.
"""

from __future__ import annotations

import struct
import sys
import time

import msgpack
import numpy as np
import zmq

HELLO, OPEN, STEP, STEPPED, PING, PONG = 1, 2, 3, 67, 5, 69
STREAMS, TIMESTEPS, AHEAD = 40, 10, 8
"""Streams in a block, timesteps in a block, and blocks that are not answered yet."""


def main(endpoint: str, features: int, behaviour: str) -> None:
    socket = zmq.Context().socket(zmq.DEALER)
    socket.setsockopt(zmq.RCVHWM, 1000 if behaviour == "reads" else 1)
    socket.connect(endpoint)
    socket.send(msgpack.packb([HELLO, 1, 9, "rude", ""]))
    socket.recv_multipart()
    names = "\n".join(f"rude-{index}" for index in range(STREAMS))
    socket.send_multipart([msgpack.packb([OPEN, 2, STREAMS, 0, 0]), names.encode(), b"", b""])
    columns = np.zeros((STREAMS, 3), "<u8")
    columns[:, 0] = np.frombuffer(socket.recv_multipart()[1], "<u8").reshape(STREAMS, 3)[:, 0]
    x = np.zeros((TIMESTEPS, STREAMS, features), "<f4").tobytes()
    sent = answered = 0
    while True:
        if behaviour == "never-reads":
            time.sleep(0.002)
        if behaviour != "reads" or sent - answered < AHEAD:
            header = struct.pack("<BBHIIIQ", STEP, 1, 0, TIMESTEPS, STREAMS, features, 3 + sent)
            socket.send_multipart([header + columns.tobytes(), x])
            columns[:, 1] += TIMESTEPS
            columns[:, 2] = TIMESTEPS * answered
            sent += 1
        else:
            header = socket.recv_multipart()[0]
            if header[0] == STEPPED:
                answered += struct.unpack_from("<H", header, 2)[0]
            elif header[1] == PING:
                socket.send(msgpack.packb([PONG, msgpack.unpackb(header)[1]]))
        if sent == 3 * AHEAD:
            sys.stdout.write("under way\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
