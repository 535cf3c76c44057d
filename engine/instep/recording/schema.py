"""The recording file: one SQLite database, readable with any SQL tool.

`PRAGMA application_id` is 0x696E7374 (`inst`), `PRAGMA user_version` is the format version, 2.

Everything that happens gets the next **position**, counted from 1 over the tables of the history: sorted by position,
the rows of all of them are the one ordered history of the engine, and a missing position is a lost row. Rows of the
history are only ever added at the end and trimmed at the beginning, so the rows up to any committed position are a
consistent recording.

| history | one row for | columns after `position` | | --- | --- | --- | | `openings` | a stream that opened |
`time_ns`, `stream`, `name`, `epoch`, `first_seq`, `initial_state`, `crc` | | `batches` | a step that begins |
`time_ns`, `size`, `streams`, `seqs`, `x`, `crc` | | `outputs` | a step that was computed | `time_ns`, `batch`, `y`,
`crc` | | `closings` | a stream that ended | `time_ns`, `stream`, `frames`, `reason`, `final_state`, `crc` | | `events`
| any other event | `time_ns`, `stream`, `seq`, `kind`, `detail`, `state`, `crc` |

| other tables | |
| --- | --- |
| `header` | one row for each fact about the engine that began the file: `key`, `value` (JSON), `crc` |
| `checkpoints` | a checkpoint: `position`, `completed`, `time_ns`, `bytes`, `openings`, `closings`, `events`, `crc` |
| `states` | a state at a checkpoint: `stream`, `position`, `seq`, `state`, `tail_seq`, `tail_x`, `tail_y`, `crc` |
| `trimmed` | one row or none, where the history was trimmed: `position`, `events`, `last_stream`, `last_epoch`, `crc` |
| `newest` | one row, the newest position of the history: `position`, `states`, `crc` |

* `stream` numbers one opening of a stream, from 1, and is never used again in the same recording; `name` is what the
  client called it, and may come again after a close. `epoch` numbers its first ownership.
* A batch holds `size` frames, at most one a stream, as columns: `streams` is uint32 `[size]`, `seqs` uint64 `[size]`,
  `x` float32 `[size, features]` and, in `outputs`, `y` float32 `[size, outputs]`, all little-endian and without
  padding; row `i` of each belongs to the same frame. `seqs` count the frames of a stream from `first_seq`, without
  gaps.
* `batch` is the position of the batch whose outputs these are. Every batch ends in a row of `outputs` or in an event
  `failed`, and these come in the order of the batches. A batch without either was under way when the engine was killed:
  after it there is either no outcome of any batch, or first an event `recovered`. Its frames were applied. The frames
  of a failed batch were not: they do not count.
* The header holds `features`, `outputs` and `state`: `[name, shape, dtype, initial value]` for each leaf of a stream's
  state. A state is one row of bytes laid out as a C struct: the leaves in that order, little-endian, each at a multiple
  of its item size, and the end at a multiple of the largest. `initial_state` is that before the frame `first_seq`, NULL
  where every leaf has its initial value; `final_state` is NULL where it was not known, and `reason` is `state_lost` or
  `moved` then. `frames` is the seq that the stream's next frame would have had, which with a `first_seq` of 0 is the
  number of applied frames. It is -1 if that was unknown, because the rows of a hibernating stream were damaged. In
  `description`, the network as its `model.yaml` has it, the key `output_names` is there if the model names its outputs.
* `time_ns` is nanoseconds since 1970. A stream without a row in `closings` was still open at the last commit.
* `states` of streams: the state before frame `seq`, and the frames `tail_seq` to `seq - 1`, which the client may not
  have yet (`tail_x` float32 `[seq - tail_seq, features]`, `tail_y` likewise). `position` is that of the checkpoint that
  wrote the row. A checkpoint writes the streams that changed since the one before, in one transaction or several; the
  last one adds its row to `checkpoints`. The state of a stream at a checkpoint is its newest row up to the checkpoint's
  `position`. It contains all batches and resets up to there, and of later ones those before its `seq`, none of them
  after `completed`, the position of the event that completed the checkpoint. Streams without a row have not changed
  since they opened. A row with a `position` beyond that of the newest checkpoint belongs to a checkpoint that was never
  completed; it is newer and just as valid. The other columns of `checkpoints` say when it was completed, and how many
  bytes and rows the recording had been given by then, trimmed ones included; the `detail` of the event says how many
  frames were applied up to `position`. `newest.states` counts the rows of `states`. Rows of streams that have closed
  since may remain.
* `crc` is the CRC-32 (zlib) of the row's other columns in the order above, the first one first: integers as
  little-endian int64, text as UTF-8, blobs as they are, nothing for NULL. It finds damage, not forgery.

| event | `stream`, `seq` | means |
| --- | --- | --- |
| `failed` | NULL, position of a batch | its step failed, none of its frames was applied; `detail` says why |
| `reset` | stream, seq | before this frame the stream's state became `state`, NULL for the initial one |
| `owner` | stream, epoch | a new owner; `detail`: the epoch it held or 0, its next frame |
| `parked` | stream, seq it expects | its connection is gone |
| `moved` | stream, seq or NULL | it continues the other version's in `detail`; a replay from here gave its state |
| `states` | NULL, position | part of the checkpoint of this position was written, the rest follows |
| `checkpoint` | NULL, position | the checkpoint of this position is complete; 0: all states were given up |
| `engine` | NULL | another engine wrote the rows that follow; `detail`: the header's values that changed, as JSON |
| `recovered` | NULL, last position before | another process continued the recording |
| `repaired` | NULL | the rows before were saved from a damaged recording; `detail` names the losses |
| `end` | NULL | last row of a recording that was closed in order |

Without an `end` the recording is still being written, or its writer was killed; it is intact up to its last commit
either way. While it is written, `FILE-wal` and `FILE-shm` next to it (WAL mode) belong to it, and `FILE-lock` is held.
A closed recording is one file.

**Trimming.** A recording with a row in `trimmed` begins at the checkpoint of that `position`, the oldest that there is.
Each stream that was open there begins in its state at that checkpoint, with the frame `seq` of that row: its frames
before are gone, and those that a batch up to `completed` still holds do not count. A stream that closed after
`position` and not after `completed` may have no such state and does not count at all. Of the rows up to `position`,
these still count: the openings of streams that were open there, the newest event `owner` of each, and every event
`engine`; `trimmed.events` is the number of these events. Any other row up to `position` is about to be deleted.
`last_stream` and `last_epoch` are the highest ever given up to then.

All frames of one stream, in order, with nothing but SQL and numpy:

    both = "SELECT streams, x, y FROM batches JOIN outputs ON outputs.batch = batches.position ORDER BY batch"
    for streams, x, y in db.execute(both):
        frames += list(np.frombuffer(x, "<f4").reshape(-1, features)[np.frombuffer(streams, "<u4") == stream])
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from itertools import groupby, islice, repeat
from struct import Struct
from struct import error as StructError
from typing import Any, Final, Literal, TypeAlias, cast, get_origin, get_type_hints

from instep.recording.errors import RecordingError
from instep_client.protocol.state_spec import StateSpec

Durability: TypeAlias = Literal["memory", "commit", "fsync"]
Column: TypeAlias = int | str | bytes | None
"""The value of a column."""

FORMAT_VERSION: Final = 2
LOST: Final = "state_lost"
"""The reason in a closing without a final state."""
UNKNOWN_SEQ: Final = -1
"""The value in a closing if the next frame's seq is unknown."""
APPLICATION_ID: Final = 0x696E7374
PAGE_BYTES: Final = 16_384
END_EVENT: Final = "end"
FAILED_EVENT: Final = "failed"
RESET_EVENT: Final = "reset"
OWNER_EVENT: Final = "owner"
PARKED_EVENT: Final = "parked"
MOVED_EVENT: Final = "moved"
STATES_EVENT: Final = "states"
CHECKPOINT_EVENT: Final = "checkpoint"
ENGINE_EVENT: Final = "engine"
RECOVERED_EVENT: Final = "recovered"
REPAIRED_EVENT: Final = "repaired"

HEADER: Final = {"key": "TEXT PRIMARY KEY", "value": "TEXT NOT NULL"}
"""The columns of the table `header` before `crc`."""
HISTORY: Final[dict[str, dict[str, str]]] = {
    "openings": {
        "position": "INTEGER PRIMARY KEY",
        "time_ns": "INTEGER NOT NULL",
        "stream": "INTEGER NOT NULL UNIQUE",
        "name": "TEXT NOT NULL",
        "epoch": "INTEGER NOT NULL",
        "first_seq": "INTEGER NOT NULL",
        "initial_state": "BLOB",
    },
    "batches": {
        "position": "INTEGER PRIMARY KEY",
        "time_ns": "INTEGER NOT NULL",
        "size": "INTEGER NOT NULL",
        "streams": "BLOB NOT NULL",
        "seqs": "BLOB NOT NULL",
        "x": "BLOB NOT NULL",
    },
    "outputs": {
        "position": "INTEGER PRIMARY KEY",
        "time_ns": "INTEGER NOT NULL",
        "batch": "INTEGER NOT NULL",
        "y": "BLOB NOT NULL",
    },
    "closings": {
        "position": "INTEGER PRIMARY KEY",
        "time_ns": "INTEGER NOT NULL",
        "stream": "INTEGER NOT NULL UNIQUE",
        "frames": "INTEGER NOT NULL",
        "reason": "TEXT NOT NULL",
        "final_state": "BLOB",
    },
    "events": {
        "position": "INTEGER PRIMARY KEY",
        "time_ns": "INTEGER NOT NULL",
        "stream": "INTEGER",
        "seq": "INTEGER",
        "kind": "TEXT NOT NULL",
        "detail": "TEXT NOT NULL",
        "state": "BLOB",
    },
}
"""The tables that share the counter of positions, with their columns before `crc`."""

BESIDE: Final[dict[str, dict[str, str]]] = {
    "states": {
        "stream": "INTEGER NOT NULL",
        "position": "INTEGER NOT NULL",
        "seq": "INTEGER NOT NULL",
        "state": "BLOB NOT NULL",
        "tail_seq": "INTEGER NOT NULL",
        "tail_x": "BLOB NOT NULL",
        "tail_y": "BLOB NOT NULL",
    },
    "checkpoints": {
        "position": "INTEGER PRIMARY KEY",
        "completed": "INTEGER NOT NULL",
        "time_ns": "INTEGER NOT NULL",
        "bytes": "INTEGER NOT NULL",
        "openings": "INTEGER NOT NULL",
        "closings": "INTEGER NOT NULL",
        "events": "INTEGER NOT NULL",
    },
    "trimmed": {
        "position": "INTEGER PRIMARY KEY",
        "events": "INTEGER NOT NULL",
        "last_stream": "INTEGER NOT NULL",
        "last_epoch": "INTEGER NOT NULL",
    },
    "newest": {"position": "INTEGER PRIMARY KEY", "states": "INTEGER NOT NULL"},
}
"""The tables whose rows are replaced, with their columns before `crc`."""
TABLES: Final = {**HISTORY, **BESIDE}
COUNTED: Final = ("openings", "closings", "events")
"""The tables whose rows a checkpoint counts."""

_BYTES: Final[dict[type, Callable[[Any], bytes]]] = {
    int: Struct("<q").pack,
    str: str.encode,
    bytes: bytes,
    type(None): lambda _: b"",
}


def _encoders(columns: dict[str, str]) -> list[tuple[int, Callable[..., Any]]]:
    """The encoding of rows for their CRCs: groups of columns, each with its function.

    Each function raises TypeError or struct.error for values of another type than the columns declare.
    """
    found: list[tuple[int, Callable[..., Any]]] = []
    one: dict[str, Callable[[Any], Any]] = {"INTEGER": _BYTES[int], "TEXT": str.encode, "BLOB": memoryview}
    for (kind, *constraints), group in groupby(columns.values(), lambda declared: (*declared.split()[:2],)):
        count = len(list(group))
        if not constraints:
            found += [(1, partial(_encode_nullable, one[kind]))] * count
        elif kind == "INTEGER":
            found.append((count, Struct(f"<{count}q").pack))
        else:
            found += [(1, one[kind])] * count
    return found


def _encode_nullable(encode: Callable[[Any], Any], value: Column) -> Any:
    return b"" if value is None else encode(value)


_ENCODERS: Final = {table: _encoders(columns) for table, columns in TABLES.items()}


def owner_detail(former_epoch: int, seq: int) -> str:
    """The detail of an owner event: the owner's former epoch, 0 for none, and the seq it continues with."""
    return f"held {former_epoch}, goes on at {seq}"


def read_owner_detail(detail: str) -> tuple[int, int]:
    """The parts of an owner event's detail.

    Raises:
        ValueError: when it is not such a detail.
    """
    held, _, seq = detail.removeprefix("held ").partition(", goes on at ")
    return int(held), int(seq)


def moved_detail(stream: int, file: str) -> str:
    """The detail of a moved event: the number of the stream it continues, and the name of that stream's file."""
    return f"{stream} of {file}"


def read_moved_detail(detail: str) -> tuple[int, str]:
    """The parts of a moved event's detail.

    Raises:
        ValueError: when it is not such a detail.
    """
    stream, _, file = detail.partition(" of ")
    return int(stream), file


def checkpoint_detail(states: int, frames: int) -> str:
    """The detail of a checkpoint event: the number of states written, and of frames applied by then."""
    return f"{states} states, {frames} frames"


def read_checkpoint_frames(detail: str) -> int:
    """The number of frames applied up to a checkpoint, from its event's detail; 0 if missing."""
    found = re.search(r", (\d+) frames", detail)
    return 0 if found is None else int(found[1])


@cache
def create_statements() -> tuple[str, ...]:
    """The statements that create the empty tables."""
    tables = (f"CREATE TABLE {table} ({_columns(columns)})" for table, columns in TABLES.items())
    return (
        f"CREATE TABLE header ({_columns(HEADER)}) WITHOUT ROWID",
        *tables,
        "CREATE UNIQUE INDEX states_by_stream ON states (stream, position)",
        f"CREATE INDEX owners_by_stream ON events (stream, position) WHERE kind = '{OWNER_EVENT}'",
    )


def _columns(columns: dict[str, str]) -> str:
    return ", ".join(f"{name} {declared}" for name, declared in {**columns, "crc": "INTEGER NOT NULL"}.items())


@dataclass(frozen=True, kw_only=True)
class RecordingHeader:
    """A recording's description of the engine that wrote it."""

    format_version: int = FORMAT_VERSION
    instep_version: str
    created_ns: int
    """Nanoseconds since 1970."""
    model_name: str
    model_folder: str
    """The path of the model's folder."""
    description: dict[str, Any]
    """The network's description as plain JSON values."""
    features: int
    """The number of values in a frame."""
    outputs: int
    """The number of output values for a frame."""
    state: list[list[Any]]
    """The state specification, as `StateSpec.encode` returns it."""
    model_fingerprint: str
    """The sha256 in hex of the description and the weights."""
    arithmetic: str
    """`portable-1`, whose bits are the same everywhere, or another, such as `torch 2.13 on cuda:0`, without that
    promise.
    """
    durability: Durability
    """The durability of a frame when it was answered: `memory`, `commit` or `fsync`."""
    output_names: tuple[str, ...] = ()
    """The names of the model's outputs, in order; empty if they have none."""

    @cached_property
    def state_spec(self) -> StateSpec:
        """The state specification."""
        return StateSpec.decode(self.state)

    def rows(self) -> list[tuple[str, str, int]]:
        """The rows of the table `header`."""
        fields = asdict(self)
        if names := fields.pop("output_names"):
            fields["description"] |= {"output_names": names}
        values = ((key, json.dumps(value, sort_keys=True)) for key, value in fields.items())
        return [(key, value, row_crc(key, value)) for key, value in values]

    @classmethod
    def from_rows(cls, rows: list[tuple[Any, ...]]) -> RecordingHeader:
        """Decode the rows of the table `header`.

        Raises:
            RecordingError: when one is damaged or missing.
        """
        with _reading_json("header"):
            for key, value, crc in rows:
                if crc != row_crc(key, value):
                    raise RecordingError(f"the header {key!r} is damaged: its CRC does not match")
            fields = {key: json.loads(value) for key, value, _ in rows}
            output_names = fields["description"].pop("output_names", ())
            if missing := _field_types().keys() - fields.keys() - {"output_names"}:
                raise LookupError(f"{min(missing)} is missing")
            return cls(**fields, output_names=tuple(output_names))._checked()

    def changed(self, detail: str) -> RecordingHeader:
        """Return the header of a later engine from the detail of its event.

        Raises:
            RecordingError: when it is damaged.
        """
        with _reading_json("detail"):
            changes = json.loads(detail)
            names = tuple(changes.pop("output_names", self.output_names))
            return replace(self, **changes, output_names=names)._checked()

    def _checked(self) -> RecordingHeader:
        for name, kind in _field_types().items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} is not a {kind.__name__}")
        if self.format_version != FORMAT_VERSION:
            raise ValueError(f"it says format version {self.format_version}")
        if min(self.features, self.outputs) < 1:
            raise ValueError("a size is below 1")
        if len(self.output_names) not in (0, self.outputs) or not all(
            isinstance(name, str) for name in self.output_names
        ):
            raise ValueError("output_names are not one text for each output")
        _ = self.state_spec  # raises ValueError for a bad one
        return self


@contextmanager
def _reading_json(what: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise RecordingError(f"the {what} is damaged or incomplete ({error})") from None


@cache
def _field_types() -> dict[str, type]:
    """The types of the header's values by name, cached because a followed recording is opened often."""
    hints = get_type_hints(RecordingHeader)
    return {name: str if hint is Durability else get_origin(hint) or hint for name, hint in hints.items()}


def row_crc(*columns: Column) -> int:
    """The CRC-32 of a row's columns: int64 little-endian, UTF-8, raw bytes, nothing for None."""
    return zlib.crc32(b"".join([_BYTES[type(column)](column) for column in columns]))


def sound_rows(table: str, rows: Sequence[tuple[Any, ...]]) -> int:
    """Count the rows before the first unsound one.

    A sound row has values of the declared types and matches its CRC, which is the last column.
    """
    if not rows:
        return 0
    columns, found = zip(*rows, strict=True), cast(Iterable[int], repeat(0))
    try:
        for count, encode in _ENCODERS[table]:
            found = map(zlib.crc32, map(encode, *islice(columns, count)), found)
        pairs = list(zip(found, *columns, strict=False))
    except (TypeError, StructError):  # the value of one row is of a wrong type
        return 0 if len(rows) == 1 else next(at for at, row in enumerate(rows) if not sound_rows(table, [row]))
    return next((at for at, (crc, recorded) in enumerate(pairs) if crc != recorded), len(rows))
