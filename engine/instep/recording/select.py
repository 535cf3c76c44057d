"""Which streams of a recording are meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from instep.recording.errors import NoSuchStream
from instep.recording.records import StreamInfo


def select_streams(streams: Sequence[StreamInfo], wanted: Sequence[str]) -> list[int]:
    """Indices of the streams meant, in order: all if none is wanted; every opening of a name, or the one of a number.

    Raises:
        NoSuchStream: when one is not there, with the nearest names there are.
    """
    by_word = _by_word(streams)
    for word in wanted:
        if word not in by_word:
            raise no_such_stream(streams, word)
    return find_streams(streams, wanted)


def no_such_stream(streams: Sequence[StreamInfo], word: str) -> NoSuchStream:
    """The error that says which names are like it, or what there is."""
    names = list(dict.fromkeys(info.name for info in streams))
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else _what_there_is(streams)
    return NoSuchStream(f"the recording has no stream {word!r}; {hint}")


def find_streams(streams: Sequence[StreamInfo], wanted: Sequence[str]) -> list[int]:
    """As `select_streams`, but one that is not there is left out."""
    if not wanted:
        return list(range(len(streams)))
    by_word = _by_word(streams)
    return sorted({at for word in wanted for at in by_word.get(word, ())})


def _by_word(streams: Sequence[StreamInfo]) -> dict[str, list[int]]:
    """Indices by name, and by number where no name is the same."""
    by_word: dict[str, list[int]] = {}
    for at, info in enumerate(streams):
        by_word.setdefault(info.name, []).append(at)
    for at, info in enumerate(streams):
        by_word.setdefault(str(info.stream), [at])
    return by_word


def _what_there_is(streams: Sequence[StreamInfo]) -> str:
    if not streams:
        return "it has no streams at all"
    if len(streams) == 1:
        return f"its only stream is {streams[0].name!r}"
    return f"it has {len(streams):,} streams, from {streams[0].name!r} to {streams[-1].name!r}"
