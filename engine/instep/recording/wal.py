"""Looking at the WAL that a killed writer left: SQLite drops what follows damage in it without a word."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final

_HEADER: Final = struct.Struct(">8I")
_FRAME: Final = struct.Struct(">6I")
_MAGIC: Final = 0x377F0682
"""The last bit says whether checksums are over big-endian words."""


def lost_tail(path: Path) -> str:
    """A sentence about committed transactions that the WAL of a recording has lost; empty where none is missing.

    The WAL must not be written meanwhile. A transaction that was not complete when the writer died is not missing.

    Args:
        path: the recording.
    """
    try:
        wal = Path(f"{path}-wal").read_bytes()
    except FileNotFoundError:
        return ""
    if len(wal) < _HEADER.size + _FRAME.size:
        return ""
    magic, _, page_bytes, _, *salts, sum1, sum2 = _HEADER.unpack_from(wal)
    order = ">" if magic & 1 else "<"
    if magic & ~1 != _MAGIC or _checksum(wal[:24], order, (0, 0)) != (sum1, sum2):
        return "the header of its WAL is damaged: what was committed last is missing"
    size = _FRAME.size + page_bytes
    frames = (len(wal) - _HEADER.size) // size
    sums = (sum1, sum2)
    for at in range(frames):
        begin = _HEADER.size + at * size
        *_, salt1, salt2, sum1, sum2 = _FRAME.unpack_from(wal, begin)
        if [salt1, salt2] != salts:
            return _said(wal, at, frames, size, salts)  # left from before the WAL was begun again, or damaged
        sums = _checksum(wal[begin + _FRAME.size : begin + size], order, _checksum(wal[begin : begin + 8], order, sums))
        if sums != (sum1, sum2):
            return _said(wal, at, frames, size, salts)
    return ""


def _said(wal: bytes, bad: int, frames: int, size: int, salts: list[int]) -> str:
    """The sentence about a WAL whose frames are valid up to the one at index `bad`."""
    later = 0
    for at in range(bad + 1, frames):
        *_, salt1, salt2, _, _ = _FRAME.unpack_from(wal, _HEADER.size + at * size)
        later += [salt1, salt2] == salts
    if not later:
        return ""  # the writer died as it wrote this one
    return (
        f"its WAL is damaged after {bad:,} of {bad + 1 + later:,} pages: what was committed after that is missing, and "
        "answers to it may have been given"
    )


def _checksum(data: bytes, order: str, sums: tuple[int, int]) -> tuple[int, int]:
    """SQLite's checksum of a multiple of 8 bytes, after those of what comes before."""
    s0, s1 = sums
    words = iter(struct.unpack(f"{order}{len(data) // 4}I", data))
    for one, two in zip(words, words, strict=True):
        s0 = (s0 + one + s1) & 0xFFFFFFFF
        s1 = (s1 + two + s0) & 0xFFFFFFFF
    return s0, s1
