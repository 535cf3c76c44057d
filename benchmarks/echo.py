"""A lower bound for an engine: a ROUTER that answers every STEP at once, with a message of the same sizes."""

from __future__ import annotations

import struct
import subprocess
import sys

import zmq

from instep_client.protocol.wire import STEP_HEADER, pack_stepped

_MORE = int(zmq.SNDMORE)
_ANSWERED = struct.Struct("<2Q")
_TIMES_US = (200, 100, 50)


class Echo:
    """The echo in a process of its own, where the engine is during its measurements too."""

    def __init__(self, output_bytes: int) -> None:
        self._command = [sys.executable, __file__, str(output_bytes)]
        self.endpoint = ""

    def __enter__(self) -> Echo:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.endpoint = self._process.stdout.readline().strip()
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()  # it waits inside ZeroMQ, where a signal handler might never run
        self._process.communicate()


def reply_header(header: bytes) -> bytes:
    """Frame 0 of the STEPPED that answers a STEP with this frame 0."""
    _, _, _, timesteps, width, _, request = STEP_HEADER.unpack_from(header)
    return pack_stepped(_ANSWERED.pack(request, width), timesteps, width, _TIMES_US)


def serve(output_bytes: int) -> None:
    """Serve on a free port, printed to standard output, until killed."""
    socket = zmq.Context().socket(zmq.ROUTER)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    sys.stdout.write(f"tcp://127.0.0.1:{port}\n")
    sys.stdout.flush()
    outputs = bytes(output_bytes)
    recv, send = socket.recv, socket.send
    while True:
        routing_id, header, _ = recv(), recv(), recv()
        send(routing_id, _MORE)
        send(reply_header(header), _MORE)
        send(outputs)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
