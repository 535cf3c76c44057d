"""Why a whole message is refused."""

from __future__ import annotations

from instep_client.protocol import wire
from instep_client.protocol.wire import Code


class Refusal(Exception):
    """The whole message is refused, nothing of it applied."""

    def __init__(self, code: Code, detail: str = "", retry_after_us: int = 0) -> None:
        super().__init__(wire.SENTENCES[code] + (f": {detail}" if detail else ""))
        self.code = code
        self.retry_after_us = retry_after_us
