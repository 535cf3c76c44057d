"""Which streams of a recording are meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import numpy as np

from instep.core.typing import I64
from instep.recording.records import StreamInfo
from instep.verify.errors import CannotVerify


def select_streams(streams: Sequence[StreamInfo], wanted: str | None) -> I64:
    """Indices of the streams meant: all for None, every opening of a name, or the one of a number.

    Raises:
        CannotVerify: when there is no such stream, with the nearest names there are.
    """
    if wanted is None:
        return np.arange(len(streams))
    found = [at for at, info in enumerate(streams) if info.name == wanted]
    found = found or [at for at, info in enumerate(streams) if str(info.stream) == wanted]
    if not found:
        names = dict.fromkeys(info.name for info in streams)
        near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(repr(name) for name in near)}?" if near else _what_there_is(streams)
        raise CannotVerify(f"the recording has no stream {wanted!r}; {hint}")
    return np.array(found, np.int64)


def _what_there_is(streams: Sequence[StreamInfo]) -> str:
    if not streams:
        return "it has no streams at all"
    if len(streams) == 1:
        return f"its only stream is {streams[0].name!r}"
    return f"it has {len(streams):,} streams, from {streams[0].name!r} to {streams[-1].name!r}"
