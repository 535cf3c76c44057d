"""`python -m tests.conformance`: a server of two shards on which a client of another language shows what it can do.

Have the client open a stream of each shard (such as mic-1 and mic-4), step each with 50 messages or more, and CLOSE
them. A stream whose name begins with fenced- is taken over by another client after 3 frames. The network has 3
features, 2 outputs and a state of 4 numbers: state' = 0.5 state + the sum of x, and y = [state'[0], state'[0] + 1].
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import suppress

from tests.conformance.judge import Client, Verdict, judges


def main() -> int:
    """Serve until all streams that were opened are closed, or until Ctrl-C; 1 if a rule was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=5757, help="of shard 0; shard 1 has the next two ports")
    port = parser.parse_args().port
    client = Client(Verdict())
    with judges(client, lambda number: f"tcp://127.0.0.1:{port + number}") as (first, *_), suppress(KeyboardInterrupt):
        sys.stdout.write(f"serving at {first.endpoint}; Ctrl-C ends\n")
        sys.stdout.flush()
        ended_at = None
        while ended_at is None or time.monotonic() < ended_at + 1.0:
            time.sleep(0.05)
            is_over = bool(client.streams) and not client.open
            ended_at = (ended_at or time.monotonic()) if is_over else None
    client.finish()
    sys.stdout.write("\n".join(client.verdict.lines()) + "\n")
    return 1 if client.verdict.broken else 0


if __name__ == "__main__":
    sys.exit(main())
