"""A disk below SQLite: it notes every write and sync, loses power, gets full and fails when told to."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import apsw
import numpy as np

SECTOR_BYTES: Final = 512

Verb: TypeAlias = Literal["create", "write", "truncate", "sync", "delete", "mark"]
Fault: TypeAlias = Literal["full", "broken"]

_SAYS: Final[dict[type[apsw.Error], str]] = {
    apsw.FullError: "database or disk is full",
    apsw.IOError: "disk I/O error",
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that reached the disk."""

    verb: Verb
    file: str
    """What the name has beyond that of the database: ``, `-wal` or `-journal`."""
    offset: int = 0
    """Where a write begins, the length after a truncation, the number of a mark."""
    data: bytes = b""
    is_lasting: bool = False
    """Whether the names in the directory are synced as well."""


class Disk:
    """Stands in for the module `sqlite3` where a recording is written: `connect` opens files on this disk.

    Args:
        name: of the VFS, unique in the process.
    """

    Error = sqlite3.Error
    OperationalError = sqlite3.OperationalError

    def __init__(self, name: str) -> None:
        self.operations: list[Operation] = []
        self.on_operation: Callable[[Operation], Fault | None] = lambda operation: None
        """Asked before each; what it returns happens instead."""
        self._name = name
        self._vfs = _Vfs(self, name)

    def connect(self, path: Path | str, *, uri: bool = False, **_: object) -> _Connection:
        """As `sqlite3.connect`, for what the writer does with it."""
        flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE | (apsw.SQLITE_OPEN_URI if uri else 0)
        try:
            return _Connection(apsw.Connection(str(path), flags=flags, vfs=self._name))
        except apsw.Error as error:
            raise _as_sqlite3(error) from error

    def mark(self, number: int) -> None:
        """Note in the trace that something was said to be durable."""
        self.operations.append(Operation("mark", "", number))

    def perform(self, operation: Operation, really: Callable[[], None]) -> None:
        """Something is about to reach the disk; note it unless it fails."""
        fault = self.on_operation(operation)
        if fault is not None:
            raise apsw.FullError("injected") if fault == "full" else apsw.IOError("injected")
        really()
        self.operations.append(operation)

    def close(self) -> None:
        """Unmount."""
        self._vfs.unregister()


class _Connection:
    """What the writer uses of `sqlite3.Connection`."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection

    def execute(self, statement: str, values: Sequence[Any] = ()) -> apsw.Cursor:
        return self._translated(lambda: self._connection.execute(statement, values))

    def executemany(self, statement: str, rows: Iterable[Sequence[Any]]) -> apsw.Cursor:
        return self._translated(lambda: self._connection.executemany(statement, rows))

    def close(self) -> None:
        # What goes wrong on the way is nothing to SQLite: it closes all the same.
        with contextlib.suppress(apsw.IOError, apsw.FullError):
            self._connection.close(force=True)

    def _translated(self, run: Callable[[], apsw.Cursor]) -> apsw.Cursor:
        try:
            return run()
        except apsw.Error as error:
            raise _as_sqlite3(error) from error


class _Vfs(apsw.VFS):
    def __init__(self, disk: Disk, name: str) -> None:
        super().__init__(name, "")
        self._disk = disk

    def xOpen(self, name: apsw.URIFilename | str | None, flags: list[int]) -> apsw.VFSFile:
        assert name is not None
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        file = _suffix(path)
        if not Path(path).exists():
            self._disk.perform(Operation("create", file), lambda: None)
        return _File(self._disk, file, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        operation = Operation("delete", _suffix(filename), is_lasting=syncdir)
        self._disk.perform(operation, lambda: super(_Vfs, self).xDelete(filename, syncdir))


class _File(apsw.VFSFile):
    def __init__(self, disk: Disk, file: str, name: apsw.URIFilename | str, flags: list[int]) -> None:
        super().__init__("", name, flags)
        self._disk = disk
        self._file = file
        self._is_new = bool(flags[0] & apsw.SQLITE_OPEN_CREATE) and file.endswith(("-wal", "-journal"))
        """SQLite syncs the directory with the first sync of a journal or WAL it may have made."""

    def xWrite(self, data: bytes, offset: int) -> None:
        operation = Operation("write", self._file, offset, bytes(data))
        self._disk.perform(operation, lambda: super(_File, self).xWrite(data, offset))

    def xTruncate(self, newsize: int) -> None:
        operation = Operation("truncate", self._file, newsize)
        self._disk.perform(operation, lambda: super(_File, self).xTruncate(newsize))

    def xSync(self, flags: int) -> None:
        operation = Operation("sync", self._file, is_lasting=self._is_new)
        self._disk.perform(operation, lambda: super(_File, self).xSync(flags))
        self._is_new = False


def _as_sqlite3(error: apsw.Error) -> sqlite3.OperationalError:
    translated = sqlite3.OperationalError(_SAYS.get(type(error), str(error)))
    # What was injected here comes back without a code.
    translated.sqlite_errorcode = getattr(error, "extendedresult", sqlite3.SQLITE_IOERR)
    return translated


def _suffix(path: str) -> str:
    return next((suffix for suffix in ("-wal", "-journal") if path.endswith(suffix)), "")


def written(operations: list[Operation]) -> dict[str, bytes]:
    """The files after these operations, none of which is lost when only the process was killed, by suffix."""
    files: dict[str, bytearray] = {}
    for operation in operations:
        contents = files.setdefault(operation.file, bytearray())
        match operation.verb:
            case "write":
                contents.extend(bytes(max(0, operation.offset - len(contents))))
                contents[operation.offset : operation.offset + len(operation.data)] = operation.data
            case "truncate":
                del contents[operation.offset :]
            case "delete":
                del files[operation.file]
    return {suffix: bytes(contents) for suffix, contents in files.items()}


# ── Power loss ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class _Contents:
    """A file as it may be after a power loss."""

    safe: bytearray = field(default_factory=bytearray)
    """As of the last sync."""
    pending: list[Operation] = field(default_factory=list)
    """Since then: any of it may be there or not."""


def lay_out(folder: Path, files: dict[str, bytes]) -> Path:
    """Write what a disk held into a folder, by the ends of their names; the path of the recording."""
    folder.mkdir(exist_ok=True)
    for suffix, contents in files.items():
        (folder / f"r.instep{suffix}").write_bytes(contents)
    return folder / "r.instep"


def after_power_loss(operations: Sequence[Operation], rng: np.random.Generator) -> dict[str, bytes]:
    """What may be on a disk that lost power after these operations: the files, by suffix.

    What was synced is there. Of what was not, each write, truncation, new name and deletion is there or not, whatever
    came before or after it, and a write may be there in parts.
    """
    there: dict[str, _Contents] = {}
    names: dict[str, _Contents] = {}
    """The directory as of its last sync."""
    for operation in operations:
        file = operation.file
        match operation.verb:
            case "create":
                there[file] = _Contents()
            case "write" | "truncate":
                there[file].pending.append(operation)
            case "delete":
                there.pop(file, None)
            case "sync":
                contents = there[file]
                for pending in contents.pending:
                    _apply(contents.safe, pending)
                contents.pending.clear()
        if operation.is_lasting:
            names = dict(there)
    directory = {name: chosen for name in {*names, *there} if (chosen := _chosen(names, there, name, rng))}
    share = float(rng.choice([0.0, 0.3, 0.7, 1.0]))
    piece = int(rng.choice([SECTOR_BYTES, 4096, 2**30]))
    return {name: bytes(_survivor(contents, share, piece, rng)) for name, contents in sorted(directory.items())}


def _chosen(
    names: dict[str, _Contents], there: dict[str, _Contents], name: str, rng: np.random.Generator
) -> _Contents | None:
    """The file of that name: as in the directory when it was synced, or as it is now."""
    old, new = names.get(name), there.get(name)
    return new if old is new or rng.random() < 0.5 else old


def _survivor(contents: _Contents, share: float, piece: int, rng: np.random.Generator) -> bytearray:
    survivor = bytearray(contents.safe)
    for pending in contents.pending:
        if pending.verb == "truncate":
            if rng.random() < share:
                _apply(survivor, pending)
            continue
        begin, end = pending.offset, pending.offset + len(pending.data)
        while begin < end:
            until = min(end, (begin // piece + 1) * piece)
            if rng.random() < share:
                part = pending.data[begin - pending.offset : until - pending.offset]
                _apply(survivor, Operation("write", pending.file, begin, part))
            begin = until
    return survivor


def _apply(contents: bytearray, operation: Operation) -> None:
    if operation.verb == "truncate":
        del contents[operation.offset :]
        return
    contents.extend(bytes(max(0, operation.offset - len(contents))))
    contents[operation.offset : operation.offset + len(operation.data)] = operation.data
