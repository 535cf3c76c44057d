"""The least that an engine could be: a ROUTER that answers every STEP at once, with a message of the same sizes."""

from __future__ import annotations

import subprocess
import sys
from types import TracebackType

import msgpack
import zmq

from instep_client.protocol import wire
from instep_client.protocol.wire import Kind

_MORE = int(zmq.SNDMORE)
_TIMES_US = (200, 100, 50)
"""As an engine says them: their bytes count."""


class Echo:
    """The echo as a child process, as the engine is one.

    Args:
        output_bytes: the outputs of one answer.
    """

    def __init__(self, output_bytes: int) -> None:
        self._command = [sys.executable, "-m", "instep.bench.echo", str(output_bytes)]
        self.endpoint = ""

    def __enter__(self) -> Echo:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.endpoint = self._process.stdout.readline().strip()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()  # it has nothing to lose; a handler for less might never run while it waits for ZeroMQ
        self._process.communicate()


def answer(header: bytes) -> bytes:
    """The header of the answer to a STEP."""
    _, request, steps, streams, *_ = msgpack.unpackb(header)
    return wire.pack_header(Kind.STEPPED, request, steps, streams, *_TIMES_US, [], [])


def serve(output_bytes: int, messages: int | None = None) -> None:
    """Answer on any free port, which standard output is told, until the process is ended or so many were answered."""
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.linger = 1000
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    sys.stdout.write(f"tcp://127.0.0.1:{port}\n")
    sys.stdout.flush()
    outputs = bytes(output_bytes)
    answers: dict[bytes, bytes] = {}
    recv, send = socket.recv, socket.send
    while messages is None or messages > 0:
        routing_id, header, _, _ = recv(), recv(), recv(), recv()
        said = answers.get(header) or answers.setdefault(header, answer(header))
        send(routing_id, _MORE)
        send(said, _MORE)
        send(outputs, _MORE)
        send(b"")
        if messages is not None:
            messages -= 1
    context.destroy()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
