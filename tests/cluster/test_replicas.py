"""A copy has each transaction before its server says that it is durable; which of the two may continue alone."""

from __future__ import annotations

import io
import json
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from instep.cluster import replicas
from instep.cluster.directory import DirectoryClient
from instep.cluster.replicas import COMPLETE, CopiedShard, HeldCopy
from instep.cluster.rules import ShardRole
from instep.cluster.talk import Caller, Listener, NodeRequest, Rejected
from instep.config import TransportConfig
from instep.frontends.shards import Shard
from instep.models.folder import load_model
from instep.recording.database import DatabaseLimits
from instep.recording.errors import RecordingError
from instep.recording.inspection import inspect
from instep.recording.lock import is_being_written
from instep.recording.recorder import Recorder
from instep.recording.trim import Retention
from instep.recording.writer import RecordingWriter
from instep.replay.command import run
from instep.server.preparation import CannotServe
from instep_client.protocol.errors import InvalidInput
from tests.cluster.cluster import rows_in
from tests.support.living import STREAMS, live, small_scribe
from tests.support.recordings import gru_description, gru_step, make_gru, make_header, record_gru
from tests.support.rows import open_stream
from tests.support.running import log_into
from tests.support.scribe import Scribe

TERM = 3
HEADER = make_header(gru_description(make_gru(3, 4)))


class Directory(DirectoryClient):
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

    def has_been_asked(self, what: str) -> bool:
        return (what, self.attempt) in self.asked

    def _note(self, what: str, attempt: int = 0) -> None:
        self.asked.append((what, attempt))
        assert self.is_there.wait(60)

    def begins(self, shard: int, term: int, node: str) -> ShardRole | None:
        self._note("begins")
        role = self.role()._replace(attempt=self.attempt + 1)
        self.attempt = self.copy_attempt = role.attempt
        return role if term == self.term else None

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


class Holder:
    """A process with a copy, in a thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.endpoint = ""
        self.turn = threading.Lock()
        """Whoever holds it freezes the process."""
        self._ends = threading.Event()
        self._thread = threading.Thread()

    def start(self) -> None:
        self._ends.clear()
        listener, copy = Listener(TransportConfig(endpoint="tcp://127.0.0.1:0"), None), HeldCopy(self.folder, TERM)
        self.endpoint = listener.endpoint

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
        self._ends.set()
        if self._thread.is_alive():
            self._thread.join()


class Link(Caller):
    """The server's connection to a copy."""

    def __init__(self, endpoint: str, before: Callable[[str], object]) -> None:
        super().__init__(endpoint)
        self._before = before

    def ask(self, verb: str, *arguments: Any, within_s: float) -> Any:
        self._before(verb)
        return super().ask(verb, *arguments, within_s=within_s)


class Kit:
    """A shard's server with its recordings in the folder `one`, and a node for the copy, `two`."""

    def __init__(self, folder: Path) -> None:
        self.one, self.holder = folder / "one", Holder(folder / "two")
        self.directory = Directory()
        self.lines: list[Any] = []
        self.before: Callable[[str], object] = lambda verb: None
        """Called before the server asks a copy; it may raise what a connection raises."""
        self._links: list[Link] = []

    def hold(self) -> None:
        self.holder.start()
        self.directory.endpoint = self.holder.endpoint

    def make(self, timeout_s: float = 30.0) -> None:
        """A process of the server, which has not asked anything."""
        self.shard = Shard(term=TERM)
        log = log_into(self.lines)
        self.copied = CopiedShard(self.shard, "one", self.one, self.directory, self._call, "commit", log, timeout_s)

    def _call(self, role: ShardRole) -> Caller:
        self._links.append(Link(role.address, self.before))
        return self._links[-1]

    def replace(self) -> None:
        """Tell the process of the server that there is a later one, which ends it."""
        self.copied.follow(self.directory.role()._replace(address="somewhere", counts=True, attempt=10**6))

    def end(self) -> None:
        """End the process of the server."""
        self.replace()
        for thread in threading.enumerate():
            if thread.name == "instep-copies":
                thread.join(60)
        while self._links:
            self._links.pop().close()

    def serve(self, timeout_s: float = 30.0) -> Scribe:
        """The first server, with streams in a recording."""
        self.one.mkdir()
        self.make(timeout_s)
        scribe = self.write()
        self.copied.start()
        return scribe

    def write(self, name: str = "a.instep") -> Scribe:
        scribe = small_scribe(self.one, name)
        scribe.writer.commit()
        scribe.writer.second_place = self.copied
        return scribe

    def join(self) -> None:
        until(lambda: self.directory.attempt)
        self.copied.follow(self.directory.join())

    def attach(self) -> None:
        said = len(self.lines)
        self.join()
        until(lambda: len(self.lines) > said)
        assert self.shard.is_copied, self.lines

    def check(self, folder: Path | None = None) -> None:
        """The rows of recordings and copies are equal."""
        assert rows_in(self.one) == rows_in(folder or self.two) != {}

    @property
    def two(self) -> Path:
        return self.holder.folder

    def dropped(self) -> list[int]:
        """The attempts that the server had dropped."""
        return [attempt for what, attempt in self.directory.asked if what == "dropped"]


@pytest.fixture
def kit(tmp_path: Path) -> Iterator[Kit]:
    made = Kit(tmp_path)
    made.hold()
    yield made
    made.directory.is_there.set()
    made.end()
    made.holder.kill()


@pytest.fixture
def third(tmp_path: Path) -> Iterator[Holder]:
    """Another node that can have a copy."""
    holder = Holder(tmp_path / "third")
    holder.start()
    yield holder
    holder.kill()


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


def step(scribe: Scribe) -> None:
    scribe.step(STREAMS)
    scribe.writer.commit()


def test_the_rows_of_both_are_equal_whenever_a_copy_begins(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "_PORTION_BYTES", 1024)
    monkeypatch.setattr(replicas, "_AHEAD_BYTES", 2048)
    monkeypatch.setattr(replicas, "_HELD_UP_S", 0.001)
    scribe = kit.serve()
    begun = 0
    for number in live(scribe, 20_000):
        if number % 50 == 0 and (kit.shard.is_copied or not begun):
            if begun:
                kit.check()
            if begun == 5 and scribe.writer.trimmed.position:
                break
            begun += 1
            kit.join()
        if number % 7 == 0:
            scribe.checkpoint(scribe.writer.position)
            scribe.writer.commit()
    assert begun == 5
    kit.check()
    scribe.writer.close()
    kit.check()
    kit.holder.kill()
    assert inspect(kit.two / "a.instep") == inspect(kit.one / "a.instep")


def test_both_are_verified(kit: Kit, tmp_path: Path) -> None:
    kit.serve()
    gru = make_gru(3, 4)
    model = record_gru(tmp_path, gru, [1])
    header = make_header(gru_description(gru), model_fingerprint=load_model(model.folder).fingerprint)
    writer = RecordingWriter.create(kit.one / "b.instep", header, Retention(keep_ns=300_000))
    writer.second_place = kit.copied
    scribe = Scribe(writer, gru_step(gru))
    for stream in STREAMS:
        scribe.open(stream)
    for number in live(scribe, 200):
        if number == 100:
            kit.attach()
    writer.close()
    kit.holder.kill()
    for folder in (kit.one, kit.two):
        console = Console(file=io.StringIO())
        assert run([folder / "b.instep"], model.folder, [], console) == 0


def test_a_copy_never_has_what_its_server_has_not_committed(kit: Kit) -> None:
    scribe = kit.serve()
    kit.attach()

    def fail() -> None:
        raise sqlite3.OperationalError("the disk is full")

    with pytest.raises(sqlite3.OperationalError):
        kit.copied.commit(scribe.writer.path, [("UPDATE newest SET position = ?", [(10**6,)])], fail)
    kit.holder.kill()
    kit.check()


def test_the_wal_of_a_copy_is_used_again(kit: Kit) -> None:
    kit.serve()
    writer = RecordingWriter.create(kit.one / "b.instep", HEADER, limits=DatabaseLimits(wal_bytes=2**17))
    writer.second_place = kit.copied
    kit.attach()
    for _ in range(100):
        writer.event(1, "note", None, "x" * 2**15)
        writer.commit()
        writer.copy_wal()
    assert (kit.two / "b.instep-wal").stat().st_size < 2**20
    kit.check()


@pytest.mark.parametrize("is_meanwhile", [False, True])
def test_a_file_that_is_new_is_in_the_next_copy(kit: Kit, is_meanwhile: bool) -> None:
    kit.serve()
    new = threading.Event()

    def write(verb: str) -> None:
        if verb == "whole" and not new.is_set():
            new.set()
            step(kit.write("b.instep"))

    if is_meanwhile:
        kit.before = write
        kit.join()
        until(lambda: kit.lines)
    else:
        kit.attach()
        step(kit.write("b.instep"))
    assert kit.directory.has_been_asked("dropped")
    assert not kit.shard.is_copied
    kit.attach()
    kit.check()


def test_a_copy_that_is_being_made_may_take_longer_than_one_that_counts(kit: Kit) -> None:
    frozen = False

    def freeze(verb: str) -> None:
        nonlocal frozen
        if verb == "commit" and not frozen:
            frozen = True
            kit.holder.turn.acquire()
            threading.Timer(2.5, kit.holder.turn.release).start()

    kit.serve(timeout_s=2.0)
    kit.before = freeze
    kit.attach()
    assert frozen


def test_a_node_makes_two_copies_at_a_time(tmp_path: Path) -> None:
    goes_on, begun = threading.Event(), list[int]()

    def begin(number: int, verb: str) -> None:
        if verb == "begin":
            begun.append(number)
        assert goes_on.wait(60)

    kits = [Kit(tmp_path) for _ in range(3)]
    for number, kit in enumerate(kits):
        kit.one, kit.holder = tmp_path / f"one-{number}", Holder(tmp_path / f"two-{number}")
        kit.hold()
        kit.serve()
        kit.before = partial(begin, number)
        kit.join()
        if number < 2:
            until(lambda: len(begun) > number)  # noqa: B023  # it is called at once
    time.sleep(0.1)  # in which the third could begin
    assert begun == [0, 1]
    goes_on.set()
    until(lambda: all(kit.shard.is_copied for kit in kits))
    for kit in kits:
        kit.replace()
    for kit in kits:
        kit.end()
        kit.holder.kill()


@pytest.mark.parametrize("end", ["frozen", "killed", "replaced"])
def test_a_server_whose_copy_is_lost_continues_once_the_directory_has_stored_that(kit: Kit, end: str) -> None:
    scribe = kit.serve(timeout_s=4.0 if end == "frozen" else 1000.0)
    kit.attach()
    with ExitStack() as frozen:
        if end == "frozen":
            frozen.enter_context(kit.holder.turn)
        else:
            kit.holder.kill()
        if end == "replaced":
            kit.hold()  # it knows of no sender
        kit.directory.is_there.clear()
        with beside(partial(step, scribe)) as committing:
            until(lambda: kit.directory.has_been_asked("dropped"))
            assert committing.is_alive()
            assert kit.copied.is_used
            kit.directory.is_there.set()
        assert not kit.copied.is_used
        assert not kit.shard.is_copied
        step(scribe)
    if end == "killed":
        kit.hold()
    kit.attach()
    kit.check()


def test_a_server_that_records_nothing_notices_that_its_copy_is_lost(kit: Kit) -> None:
    kit.serve()
    kit.attach()
    kit.holder.kill()
    until(lambda: not kit.shard.is_copied)
    assert kit.directory.has_been_asked("dropped")


@pytest.mark.parametrize("waits_for", ["commit", "barrier"])
def test_a_server_whose_term_is_over_ends(kit: Kit, waits_for: str) -> None:
    scribe = kit.serve()
    kit.attach()
    kit.directory.term += 1
    kit.holder.kill()  # as a node does that becomes the server
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


def without_its_key(verb: str) -> None:
    raise InvalidInput("the file of peers does not have the node")


def test_a_node_gets_a_copy_once_its_key_is_known(kit: Kit) -> None:
    kit.serve()
    kit.before = without_its_key
    kit.join()
    until(lambda: kit.directory.has_been_asked("dropped"))
    kit.before = lambda verb: None
    kit.attach()


@pytest.mark.parametrize("is_over", [False, True])
def test_an_attempt_that_the_directory_does_not_want_any_more_never_counts(kit: Kit, is_over: bool) -> None:
    scribe = kit.serve()
    until(lambda: kit.directory.attempt)
    role = kit.directory.join()
    kit.directory.attempt += 1
    kit.directory.term += is_over
    kit.copied.follow(role)
    until(lambda: role.attempt in kit.dropped())
    if is_over:
        with pytest.raises(RecordingError):
            step(scribe)
        return
    step(scribe)
    assert not kit.shard.is_copied
    kit.attach()


def test_a_copy_counts_once_the_directory_has_stored_that_and_stays_while_its_role_does(kit: Kit) -> None:
    scribe = kit.serve()
    until(lambda: kit.directory.attempt)
    kit.directory.is_there.clear()
    kit.join()
    until(lambda: kit.directory.has_been_asked("attached"))
    step(scribe)
    assert not kit.shard.is_copied
    kit.directory.is_there.set()
    until(lambda: kit.shard.is_copied)
    kit.copied.follow(kit.directory.role())
    step(scribe)
    assert kit.shard.is_copied
    kit.check()
    assert kit.dropped() == []


@pytest.mark.parametrize("is_lost", [False, True])
def test_the_former_copy_counts_until_another_node_has_a_whole_one(kit: Kit, third: Holder, is_lost: bool) -> None:
    kit.directory.needs_copy = True
    scribe = kit.serve()
    kit.attach()
    goes_on, said = threading.Event(), len(kit.lines)
    kit.before = lambda verb: verb == "whole" and goes_on.wait(60)
    kit.directory.endpoint = third.endpoint
    kit.join()
    until((third.folder.parent / ".third.new").exists)
    step(scribe)
    assert kit.shard.is_copied
    kit.check()
    if is_lost:
        third.kill()
    goes_on.set()
    until(lambda: len(kit.lines) > said)
    step(scribe)
    assert kit.shard.is_copied
    kit.check(kit.two if is_lost else third.folder)
    until(lambda: kit.dropped() == [kit.directory.attempt] * is_lost)


@pytest.mark.parametrize("fails", ["former", "new"])
def test_of_two_copies_that_are_waited_for_one_fails(kit: Kit, third: Holder, fails: str) -> None:
    scribe = kit.serve()
    kit.attach()
    former = kit.directory.attempt
    kit.directory.endpoint = third.endpoint
    kit.directory.is_there.clear()
    kit.join()
    until(lambda: kit.directory.has_been_asked("attached"))
    (third if fails == "new" else kit.holder).kill()  # the former one by its agent, once the directory has decided
    with beside(partial(step, scribe)) as committing:
        committing.join(0.2)
        assert committing.is_alive()
        kit.directory.is_there.set()
    if fails == "new":  # it is not known here whether it counts
        assert kit.dropped()[:2] == [former + 1, former]
        assert not kit.shard.is_copied
    else:
        assert kit.dropped() == []
        assert kit.shard.is_copied
        kit.check(third.folder)


def test_where_a_copy_is_needed_nothing_is_durable_without_one(kit: Kit) -> None:
    kit.directory.needs_copy = True
    scribe = kit.serve()
    with beside(partial(step, scribe)) as committing:
        time.sleep(0.05)
        assert committing.is_alive()
        assert kit.copied.is_used
        kit.join()
    assert kit.shard.is_copied
    kit.check()


# A server that begins


def test_the_first_server_has_a_recording_when_it_asks_and_answers_nothing_before(kit: Kit) -> None:
    kit.directory.is_there.clear()
    scribe = kit.serve()
    with beside(partial(step, scribe)) as committing:
        until(lambda: kit.directory.asked == [("begins", 0)])
        assert committing.is_alive()
        assert kit.copied.is_used
        kit.directory.is_there.set()
    kit.attach()
    kit.check()


def served_before(kit: Kit) -> None:
    """A server with a copy that counts was killed."""
    scribe = kit.serve()
    kit.attach()
    step(scribe)
    scribe.writer.abandon()
    kit.end()
    kit.make()


@pytest.mark.parametrize("copy", ["answers", "is gone", "has no key"])
def test_a_server_that_begins_again_has_its_copy_dropped_before_it_answers(kit: Kit, copy: str) -> None:
    served_before(kit)
    if copy == "is gone":
        kit.holder.kill()
        kit.make(timeout_s=0.2)
    elif copy == "has no key":
        kit.before = without_its_key
    kit.copied.begin()
    writer = RecordingWriter.resume(kit.one / "a.instep", HEADER)
    writer.second_place = kit.copied
    kit.directory.is_there.clear()
    kit.copied.start()
    with beside(writer.commit) as committing:
        until(lambda: kit.directory.has_been_asked("dropped"))
        assert committing.is_alive()
        kit.directory.is_there.set()
    assert not kit.copied.is_used
    assert not any(line["level"] == "warning" for line in kit.lines)
    if copy == "answers":
        kit.attach()
        kit.check()


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
        kit.copied.begin()
    assert kit.directory.asked[-1] == ("behind", kit.directory.attempt)


@pytest.mark.parametrize("is_first", [False, True])
def test_a_server_of_an_earlier_term_does_not_begin(kit: Kit, is_first: bool) -> None:
    kit.directory.term += 1
    if is_first:
        with pytest.raises(RecordingError):
            step(kit.serve())
    else:
        kit.make()
        with pytest.raises(CannotServe):
            kit.copied.begin()


@pytest.mark.parametrize("is_empty", [False, True])
def test_a_server_that_may_have_lost_something_waits_for_its_copy(kit: Kit, is_empty: bool) -> None:
    served_before(kit)
    if is_empty:
        shutil.rmtree(kit.one)
    else:
        (kit.one / COMPLETE).write_text(json.dumps({"term": TERM, "boot": "before the machine was started again"}))
    kit.holder.kill()
    kit.make(timeout_s=0.1)
    with ThreadPoolExecutor() as pool:
        beginning = pool.submit(kit.copied.begin)
        until(lambda: kit.directory.asked[-2:] == [("begins", 0)] * 2)
        assert not beginning.done()
        kit.hold()
    assert isinstance(beginning.exception(), CannotServe) == is_empty
    assert kit.dropped() == []


# What a node takes as a copy


def at(position: int) -> list[Any]:
    """A transaction."""
    return [("a.instep", [("UPDATE newest SET position = ?", [(position,)])])]


class Sender:
    """Sends to a copy what a server would, or should not."""

    def __init__(self, copy: HeldCopy, connection: bytes = b"one") -> None:
        self.copy, self.connection = copy, connection

    def ask(self, verb: str, *arguments: Any) -> Any:
        return self.copy.take(NodeRequest(self.connection, 1, verb, list(arguments), ""))

    def seed(self, attempt: int, file: str = "a.instep", position: int = 7) -> None:
        self.ask("begin", TERM, attempt, "commit")
        header = [("INSERT INTO header VALUES (?, ?, ?)", list(HEADER.rows()))]
        self.ask("commit", [(file, header)])
        self.write(position)

    def write(self, position: int) -> None:
        self.ask("commit", at(position))

    def is_refused(self, verb: str, *arguments: Any) -> bool:
        with pytest.raises(Rejected):
            self.ask(verb, *arguments)
        return True


@pytest.fixture
def held(tmp_path: Path) -> Iterator[HeldCopy]:
    copy = HeldCopy(tmp_path / "two", TERM)
    yield copy
    copy.close()


def test_a_copy_takes_rising_attempts_only_also_after_its_process_was_killed(tmp_path: Path, held: HeldCopy) -> None:
    sender = Sender(held)
    sender.seed(attempt=5)
    for attempt, term in ((4, TERM), (5, TERM), (6, TERM - 1)):
        assert Sender(held, b"late").is_refused("begin", term, attempt, "commit")
    sender.ask("whole")
    assert Sender(held, b"late").is_refused("begin", TERM, 5, "commit")
    sender.write(8)
    held.close()
    with closing(HeldCopy(tmp_path / "two", TERM)) as again:
        assert Sender(again).is_refused("begin", TERM, 5, "commit")
        assert Sender(again).ask("positions") == {"a.instep": 8}
        Sender(again).seed(attempt=6)
    with closing(HeldCopy(tmp_path / "two", TERM)) as again:
        assert Sender(again).is_refused("begin", TERM, 6, "commit")
    with closing(HeldCopy(tmp_path / "two", TERM + 1)) as next_term:
        assert Sender(next_term).is_refused("begin", TERM, 7, "commit")
        Sender(next_term).ask("begin", TERM + 1, 1, "commit")  # of a directory whose store was lost


def test_a_copy_takes_nothing_of_a_former_attempt(held: HeldCopy) -> None:
    former, sender = Sender(held, b"former"), Sender(held)
    former.seed(attempt=1)
    sender.seed(attempt=2)
    assert former.is_refused("commit", at(8))
    sender.write(9)
    sender.ask("whole")
    assert former.is_refused("whole")
    assert sender.ask("positions") == {"a.instep": 9}


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
        ("commit", [[("a.instep", [("UPDATE nothing SET x = 1", [()])])]]),
        ("commit", [[("a.instep", [("ATTACH 'x' AS y", [()])])]]),
        ("commit", [[("a.instep", 7)]]),
        ("commit", [[("../a.instep", [])]]),
        ("commit", [[("other.instep", [])]]),
        ("copy_wal", ["other.instep"]),
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
    assert sender.is_refused(verb, *arguments)
    assert sender.is_refused("commit", at(8))
    assert [file.name for file in tmp_path.iterdir()] == ["two"]
    sender.seed(attempt=2)
    sender.ask("whole")
    assert sender.ask("positions") == {"a.instep": 7}


def test_nobody_else_writes_what_is_held(held: HeldCopy, tmp_path: Path) -> None:
    sender = Sender(held)
    sender.seed(attempt=1)
    sender.ask("whole")
    assert is_being_written(tmp_path / "two" / "a.instep")
