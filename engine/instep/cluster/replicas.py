"""The copy of a shard on another node: each transaction is there before anything is answered that rests on it.

A server sends the statements of its transactions, with their values, to a process of the other node, which holds the
copy. A copy begins while the server goes on: the tables are read and sent in portions. What is committed meanwhile is
sent after each portion, and rows that were read before or after it become right by that: every row that a transaction
changes is replaced or deleted by the last one that did so, and no other row has changed since it was read.

A server commits its own transaction first, so a copy never has more than the recording, unless the recording has lost
something.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final, NoReturn, TextIO
from urllib.parse import quote

import structlog

from instep.cluster.directory import DirectoryClient, write_json
from instep.cluster.rules import ShardRole
from instep.cluster.talk import Caller, Listener, NoAnswer, NodeRequest, Rejected
from instep.config import TransportConfig
from instep.frontends.shards import Shard
from instep.recording.database import SUFFIX, insertion, make_tables
from instep.recording.errors import RecordingError
from instep.recording.lock import WriterLock
from instep.recording.schema import TABLES, Column, Durability
from instep.recording.writer import SET_NEWEST, Statement, set_up
from instep.security.keys import ServerKeys
from instep.server.preparation import CannotServe
from instep_client.files import sync_folder
from instep_client.protocol.errors import InvalidInput

MAX_MESSAGE_BYTES: Final = 2**28
"""The longest transaction, and the most that may wait while a copy begins."""
_PORTION_BYTES: Final = 2**21
_ROW_BYTES: Final = 64
_AT_ONCE: Final = 16
"""Transactions that waited and that the copy commits together."""
_AHEAD_BYTES: Final = 2**22
_HELD_UP_S: Final = 0.06
"""While more than that waits for a copy that begins, each commit is delayed by this long, so that the copy catches up.
An answer may wait for two commits."""
_ROUNDS: Final = 3
"""How often a whole copy is sent what was committed meanwhile. The rest is sent while recorders wait."""
_WHOLE_S: Final = 30.0
"""The time in which all of a new copy is on the disk, and in its place."""
_AGAIN_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 30.0
_JOINING_FACTOR: Final = 10.0
"""A copy that is being made may take this many times as long for an answer, because nobody waits for it."""
_MOST_JOINING: Final = 2
"""How many copies the servers of a node make at the same time, because they share its disk."""
COMPLETE: Final = "complete.json"
"""Beside recordings: in which term, and since which start of the machine, they have all that they should have."""


# ── The server's side ──────────────────────────────────────────────────────────────────────────────────────────────


class CopiedShard:
    """The recordings in a shard's folder, and their copy on another node: a `SecondPlace`.

    Call `begin` before the recordings are opened, `start` when they are, and `follow` with each new role. The first
    server of a shard does not call `begin`: there is a recording before the directory is asked. Nothing waits for the
    directory or a copy except `begin`, the threads of recorders, and one of this object's.

    Args:
        shard: of which server this is; its `second_place` and `is_copied` are kept here.
        node: the name of this node.
        folder: with the recordings.
        directory: is asked in these threads.
        call: makes a connection to the copy that a role names; may raise InvalidInput.
        durability: of the recordings, and of the copy.
        log: gets a line when a copy begins to count, and when one is lost.
        timeout_s: a copy that does not answer for this long is lost.
    """

    def __init__(
        self,
        shard: Shard,
        node: str,
        folder: Path,
        directory: DirectoryClient,
        call: Callable[[ShardRole], Caller],
        durability: Durability,
        log: structlog.stdlib.BoundLogger,
        timeout_s: float = 2.0,
    ) -> None:
        self._shard, self._node, self._folder = shard, node, folder
        self._directory, self._call, self._durability = directory, call, durability
        self._log, self._timeout_s = log, timeout_s
        self._role = self._newest = ShardRole(shard.number, shard.term)
        """The role with the last attempt that was made, and the one that was told last."""
        self._told = threading.Event()
        self._changed = threading.Condition()
        """Held while a transaction is committed, here and there, and while what follows changes."""
        self._copies: dict[Caller, ShardRole] = {}
        """The copies that get each transaction: one that counts, one that is about to, or for a moment both."""
        self._waiting: list[tuple[str, Sequence[Statement]]] | None = None
        """Transactions that a copy which begins does not have yet; None while none begins, or if it cannot have all."""
        self._waiting_bytes = 0
        self._given: list[str] = []
        """The files that a copy which begins gets; the beginning of any other is not among the transactions."""
        self._failures = 0
        """Attempts that have failed since a copy was made."""
        self._tries_at = 0.0
        self._is_starting = False
        self._is_over = False
        """Whether another server may have begun."""
        shard.second_place = self

    def begin(self) -> None:
        """Ask for the role, and compare the recordings with a copy that counts.

        Raises:
            CannotServe: another node is to serve the shard.
        """
        settle(self._folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        note, boot = self._folder / COMPLETE, _boot()
        while (role := self._directory.begins(self._shard.number, self._shard.term, self._node)) is not None:
            theirs = self._positions_of_copy(role) if role.counts else {}
            # Until the machine is started again, a recording has all that was ever committed in it.
            if theirs is None and _read_note(note).get("boot") != boot:
                reason = "the recording may lack its end, and the copy, which counts, does not answer"
                self._log.warning("waiting for the copy", node=role.other, reason=reason)
                time.sleep(_AGAIN_S)
                continue
            own = positions(self._folder)
            if theirs and any(position > own.get(file, 0) for file, position in theirs.items()):
                self._directory.behind(role.shard, role.term, role.attempt)
                raise CannotServe(f"the copy of shard {role.shard} on {role.other} has more than the recording here")
            write_json(note, {"term": self._shard.term, "boot": boot})
            self._role = role
            return
        raise CannotServe(f"shard {self._shard.number} has had another server since term {self._shard.term}")

    def start(self) -> None:
        """Have a former copy dropped, before anything is answered, and follow roles from now on."""
        self._is_starting = True
        threading.Thread(target=self._follow, name="instep-copies", daemon=True).start()

    def follow(self, role: ShardRole) -> None:
        """Begin another copy if the role names one; called in any thread."""
        self._newest = role
        self._told.set()

    @property
    def is_used(self) -> bool:
        """Whether answers depend on more than the recordings here."""
        return bool(self._copies) or self._is_starting or self._role.needs_copy or self._is_over

    def commit(self, file: Path, statements: Sequence[Statement], here: Callable[[], object]) -> None:
        """Commit a transaction of a recording here, and in the copy.

        Raises:
            RecordingError: another node serves the shard.
        """
        with self._changed:
            here()  # first, so that a copy never has more
            if self._waiting is not None:
                self._waiting.append((file.name, statements))
                self._waiting_bytes += sum(_bytes_of(rows) for _, rows in statements)
                if self._waiting_bytes > MAX_MESSAGE_BYTES or file.name not in self._given:
                    self._waiting = None
                elif self._waiting_bytes > _AHEAD_BYTES:
                    self._changed.wait(_HELD_UP_S)
            self._commit_there((file.name, statements))
            self._check()

    def barrier(self) -> None:
        """Return once the copy, if there is one, has committed an empty transaction.

        Raises:
            RecordingError: another node serves the shard.
        """
        with self._changed:
            self._commit_there()
            self._check()

    def copy_wal(self, file: Path) -> None:
        """Have the copy do the same."""
        with self._changed, suppress(NoAnswer):
            for copy in self._copies:
                copy.send("copy_wal", file.name)

    def _commit_there(self, *transactions: tuple[str, Sequence[Statement]]) -> None:
        for copy in [*self._copies]:
            if copy not in self._copies:
                continue
            try:
                copy.ask("commit", transactions, within_s=self._timeout_s)
            except (NoAnswer, Rejected) as error:
                if copy is [*self._copies][-1]:
                    self._lose(self._copies, str(error))
                # a former copy ends once the directory has the new one in its place: `_give` hears of that soon
                while copy in self._copies:
                    self._changed.wait()

    def _check(self) -> None:
        """Return when something may be answered."""
        while self._is_starting or (self._role.needs_copy and not self._shard.is_copied and not self._is_over):
            self._changed.wait()
        if self._is_over:
            raise RecordingError(f"shard {self._role.shard} may have had another server since term {self._role.term}")

    def _lose(self, lost: dict[Any, ShardRole], reason: str) -> None:
        """Continue without copies once the directory has stored that; of two, it is not known here which counts."""
        for copy, role in reversed(lost.items()):
            if copy is not None:
                copy.close()
            self._log.warning("copy lost", node=role.other, reason=reason)
            self._drop(role)
        self._copies = {copy: role for copy, role in self._copies.items() if copy not in lost}
        self._say()

    def _drop(self, role: ShardRole) -> None:
        self._is_over |= not self._directory.dropped(role.shard, role.term, role.attempt)

    def _say(self) -> None:
        self._shard.is_copied = any(role.counts for role in self._copies.values())
        self._changed.notify_all()

    # In a thread of its own.

    def _follow(self) -> None:
        try:
            if not self._role.begun:
                self.begin()
            if self._role.counts:  # to give it everything would take longer than a restart
                self._log.info("copy ended", node=self._role.other, reason="the server begins; another copy is made")
                self._drop(self._role)
        except Exception as error:
            self._log.error("failed", reasons=str(error).splitlines())
            self._is_over = True
        with self._changed:
            self._is_starting = False
            self._say()
        while not self._is_over:
            self._told.wait(_AGAIN_S)
            self._told.clear()
            role = self._newest
            is_new = bool(role.address) and role.attempt > self._role.attempt
            if is_new and role.counts:
                with self._changed:
                    self._is_over = True  # another process of this term has begun
                    self._say()
            elif is_new and self._may_try() and (turn := _take_turn(self._folder.parent)) is not None:
                with self._changed:
                    self._role = role
                    self._say()
                with turn:
                    self._try(role)
            else:  # perhaps nothing is recorded, and the copies are lost
                with self._changed:
                    self._commit_there()

    def _may_try(self) -> bool:
        return time.monotonic() >= self._tries_at or (self._role.needs_copy and not self._copies)

    def _try(self, role: ShardRole) -> None:
        """Give a copy everything; if that fails, have the attempt dropped. The former copy is kept until then."""
        copy = None
        try:
            copy = self._call(role)
            self._give(copy, role)
            self._failures = 0
        except Exception as error:  # whatever it is, the server can continue without this copy
            self._failures += 1
            self._tries_at = time.monotonic() + min(_LONGEST_PAUSE_S, 2.0 ** min(self._failures, 6) - 2)
            with self._changed:
                self._waiting = None
                self._lose(self._copies if copy in self._copies else {copy: role}, str(error))

    def _give(self, copy: Caller, role: ShardRole) -> None:
        with self._changed:
            self._waiting, self._waiting_bytes = [], 0
            self._given = [file.name for file in _files(self._folder)]
        patience_s = _JOINING_FACTOR * self._timeout_s
        copy.ask("begin", role.term, role.attempt, self._durability, within_s=patience_s)
        for name in self._given:
            for portion in _portions(self._folder / name):
                copy.ask("commit", [(name, [portion])], within_s=patience_s)
                copy.send("copy_wal", name)
                self._catch_up(copy, patience_s)
        copy.ask("whole", within_s=max(_WHOLE_S, patience_s))
        for _ in range(_ROUNDS):
            self._catch_up(copy, patience_s)
        with self._changed:
            self._catch_up(copy, self._timeout_s)
            self._copies[copy], self._waiting = role, None
            self._say()
        if not self._directory.attached(role.shard, role.term, role.attempt):
            raise Rejected("the directory does not want it any more")
        with self._changed:
            if copy in self._copies:
                for former in self._copies.keys() - {copy}:
                    former.close()
                self._copies = {copy: role._replace(counts=True)}
                self._say()
                self._log.info("copied", node=role.other)

    def _catch_up(self, copy: Caller, within_s: float) -> None:
        """Send what was committed since the last call."""
        with self._changed:
            if self._waiting is None:
                raise Rejected("it takes less than is recorded, or another recording was begun")
            waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        for first in range(0, len(waiting), _AT_ONCE):
            copy.ask("commit", waiting[first : first + _AT_ONCE], within_s=within_s)

    def _positions_of_copy(self, role: ShardRole) -> dict[str, int] | None:
        with suppress(NoAnswer, Rejected, InvalidInput), closing(self._call(role)) as copy:
            return dict(copy.ask("positions", within_s=self._timeout_s))
        return None


def _take_turn(node: Path) -> TextIO | None:
    """A locked file in the folder of a node, whose closing gives the turn back; None while all turns are taken."""
    for number in range(_MOST_JOINING):
        with suppress(OSError):  # also of a full disk
            turn = (node / f".joining-{number}").open("w")
            try:
                fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                turn.close()
            else:
                return turn
    return None


def _portions(file: Path) -> Iterator[Statement]:
    """All rows of a recording, which may be written meanwhile; nothing is locked between two portions."""
    with closing(_read_only(file)) as database:
        yield insertion("header"), database.execute("SELECT * FROM header").fetchall()
        for table in TABLES:
            statement = SET_NEWEST if table == "newest" else insertion(table)
            ((last,),) = database.execute(f"SELECT ifnull(max(rowid), 0) FROM {table}")  # later rows are sent anyway
            after = -1
            while rows := _some_rows(database, table, after, last):
                after = rows[-1][0]
                yield statement, [row[1:] for row in rows]


def _some_rows(database: sqlite3.Connection, table: str, after: int, last: int) -> list[tuple[Any, ...]]:
    """Rows of about 2 MiB between two rowids; in each, its rowid comes first."""
    rows, size = [], 0
    query = f"SELECT rowid, * FROM {table} WHERE rowid > ? AND rowid <= ? ORDER BY rowid"
    with closing(database.execute(query, (after, last))) as found:
        while size < _PORTION_BYTES and (row := found.fetchone()):
            rows.append(row)
            size += _bytes_of([row])
    return rows


def _bytes_of(rows: Sequence[tuple[Column, ...]]) -> int:
    return sum(_ROW_BYTES + sum(len(value) for value in row if isinstance(value, (bytes, str))) for row in rows)


# ── Files ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def settle(folder: Path) -> None:
    """Complete what a process that held a copy in this folder was killed in; before anything looks into the folder."""
    if not folder.exists() and _beside(folder, "old").exists():
        _beside(folder, "old").rename(folder)


def positions(folder: Path) -> dict[str, int]:
    """The newest position of each recording in a folder, by file name; -1 if it cannot be read."""
    found = {}
    for file in _files(folder):
        found[file.name] = -1
        with suppress(sqlite3.Error, TypeError), closing(_read_only(file)) as database:
            (found[file.name],) = database.execute("SELECT position FROM newest").fetchone()
    return found


def term_of(folder: Path) -> int:
    """The term of the server that wrote the recordings in a folder; 0 if none has answered anything."""
    return int(_read_note(folder / COMPLETE).get("term", 0))


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}"))


def _read_only(file: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(file.absolute()))}?mode=ro", uri=True)


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")


def _read_note(file: Path) -> Any:
    return json.loads(file.read_text()) if file.exists() else {}


def _boot() -> str:
    """What identifies the time since the machine was started; different each time where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return str(time.time_ns())


# ── The copy's side ────────────────────────────────────────────────────────────────────────────────────────────────


def hold_copy(transport: TransportConfig, keys: ServerKeys | None, folder: Path, term: int) -> NoReturn:
    """Hold the copy of a shard's server of a term in a folder until this process is killed.

    Raises:
        CannotListen: when the endpoint cannot be bound.
    """
    listener = Listener(transport.model_copy(update={"max_message_bytes": MAX_MESSAGE_BYTES}), keys)
    copy = HeldCopy(folder, term)
    while True:
        copy.answer(listener, 1.0)


class HeldCopy:
    """The recordings of a shard that another node serves.

    A new copy is made in a folder of its own, and replaces the one before when it is whole. Only the sender of the
    newest attempt may change it; once one of its requests has been refused, it has to begin anew.
    """

    def __init__(self, folder: Path, term: int) -> None:
        settle(folder)
        self._term = term
        self._folder, self._new, self._old = folder, _beside(folder, "new"), _beside(folder, "old")
        self._sender = b""
        self._durability: Durability = "commit"
        self._files: dict[str, sqlite3.Connection] = {}
        self._locks: list[WriterLock] = []

    def answer(self, listener: Listener, within_s: float) -> None:
        """Answer the requests that come within a time."""
        for request in listener.requests(within_s):
            try:
                value = self.take(request)
            except Rejected as error:
                listener.refuse(request, str(error))
            else:
                listener.answer(request, value)

    def take(self, request: NodeRequest) -> Any:
        """Do what a server asks, and return the answer.

        Raises:
            Rejected: with a sentence.
        """
        is_sender = request.connection == self._sender
        try:
            match request.verb, request.arguments:
                case "positions", []:
                    return positions(self._folder)
                case "begin", [int(term), int(attempt), str(durability)]:
                    self._begin(term, attempt, durability)
                    self._sender = request.connection
                case "commit", [transactions] if is_sender:
                    self._commit(transactions)
                case "copy_wal", [name] if is_sender:
                    self._files[name].execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
                case "whole", [] if is_sender:
                    self._put_in_place()
                case _:
                    raise ValueError("another attempt to give the shard a copy has begun, or the request is unknown")
        except Exception as error:  # also of malformed messages, which end nothing else
            if is_sender:
                self.close()
            raise Rejected(str(error)) from None
        return True

    def close(self) -> None:
        """Close the files, and take nothing more of the present sender."""
        self._sender = b""
        for database in self._files.values():
            database.close()
        for lock in self._locks:
            lock.release()
        self._files, self._locks = {}, []

    def _begin(self, term: int, attempt: int, durability: Any) -> None:
        if term != self._term:
            raise ValueError(f"this is the copy of the server of term {self._term}, and not of {term}")
        for note in (_read_note(folder / COMPLETE) for folder in (self._folder, self._new)):
            if note.get("term") == term and note.get("attempt", 0) >= attempt:
                raise ValueError(f"attempt {note['attempt']} was seen before {attempt}")
        self.close()
        self._new.mkdir(exist_ok=True)
        write_json(self._new / COMPLETE, {"term": term, "attempt": attempt, "boot": _boot()})
        for file in self._new.glob(f"*{SUFFIX}*"):
            file.unlink()
        self._durability = durability

    def _commit(self, transactions: list[Any]) -> None:
        for name, statements in transactions:
            database = self._files.get(name) or self._make(name)
            for statement, rows in statements:
                database.executemany(statement.replace("INSERT", "REPLACE", 1), rows)
        for database in self._files.values():
            database.commit()

    def _make(self, name: str) -> sqlite3.Connection:
        if Path(name).name != name or not name.endswith(SUFFIX):
            raise ValueError(f"{name!r:.80} is not the name of a recording")
        with closing(sqlite3.connect(self._new / name)) as database:
            make_tables(database)
            database.execute("INSERT INTO newest VALUES (0, 0, 0)")
            database.commit()
        return self._open(self._new / name)

    def _open(self, file: Path) -> sqlite3.Connection:
        self._files[file.name] = database = sqlite3.connect(file)
        set_up(database, self._durability)
        return database

    def _put_in_place(self) -> None:
        names, sender = list(self._files), self._sender
        self.close()
        shutil.rmtree(self._old, ignore_errors=True)
        if self._folder.exists():
            self._folder.rename(self._old)
        self._new.rename(self._folder)
        sync_folder(self._folder.parent)
        for name in names:
            self._locks.append(lock := WriterLock(self._folder / name))
            lock.hold()
            self._open(self._folder / name)
        self._sender = sender
        shutil.rmtree(self._old, ignore_errors=True)
