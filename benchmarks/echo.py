"""A lower bound for an engine: a ROUTER that answers every STEP at once, with a message of the same sizes."""

from __future__ import annotations

import struct
import subprocess
import sys

import numpy as np
import zmq

from instep.core.compiled import kernel
from instep.core.typing import F32, U8
from instep.frontends.zmq import native
from instep_client.protocol.wire import STEP_HEADER, U64, pack_stepped

_MORE = int(zmq.SNDMORE)
_ANSWERED = struct.Struct("<2Q")
_TIMES_US = (200, 100, 50)


class Echo:
    """The echo in a process of its own, where the engine is during its measurements too.

    Args:
        output_bytes: the size of the outputs in an answer.
        compiled: whether it answers in compiled code; then every message has one frame.
    """

    def __init__(self, output_bytes: int, *, compiled: bool = False) -> None:
        self._command = [sys.executable, "-m", "benchmarks.echo", str(output_bytes), str(int(compiled))]
        self.endpoint = ""

    def __enter__(self) -> Echo:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.endpoint = self._process.stdout.readline().strip()
        return self

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def __exit__(self, *error: object) -> None:
        self._process.kill()  # it waits inside ZeroMQ, where a signal handler might never run
        self._process.communicate()


def reply_header(header: bytes) -> bytes:
    """Frame 0 of the STEPPED that answers a STEP with this frame 0."""
    _, _, _, timesteps, width, _, request = STEP_HEADER.unpack_from(header)
    return pack_stepped(_ANSWERED.pack(request, width), timesteps, width, _TIMES_US)


@kernel
def _answer_all(socket: int, items: native.PollItems, messages: U8, words: U64, answer: U64, y: F32) -> None:
    """Answer messages of one frame for ever."""
    routing_id, part = messages[0].ctypes.data, messages[1].ctypes.data
    while True:
        native.poll(items.ctypes.data, 1, -1)
        while native.receive_part(routing_id, socket, native.DONTWAIT) >= 0:
            native.receive_part(part, socket, 0)
            native.copy_memory(words.ctypes.data, native.message_data(part), 24)
            native.receive_part(part, socket, 0)
            answer[4] = words[2]
            native.send_part(socket, native.message_data(routing_id), native.message_size(routing_id), native.SNDMORE)
            native.send_part(socket, answer.ctypes.data, answer.nbytes, native.SNDMORE)
            native.send_part(socket, y.ctypes.data, y.nbytes, 0)


def serve(output_bytes: int, compiled: bool) -> None:
    """Serve on a free port, printed to standard output, until killed."""
    socket = zmq.Context().socket(zmq.ROUTER)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    sys.stdout.write(f"tcp://127.0.0.1:{port}\n")
    sys.stdout.flush()
    if compiled:
        answer = np.frombuffer(pack_stepped(_ANSWERED.pack(0, 1), 1, 1, _TIMES_US), np.uint64).copy()
        messages = np.stack([native.new_message(), native.new_message()])
        words, y = np.zeros(3, np.uint64), np.zeros(output_bytes // 4, np.float32)
        _answer_all(socket.underlying, native.poll_items([socket]), messages, words, answer, y)
    outputs = bytes(output_bytes)
    recv, send = socket.recv, socket.send
    while True:
        routing_id, header, _ = recv(), recv(), recv()
        send(routing_id, _MORE)
        send(reply_header(header), _MORE)
        send(outputs)


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2] == "1")
