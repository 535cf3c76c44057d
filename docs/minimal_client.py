"""The simplest correct client: `python minimal_client.py ENDPOINT N <frames >outputs`.

It steps N streams together, at a server or at the shards of a cluster, of which ENDPOINT is one, with one block in
flight. It reads frames, float32 [T, N, features], from standard input, and writes outputs, float32 [T, N, outputs], and
then the final states. When a connection is lost, a server is restarted on a recording that has its streams, or another
node takes its shard over, it continues without losing or repeating an output. It ends at any other refusal.
"""

import struct
import sys
import time
import zlib

import msgpack
import zmq

HELLO, OPEN, STEP, CLOSE, PING, RESUME, SHARDS = 1, 2, 3, 4, 5, 7, 16
WELCOME, STEPPED, PONG, ERROR, GOODBYE, SHARDED = 65, 67, 69, 72, 73, 80
HELLO_FIRST, UNKNOWN_STREAM, BUSY, SHUTTING_DOWN = 4, 103, 200, 204
context = zmq.Context()
places = {}
"""Of each shard the highest term that was seen, and its endpoint."""


class Lost(SystemExit):
    """The connection is gone, and the request may have been applied or not."""


class Connection:
    """A connection to one server, which is used by one request at a time."""

    def __init__(self, endpoint):
        self.endpoint, self.request, self.socket = endpoint, 0, context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(endpoint)
        self.welcome, _ = self.ask(HELLO, 9, "minimal", "")

    def ask(self, kind, *fields, frames=()):
        """Send one request and return the fields and frames of its reply."""
        self.request = mine = self.request + 1
        message = [msgpack.packb([kind, mine, *fields]), *frames]
        if kind == STEP:
            columns, x = frames
            message = [struct.pack("<BBHIIIQ", STEP, 1, 0, *fields, mine) + columns, x]
        self.socket.send_multipart(message)
        silent_s = 0
        while silent_s < 5:
            if not self.socket.poll(1000):
                silent_s += 1
                self.request += 1
                self.socket.send(msgpack.packb([PING, self.request]))  # on a connection made anew: HELLO_FIRST
                continue
            silent_s = 0
            header, *answer = self.socket.recv_multipart()
            if header[0] == STEPPED:  # it answers one request, since only one is ever unanswered
                kind, (about,), said = STEPPED, struct.unpack_from("<Q", header, 32), []
                answer.append(header[48:])
            else:
                kind, about, *said = msgpack.unpackb(header)
            if kind == PING:
                self.socket.send(msgpack.packb([PONG, about]))
            elif kind == GOODBYE or (kind == ERROR and said[0] in (HELLO_FIRST, SHUTTING_DOWN)):
                break
            elif kind == ERROR and said[0] == BUSY:
                time.sleep(said[2] / 1e6)
                self.socket.send_multipart(message)
            elif kind == ERROR:
                sys.exit(f"the server says: {said}")
            elif about == mine:
                if kind not in (WELCOME, SHARDED) and answer and answer[-1]:
                    column, timestep, code, _, expected = struct.unpack_from("<4IQ", answer[-1])
                    if kind == STEPPED and code == UNKNOWN_STREAM:
                        break  # perhaps it hibernates: resuming wakes it
                    sys.exit(f"column {column}, timestep {timestep}: code {code}, expected seq {expected}")
                return said, answer
        self.socket.close()
        raise Lost("nobody answers")

    def learn(self):
        """Ask where all shards are served now."""
        (shards,), (terms, endpoints) = self.ask(SHARDS)
        host = self.endpoint.rpartition(":")[0]
        lines = endpoints.decode().split("\n")
        for shard, (term, line) in enumerate(zip(struct.unpack(f"<{shards}Q", terms), lines, strict=True)):
            if line and term >= places.get(shard, (0,))[0]:
                places[shard] = term, line.replace("tcp://*", host)


class Group:
    """The streams that belong to one shard; `columns` are their indexes among all."""

    def __init__(self, shard, columns):
        self.shard, self.columns = shard, columns
        self.names = "\n".join(names[n] for n in columns).encode()
        self.connect()
        _, (granted, _) = self.connection.ask(OPEN, len(columns), 0, 0, frames=(self.names, b"", b""))
        self.grants = list(struct.iter_unpack("<3Q", granted))

    def connect(self):
        """Connect to the server of the highest term that the shard has had, as another shard knows."""
        for other in [shard for shard in places if shard != self.shard]:
            try:
                Connection(places[other][1]).learn()
                break
            except Lost:
                continue
        if self.shard not in places:
            raise Lost(f"nobody serves shard {self.shard}")
        self.connection = Connection(places[self.shard][1])
        *_, shard, _, term = self.connection.welcome
        if shard != self.shard or term < places[shard][0]:
            raise Lost(f"shard {self.shard} has moved")

    def resume(self):
        """Resume the streams on a new connection. Outputs of seqs below `seq` were written."""
        take_over = 0
        for pause_s in (0, 1, 2, 4, 8, 16):
            time.sleep(pause_s)
            try:
                self.connect()
                claims = b"".join(struct.pack("<2Q", seq, epoch) for _, epoch, _ in self.grants)
                once, take_over = take_over, 1  # should this one be lost, the epochs may be new ones
                count = len(self.columns)
                _, (granted, _) = self.connection.ask(RESUME, count, once, frames=(self.names, claims))
            except Lost:
                continue
            self.grants = list(struct.iter_unpack("<3Q", granted))
            if min(next_seq for _, _, next_seq in self.grants) < seq:
                sys.exit("the server has lost frames that it had answered")
            return
        sys.exit("nobody answers")

    def insist(self, kind, *fields, column=(), frames=()):
        """Send a request about the streams until it is answered, and return the answer's row of each stream.

        `column` follows each handle.
        """
        while True:
            columns = b"".join(struct.pack(f"<{1 + len(column)}Q", grant[0], *column) for grant in self.grants)
            try:
                _, (rows, *_) = self.connection.ask(kind, *fields, frames=(columns, *frames))
                return zip(self.columns, split(rows, len(self.columns)), strict=True)
            except Lost:
                self.resume()


def split(rows, count):
    """The bytes of each row."""
    size = len(rows) // count
    return [rows[size * n : size * (n + 1)] for n in range(count)]


names = [f"minimal-{n}" for n in range(int(sys.argv[2]))]
first = Connection(sys.argv[1])
features, (shard, shards, term) = first.welcome[4], first.welcome[-3:]
places[shard] = term, sys.argv[1]
if shards > 1:
    first.learn()
first.socket.close()
shard_of = [zlib.crc32(name.encode()) % shards for name in names]
groups = [Group(each, [n for n in range(len(names)) if shard_of[n] == each]) for each in sorted(set(shard_of))]
seq = 0
while x := sys.stdin.buffer.read(4 * len(names) * features):
    frames, y = split(x, len(names)), {}
    for group in groups:
        mine = b"".join(frames[n] for n in group.columns)
        y.update(group.insist(STEP, 1, len(group.columns), features, column=(seq, seq), frames=(mine,)))
    sys.stdout.buffer.write(b"".join(y[n] for n in range(len(names))))  # all before seq is acknowledged next
    sys.stdout.buffer.flush()
    seq += 1
states = {}
for group in groups:
    states.update(group.insist(CLOSE, len(group.columns), column=(seq,)))
sys.stdout.buffer.write(b"".join(states[n] for n in range(len(names))))
