"""The simplest correct client: `python minimal_client.py ENDPOINT N <frames >outputs`.

It steps N streams together, with one block in flight. It reads frames, float32 [T, N, features], from standard input,
and writes outputs, float32 [T, N, outputs], and then the final states. When its connection is lost, or the server is
restarted on a recording that has its streams, it continues without losing or repeating an output. It ends at the first
refusal.
"""

import struct
import sys
import time

import msgpack
import zmq

HELLO, OPEN, STEP, CLOSE, PING, RESUME, WELCOME, STEPPED, PONG, ERROR, GOODBYE = 1, 2, 3, 4, 5, 7, 65, 67, 69, 72, 73
HELLO_FIRST, BUSY = 4, 200
context, socket, request = zmq.Context(), None, 0
count, seq, grants = int(sys.argv[2]), 0, []
names = "\n".join(f"minimal-{n}" for n in range(count)).encode()


class Lost(SystemExit):
    """The connection is gone, and the request may have been applied or not."""


def ask(kind, *fields, frames=()):
    """Send one request and return the fields and frames of its reply."""
    global request
    request = mine = request + 1
    message = [msgpack.packb([kind, mine, *fields]), *frames]
    if kind == STEP:
        columns, x = frames
        message = [struct.pack("<BBHIIIQ", STEP, 1, 0, *fields, mine) + columns, x]
    socket.send_multipart(message)
    silent_s = 0
    while silent_s < 10:
        if not socket.poll(1000):
            silent_s += 1
            request += 1
            socket.send(msgpack.packb([PING, request]))  # on a connection made anew: HELLO_FIRST
            continue
        silent_s = 0
        header, *answer = socket.recv_multipart()
        if header[0] == STEPPED:  # it answers one request, since only one is ever unanswered
            kind, (about,), said = STEPPED, struct.unpack_from("<Q", header, 32), []
            answer.append(header[48:])
        else:
            kind, about, *said = msgpack.unpackb(header)
        if kind == PING:
            socket.send(msgpack.packb([PONG, about]))
        elif kind == GOODBYE or (kind == ERROR and said[0] == HELLO_FIRST):
            break
        elif kind == ERROR and said[0] == BUSY:
            time.sleep(said[2] / 1e6)
            socket.send_multipart(message)
        elif kind == ERROR:
            sys.exit(f"the server says: {said}")
        elif about == mine:
            if kind != WELCOME and answer and answer[-1]:
                column, timestep, code, _, expected = struct.unpack_from("<4IQ", answer[-1])
                sys.exit(f"column {column}, timestep {timestep}: code {code}, expected seq {expected}")
            return said, answer
    raise Lost("nobody answers")


def connect():
    """Say HELLO on a new connection and return the fields of WELCOME."""
    global socket
    if socket:
        socket.close()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    socket.connect(sys.argv[1])
    return ask(HELLO, 9, "minimal", "")[0]


def resume():
    """Resume the streams on a new connection. Outputs of seqs below `seq` were written."""
    global grants
    take_over = 0
    for pause_s in (0, 1, 2, 4, 8, 16):
        time.sleep(pause_s)
        try:
            connect()
            claims = b"".join(struct.pack("<2Q", seq, epoch) for _, epoch, _ in grants)
            once, take_over = take_over, 1  # should this one be lost, the epochs may be new ones
            _, (granted, _) = ask(RESUME, count, once, frames=(names, claims))
        except Lost:
            continue
        grants = list(struct.iter_unpack("<3Q", granted))
        if min(next_seq for _, _, next_seq in grants) < seq:
            sys.exit("the server has lost frames that it had answered")
        return
    sys.exit("nobody answers")


def insist(kind, *fields, column=(), frames=()):
    """Send a request about the streams until it is answered; `column` follows each handle."""
    while True:
        columns = b"".join(struct.pack(f"<{1 + len(column)}Q", grant[0], *column) for grant in grants)
        try:
            return ask(kind, *fields, frames=(columns, *frames))[1][0]
        except Lost:
            resume()


features = connect()[4]
_, (granted, _) = ask(OPEN, count, 0, 0, frames=(names, b"", b""))
grants = list(struct.iter_unpack("<3Q", granted))
while x := sys.stdin.buffer.read(4 * count * features):
    y = insist(STEP, 1, count, features, column=(seq, seq), frames=(x,))  # all before seq is acknowledged
    sys.stdout.buffer.write(y)
    sys.stdout.buffer.flush()
    seq += 1
sys.stdout.buffer.write(insist(CLOSE, count, column=(seq,)))
