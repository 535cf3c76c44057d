"""The conformance server against right clients, and against one with each mistake."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from instep_client import AsyncClient, AsyncStream, StreamEvicted
from tests.conformance.judge import RULES, STEPS_NEEDED, Client, Judge, Verdict, judges
from tests.docs.support.page import DOCS
from tests.support.fake_server import F32, reference

STREAMS = 5
"""The minimal client names them minimal-0 to -4, and the last one is of shard 1."""
MINIMAL = (DOCS / "minimal_client.py").read_text()
QUICK = [("poll(1000)", "poll(100)"), ("silent_s < 5", "silent_s < 50"), ("(0, 1, 2, 4, 8, 16)", "(0, 0.1, 0.5, 1, 1)")]
"""What makes the minimal client notice a loss sooner."""
STEP = "column=(seq, seq)"
AGAIN = "self.resume()\n\n"
MISTAKES = {
    "hello": [('HELLO, 9, "', 'HELLO, 8, "')],
    "layout": [("OPEN, len(columns), 0, 0,", "OPEN, len(columns), 0,")],
    "requests": [("self.request = mine = self.request + 1", "self.request = mine = 1"), ("self.request += 1", "pass")],
    "integers": [("[PONG, about]", "[PONG, int(float(about))]")],
    "pong": [("self.socket.send(msgpack.packb([PONG, about]))", "pass")],
    "shard": [("zlib.crc32(name.encode()) %", "(zlib.crc32(name.encode()) + 1) %")],
    "seq": [(STEP, "column=(seq + (seq == 3), seq)")],
    "acked": [("elif about == mine:", "elif about == mine or kind == 79:")],
    "window": [(STEP, "column=(seq, 0)")],
    "same frames": [(AGAIN, "self.resume(); frames = [bytes(len(each)) for each in frames]\n\n")],
    "busy": [("time.sleep(said[2] / 1e6)", "pass")],
    "resume": [("once, take_over = take_over, 1", "once = 1")],
    "send again": [(AGAIN, "self.resume(); column = [each + 1 for each in column]\n\n")],
    "term": [("if line and term >= places.get(shard, (0,))[0]:", "if line and shard not in places:")],
    "hibernated": [("break  # perhaps", "self.socket.send_multipart(message); continue  # perhaps")],
    "fenced": [('"minimal-', '"fenced-'), ("sys.exit(f", "raise Lost(f"), ("take_over, 1  #", "0, 0  #")],
    "close": [("column=(seq,)", "column=(seq + 1,)")],
}  # fmt: skip
X = np.random.default_rng(0).integers(-4, 4, (STEPS_NEEDED + 10, STREAMS, 3)).astype(np.float32)


def local(number: int) -> str:
    return "tcp://127.0.0.1:*"


def start(source: str, edits: list[tuple[str, str]], folder: Path, server: Judge) -> subprocess.Popen[bytes]:
    """Run the minimal client, with edits of its source."""
    for former, latter in [*QUICK, *edits]:
        assert former in source, former
        source = source.replace(former, latter)
    path, fed = folder / "client.py", folder / "frames"
    path.write_text(source)
    fed.write_bytes(X.tobytes())
    with fed.open("rb") as frames, (folder / "outputs").open("wb") as outputs:
        command = [sys.executable, str(path), server.endpoint, str(STREAMS)]
        return subprocess.Popen(command, stdin=frames, stdout=outputs, stderr=subprocess.DEVNULL)


def test_the_minimal_client_breaks_no_rule(tmp_path: Path) -> None:
    client = Client(Verdict())
    with judges(client, local) as (first, *_):
        assert start(MINIMAL, [], tmp_path, first).wait() == 0
    client.finish()
    assert client.verdict.broken == {}
    assert RULES.keys() - client.verdict.tried == {"fenced"}
    outputs = np.frombuffer((tmp_path / "outputs").read_bytes(), "<f4")[: len(X) * STREAMS * 2].reshape(
        len(X), STREAMS, 2
    )
    for column in range(STREAMS):
        np.testing.assert_array_equal(outputs[:, column], reference(X[:, column])[0])


async def test_the_client_for_python_breaks_no_rule() -> None:
    client = Client(Verdict())

    async def send(stream: AsyncStream, x: F32) -> None:
        for frame in x:
            await stream.send(frame)
        stream.finish()

    with judges(client, local) as (first, *_):
        async with AsyncClient(first.endpoint, timeout_s=2.0) as connection:
            streams = [await connection.open(name) for name in ("mic-1", "mic-4")]
            sending = [asyncio.create_task(send(each, X[:, 0])) for each in streams]
            for stream in streams:
                outputs = [y async for y in stream]
                np.testing.assert_array_equal(np.array(outputs), reference(X[:, 0])[0])
                await stream.close()
            await asyncio.gather(*sending)
            fenced = await connection.open("fenced-1")
            await fenced.step(X[:3, 0])
            with pytest.raises(StreamEvicted):
                await fenced.step(X[3, 0])
    client.finish()
    assert client.verdict.broken == {}
    assert client.verdict.tried == RULES.keys()


@pytest.mark.parametrize("rule", RULES)
def test_each_mistake_is_found(rule: str, tmp_path: Path) -> None:
    client, ends_at = Client(Verdict()), time.monotonic() + 30
    with judges(client, local) as (first, *_):
        process = start(MINIMAL, MISTAKES[rule], tmp_path, first)
        while rule not in client.verdict.broken and process.poll() is None and time.monotonic() < ends_at:
            time.sleep(0.02)
        process.kill()
        process.wait()
    assert rule in client.verdict.broken, "\n".join(client.verdict.lines())
