"""A copy has each transaction before its server says that it is durable; which of the two may continue alone."""

from __future__ import annotations

import io
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from instep.cluster import copies
from instep.cluster.copies import CopiedShard, HeldCopy
from instep.cluster.rules import ShardRole
from instep.cluster.talk import Caller, Listener, NodeRequest, Rejected
from instep.config import TransportConfig
from instep.frontends.shards import Shard
from instep.models.folder import load_model
from instep.recording.errors import RecordingError
from instep.recording.inspection import inspect
from instep.recording.lock import is_being_written
from instep.recording.recorder import Recorder
from instep.recording.trim import Retention
from instep.recording.writer import RecordingWriter
from instep.replay.command import run
from instep.server.preparation import CannotServe
from instep_client.protocol.errors import InvalidInput
from tests.support.living import STREAMS, live, small_scribe
from tests.support.recordings import gru_description, gru_step, make_gru, make_header, record_gru
from tests.support.rows import open_stream
from tests.support.running import log_into
from tests.support.scribe import Scribe

TERM = 3
HEADER = make_header(gru_description(make_gru(3, 4)))


class Directory:
    """The directory of one shard; it answers while `is_there`."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.term, self.attempt, self.copy_attempt = TERM, 0, 0
        self.copy = self.joining = ""
        self.is_there = threading.Event()
        self.is_there.set()
        self.asked: list[tuple[str, int]] = []
        self.needs_copy = False

    def role(self) -> ShardRole:
        other, counts = self.joining or self.copy, bool(self.copy and not self.joining)
        address = self.endpoint if other else ""
        return ShardRole(0, self.term, True, other, address, counts, False, self.attempt, True, self.needs_copy)

    def join(self) -> ShardRole:
        """Give the shard another copy."""
        self.joining, self.attempt = "two", self.attempt + 1
        return self.role()

    def _note(self, what: str, attempt: int = 0) -> None:
        self.asked.append((what, attempt))
        assert self.is_there.wait(60)

    def begins(self, shard: int, term: int, node: str) -> ShardRole | None:
        self._note("begins")
        self.attempt = self.copy_attempt = self.attempt + 1
        return self.role() if term == self.term else None

    def attached(self, shard: int, term: int, attempt: int) -> bool:
        self._note("attached", attempt)
        if (term, attempt) != (self.term, self.attempt) or not (self.joining or self.copy):
            return False
        self.copy, self.joining, self.copy_attempt = self.joining or self.copy, "", attempt
        return True

    def dropped(self, shard: int, term: int, attempt: int) -> bool:
        self._note("dropped", attempt)
        if term == self.term and attempt == self.attempt:
            self.joining = ""
        if term == self.term and attempt == self.copy_attempt:
            self.copy = ""
        return term == self.term

    def behind(self, shard: int, term: int, attempt: int) -> bool:
        self._note("behind", attempt)
        return True


class Kit:
    """A server's side and the copy's, in one process: folders `one` and `two`."""

    def __init__(self, folder: Path) -> None:
        self.one, self.two = folder / "one", folder / "two"
        self.one.mkdir()
        self.directory = Directory()
        self.lines: list[Any] = []
        self.turn = threading.Lock()
        """Whoever holds it freezes the process with the copy."""
        self.shard = Shard(term=TERM)
        self.call: Callable[[str], Caller] = Caller
        self._ends = threading.Event()
        self._thread: threading.Thread | None = None

    def hold(self) -> None:
        """Begin the process with the copy, perhaps again."""
        self._ends.clear()
        listener, copy = Listener(TransportConfig(endpoint="tcp://127.0.0.1:0"), None), HeldCopy(self.two, TERM)
        self.directory.endpoint = listener.endpoint

        def answer() -> None:
            while not self._ends.is_set():
                with self.turn:
                    copy.answer(listener, 0.001)
                time.sleep(0.0005)
            copy.close()
            listener.close()

        self._thread = threading.Thread(target=answer)
        self._thread.start()

    def kill(self) -> None:
        """End the process with the copy."""
        if self._thread is not None:
            self._ends.set()
            self._thread.join()
        self._thread = None

    def copied(self, timeout_s: float = 30.0) -> CopiedShard:
        """What the server does first."""
        return CopiedShard(
            self.shard,
            "one",
            self.one,
            self.directory,
            lambda role: self.call(role.address),
            "commit",
            log_into(self.lines),
            timeout_s,
        )

    def write(self, copied: CopiedShard, name: str = "a.instep") -> Scribe:
        scribe = small_scribe(self.one, name)
        scribe.writer.commit()
        scribe.writer.second_place = self.shard.second_place
        return scribe

    def differences(self) -> list[str]:
        """Tables whose rows differ."""
        names = {file.name for folder in (self.one, self.two) for file in folder.glob("*.instep")}
        one, two = ({name: rows(folder / name) for name in names} for folder in (self.one, self.two))
        return [f"{name} {table}" for name in names for table in one[name] if one[name][table] != two[name][table]]


def rows(file: Path) -> dict[str, list[Any]]:
    with closing(sqlite3.connect(file)) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {table: sorted(database.execute(f"SELECT * FROM {table}"), key=repr) for table in tables}


@pytest.fixture
def kit(tmp_path: Path) -> Iterator[Kit]:
    made = Kit(tmp_path)
    made.hold()
    yield made
    made.directory.is_there.set()
    made.kill()


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@contextmanager
def beside(act: Callable[[], object]) -> Iterator[threading.Thread]:
    """Do something in a thread, which has ended when the block has."""
    thread = threading.Thread(target=act)
    thread.start()
    try:
        yield thread
    finally:
        thread.join(60)


def attach(kit: Kit, copied: CopiedShard) -> None:
    said = len(kit.lines)
    copied.follow(kit.directory.join())
    until(lambda: len(kit.lines) > said)
    assert kit.shard.is_copied, kit.lines


def test_the_rows_of_both_are_equal_whenever_a_copy_begins(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "_PORTION_BYTES", 1024)
    monkeypatch.setattr(copies, "_AHEAD_BYTES", 2048)
    monkeypatch.setattr(copies, "_HELD_UP_S", 0.001)
    monkeypatch.setattr(copies, "_AGAIN_S", 0.01)
    copied = kit.copied()
    copied.begin()
    copied.start()
    scribe = kit.write(copied)
    begun = 0
    for number in live(scribe, 10**6):
        if number % 50 == 0 and (kit.shard.is_copied or not begun):
            assert not begun or kit.differences() == []
            if begun == 5 and scribe.writer.trimmed.position:
                break
            begun += 1
            copied.follow(kit.directory.join())
        if number % 7 == 0:
            scribe.checkpoint(scribe.writer.position)
            scribe.writer.commit()
    assert kit.differences() == []
    scribe.writer.close()
    assert kit.differences() == []
    kit.kill()
    assert inspect(kit.two / "a.instep") == inspect(kit.one / "a.instep")


def test_both_are_verified(kit: Kit, tmp_path: Path) -> None:
    gru = make_gru(3, 4)
    model = record_gru(tmp_path, gru, [1])
    header = make_header(gru_description(gru), model_fingerprint=load_model(model.folder).fingerprint)
    copied = kit.copied()
    copied.begin()
    copied.start()
    writer = RecordingWriter.create(kit.one / "a.instep", header, Retention(keep_ns=300_000))
    writer.second_place = kit.shard.second_place
    scribe = Scribe(writer, gru_step(gru))
    for stream in STREAMS:
        scribe.open(stream)
    for number in live(scribe, 200):
        if number == 100:
            attach(kit, copied)
    writer.close()
    kit.kill()
    for folder in (kit.one, kit.two):
        console = Console(file=io.StringIO())
        assert run(folder / "a.instep", model_folder=model.folder, streams=[], json=False, console=console) == 0


def test_a_copy_never_has_what_its_server_has_not_committed(kit: Kit) -> None:
    copied = kit.copied()
    copied.begin()
    copied.start()
    scribe = kit.write(copied)
    attach(kit, copied)

    def fail() -> None:
        raise sqlite3.OperationalError("the disk is full")

    with pytest.raises(sqlite3.OperationalError):
        copied.commit(scribe.writer.path, [("UPDATE newest SET position = ?", [(10**6,)])], fail)
    kit.kill()
    assert kit.differences() == []


def test_a_file_that_is_new_is_in_the_next_copy(kit: Kit) -> None:
    copied = kit.copied()
    copied.begin()
    copied.start()
    kit.write(copied)
    attach(kit, copied)
    scribe = kit.write(copied, "b.instep")
    scribe.step(STREAMS)
    scribe.writer.commit()
    assert ("dropped", kit.directory.attempt) in kit.directory.asked
    assert not kit.shard.is_copied
    attach(kit, copied)
    assert kit.differences() == []
    assert {file.name for file in kit.two.glob("*.instep")} == {"a.instep", "b.instep"}


def test_a_file_that_is_begun_while_a_copy_is_made_is_in_the_next_one(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = kit.copied()
    copied.begin()
    copied.start()
    kit.write(copied)
    portions = copies._portions

    def meanwhile(file: Path) -> Iterator[Any]:
        if not (kit.one / "b.instep").exists():
            scribe = kit.write(copied, "b.instep")
            scribe.step(STREAMS)
            scribe.writer.commit()
        yield from portions(file)

    monkeypatch.setattr(copies, "_portions", meanwhile)
    copied.follow(kit.directory.join())
    until(lambda: kit.lines)
    assert not kit.shard.is_copied
    attach(kit, copied)
    assert kit.differences() == []


@pytest.mark.parametrize("end", ["frozen", "killed", "replaced"])
def test_a_server_whose_copy_is_lost_continues_once_the_directory_has_stored_that(kit: Kit, end: str) -> None:
    copied = kit.copied(timeout_s=4.0 if end == "frozen" else 1000.0)
    copied.begin()
    copied.start()
    scribe = kit.write(copied)
    attach(kit, copied)
    with ExitStack() as frozen:
        if end == "frozen":
            frozen.enter_context(kit.turn)
        else:
            kit.kill()
        if end == "replaced":
            kit.hold()  # it knows of no sender
        kit.directory.is_there.clear()
        scribe.step(STREAMS)
        lost = ("dropped", kit.directory.attempt)
        with beside(scribe.writer.commit) as committing:
            until(lambda: lost in kit.directory.asked)
            assert committing.is_alive()
            assert copied.is_used
            kit.directory.is_there.set()
        assert not copied.is_used
        assert not kit.shard.is_copied
        scribe.step(STREAMS)
        scribe.writer.commit()
    if end == "killed":
        kit.hold()
    attach(kit, copied)
    assert kit.differences() == []


def test_a_server_that_records_nothing_notices_that_its_copy_is_lost(kit: Kit) -> None:
    copied = kit.copied()
    copied.begin()
    copied.start()
    kit.write(copied)
    attach(kit, copied)
    kit.kill()
    until(lambda: not kit.shard.is_copied)
    assert ("dropped", kit.directory.attempt) in kit.directory.asked


@pytest.mark.parametrize("waits_for", ["commit", "barrier"])
def test_a_server_whose_term_is_over_ends(kit: Kit, waits_for: str) -> None:
    copied = kit.copied()
    copied.begin()
    copied.start()
    scribe = kit.write(copied)
    attach(kit, copied)
    kit.directory.term += 1
    kit.kill()  # as a node does that becomes the server
    failures, durable = list[Exception](), list[int]()
    recorder = Recorder(scribe.writer, 64, lambda: None, failures.append, durable.append)
    if waits_for == "commit":
        open_stream(recorder, 99, "late", 10**6, 0, 1, None)
    else:
        recorder.put(lambda writer: writer.barrier(), rows=0)
    until(lambda: failures)
    assert isinstance(failures[0], RecordingError)
    assert recorder.uses_second_place
    assert not durable


def without_its_key(address: str) -> Caller:
    raise InvalidInput("the file of peers does not have the node")


def test_a_node_gets_a_copy_once_its_key_is_known(kit: Kit) -> None:
    copied = kit.copied()
    copied.begin()
    copied.start()
    kit.write(copied)
    kit.call = without_its_key
    copied.follow(kit.directory.join())
    until(lambda: ("dropped", kit.directory.attempt) in kit.directory.asked)
    kit.call = Caller
    attach(kit, copied)


def test_an_attempt_that_the_directory_does_not_want_any_more_never_counts(kit: Kit) -> None:
    copied = kit.copied()
    copied.begin()
    copied.start()
    scribe = kit.write(copied)
    role = kit.directory.join()
    kit.directory.attempt += 1
    copied.follow(role)
    until(lambda: ("dropped", role.attempt) in kit.directory.asked)
    scribe.step(STREAMS)
    scribe.writer.commit()
    assert not kit.shard.is_copied
    attach(kit, copied)


def test_a_server_whose_term_ended_while_it_had_no_copy_ends_with_its_next_commit(kit: Kit) -> None:
    copied = kit.copied()
    copied.begin()
    copied.start()
    scribe = kit.write(copied)
    role = kit.directory.join()
    kit.directory.term += 1
    copied.follow(role)
    until(lambda: copied.is_used and ("dropped", role.attempt) in kit.directory.asked)
    scribe.step(STREAMS)
    with pytest.raises(RecordingError):
        scribe.writer.commit()


def test_a_copy_counts_once_the_directory_has_stored_that_and_stays_while_its_role_does(kit: Kit) -> None:
    copied = kit.copied()
    copied.begin()
    copied.start()
    scribe = kit.write(copied)
    kit.directory.is_there.clear()
    copied.follow(kit.directory.join())
    until(lambda: copied.is_used)
    scribe.step(STREAMS)
    scribe.writer.commit()
    assert not kit.shard.is_copied
    kit.directory.is_there.set()
    until(lambda: kit.shard.is_copied)
    copied.follow(kit.directory.role())
    time.sleep(0.1)
    assert kit.shard.is_copied
    assert kit.differences() == []
    assert not any(what == "dropped" for what, _ in kit.directory.asked)


@pytest.mark.parametrize("is_lost", [False, True])
def test_the_former_copy_counts_until_another_node_has_a_whole_one(
    kit: Kit, tmp_path: Path, is_lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit.directory.needs_copy = True
    copied = kit.copied()
    copied.begin()
    copied.start()
    scribe = kit.write(copied)
    attach(kit, copied)
    goes_on, portions = threading.Event(), copies._portions

    def slow(file: Path) -> Iterator[Any]:
        assert goes_on.wait(60)
        yield from portions(file)

    monkeypatch.setattr(copies, "_portions", slow)
    (tmp_path / "other").mkdir()
    other, said = Kit(tmp_path / "other"), len(kit.lines)
    other.hold()
    try:
        kit.directory.endpoint = other.directory.endpoint
        copied.follow(kit.directory.join())
        until((tmp_path / "other" / ".two.new").exists)
        scribe.step(STREAMS)
        scribe.writer.commit()
        assert kit.shard.is_copied
        assert kit.differences() == []
        if is_lost:
            other.kill()
        goes_on.set()
        until(lambda: len(kit.lines) > said)
        scribe.step(STREAMS)
        scribe.writer.commit()
        assert kit.shard.is_copied
        keeps = kit.two if is_lost else other.two
        assert rows(keeps / "a.instep") == rows(kit.one / "a.instep")
        dropped = [("dropped", kit.directory.attempt)]
        until(lambda: [each for each in kit.directory.asked if each[0] == "dropped"] == dropped * is_lost)
    finally:
        other.kill()


@pytest.mark.parametrize("fails", ["former", "new"])
def test_of_two_copies_that_are_waited_for_one_fails(kit: Kit, tmp_path: Path, fails: str) -> None:
    copied = kit.copied()
    copied.begin()
    copied.start()
    scribe = kit.write(copied)
    attach(kit, copied)
    former = kit.directory.attempt
    (tmp_path / "other").mkdir()
    other = Kit(tmp_path / "other")
    other.hold()
    try:
        kit.directory.endpoint = other.directory.endpoint
        kit.directory.is_there.clear()
        copied.follow(kit.directory.join())
        until(lambda: ("attached", former + 1) in kit.directory.asked)
        (other if fails == "new" else kit).kill()  # the former one by its agent, as soon as the directory has decided
        scribe.step(STREAMS)
        with beside(scribe.writer.commit) as committing:
            committing.join(0.2)
            assert committing.is_alive()
            kit.directory.is_there.set()
        dropped = [attempt for what, attempt in kit.directory.asked if what == "dropped"]
        if fails == "new":  # it is not known here whether it counts
            assert dropped[:2] == [former + 1, former]
            assert not kit.shard.is_copied
        else:
            assert dropped == []
            assert kit.shard.is_copied
            assert rows(other.two / "a.instep") == rows(kit.one / "a.instep")
    finally:
        other.kill()


def test_where_a_copy_is_needed_nothing_is_durable_without_one(kit: Kit) -> None:
    kit.directory.needs_copy = True
    copied = kit.copied()
    copied.begin()
    copied.start()
    scribe = kit.write(copied)
    scribe.step(STREAMS)
    with beside(scribe.writer.commit) as committing:
        time.sleep(0.05)
        assert committing.is_alive()
        assert copied.is_used
        copied.follow(kit.directory.join())
    assert kit.shard.is_copied
    assert kit.differences() == []


# A server that begins


def test_the_first_server_has_a_recording_when_it_asks(kit: Kit) -> None:
    copied = kit.copied()
    kit.write(copied).writer.commit()
    assert kit.directory.asked == []
    copied.start()
    assert kit.directory.asked == [("begins", 0)]
    attach(kit, copied)


def served_before(kit: Kit) -> None:
    """A server with a copy that counts was killed."""
    copied = kit.copied()
    copied.begin()
    copied.start()
    scribe = kit.write(copied)
    attach(kit, copied)
    scribe.step(STREAMS)
    scribe.writer.commit()
    scribe.writer.abandon()
    copied.close()
    kit.shard = Shard(term=TERM)


def test_a_server_that_begins_again_gives_its_copy_all_before_it_answers(kit: Kit) -> None:
    served_before(kit)
    with sqlite3.connect(kit.one / "a.instep") as database:
        database.execute("INSERT INTO events VALUES (99, 1, NULL, NULL, 'note', 'not in the copy', NULL, 0)")
    database.close()
    copied = kit.copied()
    copied.begin()
    copied.start()
    assert kit.shard.is_copied
    assert ("attached", kit.directory.attempt) in kit.directory.asked
    assert kit.differences() == []


@pytest.mark.parametrize("has", ["nothing", "less", "damage"])
def test_a_server_with_less_than_its_copy_has_does_not_begin(kit: Kit, has: str) -> None:
    served_before(kit)
    file = kit.one / "a.instep"
    if has == "nothing":
        file.unlink()
    elif has == "less":
        with closing(sqlite3.connect(file)) as database:
            database.execute("UPDATE newest SET position = position - 1")
            database.commit()
    else:
        file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(CannotServe):
        kit.copied().begin()
    assert kit.directory.asked[-1] == ("behind", kit.directory.attempt)


def test_a_server_of_an_earlier_term_does_not_begin(kit: Kit) -> None:
    kit.directory.term += 1
    with pytest.raises(CannotServe):
        kit.copied().begin()


@pytest.mark.parametrize("why", ["it is gone", "its key is not known", "the recording is large"])
def test_a_server_that_was_killed_continues_without_a_copy_that_does_not_answer(
    kit: Kit, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    served_before(kit)
    if why == "the recording is large":
        monkeypatch.setattr(copies, "_COPIED_FIRST_BYTES", 0)
    elif why == "it is gone":
        kit.kill()
    else:
        kit.call = without_its_key
    copied = kit.copied(timeout_s=0.2 if why == "it is gone" else 30.0)
    copied.begin()
    copied.start()
    assert kit.directory.asked[-1] == ("dropped", kit.directory.attempt)
    assert not copied.is_used


@pytest.mark.parametrize("why", ["the machine was started again", "the disk is empty"])
def test_a_server_that_may_have_lost_something_waits_for_its_copy(
    kit: Kit, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "_AGAIN_S", 0.01)
    served_before(kit)
    if why == "the disk is empty":
        shutil.rmtree(kit.one)
    else:
        monkeypatch.setattr(copies, "_boot", lambda: "another")
    kit.kill()
    copied = kit.copied(timeout_s=0.1)
    ended = list[str]()

    def begin() -> None:
        with suppress(CannotServe):
            copied.begin()
            ended.append("serves")

    with beside(begin) as beginning:
        until(lambda: kit.directory.asked[-3:] == [("begins", 0)] * 3)
        assert beginning.is_alive()
        kit.hold()
    assert ended == ([] if why == "the disk is empty" else ["serves"])
    assert not any(what == "dropped" for what, _ in kit.directory.asked)


# What a node takes as a copy


class Sender:
    """Sends to a copy what a server would, or should not."""

    def __init__(self, copy: HeldCopy, connection: bytes = b"one") -> None:
        self.copy, self.connection, self.number = copy, connection, 0

    def ask(self, verb: str, *arguments: Any) -> Any:
        self.number += 1
        return self.copy.take(NodeRequest(self.connection, self.number, verb, list(arguments), ""))

    def seed(self, attempt: int, file: str = "a.instep", term: int = TERM, position: int = 7) -> None:
        self.ask("begin", term, attempt, "commit")
        for key, value, crc in HEADER.rows():
            self.ask("write", file, [("INSERT INTO header VALUES (?, ?, ?)", [(key, value, crc)])])
        self.write(position)

    def write(self, position: int) -> None:
        self.ask("write", "a.instep", [("UPDATE newest SET position = ?", [(position,)])])
        assert self.ask("commit") is True


@pytest.fixture
def held(tmp_path: Path) -> Iterator[HeldCopy]:
    copy = HeldCopy(tmp_path / "two", TERM)
    yield copy
    copy.close()


def test_a_copy_takes_rising_attempts_only_also_after_its_process_was_killed(tmp_path: Path, held: HeldCopy) -> None:
    sender = Sender(held)
    sender.seed(attempt=5)
    sender.ask("whole")
    late = Sender(held, b"late")
    for attempt, term in ((4, TERM), (5, TERM), (6, TERM - 1)):
        with pytest.raises(Rejected):
            late.ask("begin", term, attempt, "commit")
    sender.write(8)
    held.close()
    with closing(HeldCopy(tmp_path / "two", TERM)) as again:
        with pytest.raises(Rejected):
            Sender(again).ask("begin", TERM, 5, "commit")
        assert Sender(again).ask("positions") == {"a.instep": 8}
        Sender(again).seed(attempt=6)
    with closing(HeldCopy(tmp_path / "two", TERM + 1)) as next_term:
        with pytest.raises(Rejected):
            Sender(next_term).ask("begin", TERM, 7, "commit")
        Sender(next_term).ask("begin", TERM + 1, 1, "commit")  # of a directory whose store was lost


def test_a_copy_takes_only_the_next_message_of_the_newest_attempt(held: HeldCopy) -> None:
    former, sender = Sender(held, b"former"), Sender(held)
    former.seed(attempt=1)
    sender.seed(attempt=2)
    with pytest.raises(Rejected):
        former.write(8)
    sender.write(8)
    sender.ask("whole")
    sender.number += 1  # a message was lost, as when ZeroMQ connects again
    with pytest.raises(Rejected):
        sender.write(9)
    with pytest.raises(Rejected):
        sender.write(10)
    assert sender.ask("positions") == {"a.instep": 8}


def test_the_old_copy_stays_until_the_new_one_is_whole(tmp_path: Path, held: HeldCopy) -> None:
    Sender(held).seed(attempt=1)
    assert Sender(held).ask("positions") == {}
    sender = Sender(held)
    sender.seed(attempt=2)
    sender.ask("whole")
    sender.write(8)
    Sender(held).seed(attempt=3, position=9)
    assert sender.ask("positions") == {"a.instep": 8}
    held.close()
    two = tmp_path / "two"
    two.rename(tmp_path / ".two.old")  # killed between the two renames
    assert Sender(HeldCopy(two, TERM)).ask("positions") == {"a.instep": 8}


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("write", ["a.instep", [("UPDATE nothing SET x = 1", [()])]]),
        ("write", ["a.instep", [("ATTACH 'x' AS y", [()])]]),
        ("write", ["a.instep", 7]),
        ("write", ["../a.instep", []]),
        ("write", ["other.instep", []]),
        ("write", []),
        ("whole", [1]),
        ("shutdown", []),
        ("begin", ["x", None, 7]),
    ],
)
def test_what_cannot_be_applied_ends_the_attempt_and_nothing_else(
    held: HeldCopy, tmp_path: Path, verb: str, arguments: list[Any]
) -> None:
    sender = Sender(held)
    sender.seed(attempt=1)
    sender.ask("whole")
    with pytest.raises(Rejected):
        sender.ask(verb, *arguments)
    with pytest.raises(Rejected):
        sender.write(8)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".two.json", "two"]
    sender.seed(attempt=2)
    sender.ask("whole")
    assert sender.ask("positions") == {"a.instep": 7}


def test_nobody_else_writes_what_is_held(held: HeldCopy, tmp_path: Path) -> None:
    sender = Sender(held)
    sender.seed(attempt=1)
    sender.ask("whole")
    assert is_being_written(tmp_path / "two" / "a.instep")
