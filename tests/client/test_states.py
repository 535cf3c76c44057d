"""Resuming by name, and looking at, resetting and copying states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from instep_client.connection import Call
from instep_client.protocol.codes import Code
from instep_client.protocol.errors import (
    ClientClosed,
    DataLoss,
    InvalidInput,
    StreamEvicted,
    StreamRefused,
)
from instep_client.protocol.wire import CLAIM, Kind
from tests.support.fake_server import RING_INFO, evicted, reference, welcome
from tests.support.session_link import X, headers, lasting
from tests.support.states import floats_of, gru_state

STATE = np.array([[1, 2], [3, 4]], np.float32)


class TestResume:
    def test_its_bytes(self) -> None:
        link = lasting()
        link.session.resume(["a", "b"], [3, 4], 5, True, False)
        link.advance()
        [message] = link.to_server
        assert headers([message]) == [[Kind.RESUME, 2, 2, 1]]
        assert message[1] == b"a\nb"
        assert np.frombuffer(message[2], CLAIM).tolist() == [(3, 5), (4, 5)]

    @pytest.mark.parametrize(("have", "first"), [(None, 4), (2, 2), (4, 4)])
    def test_another_process_goes_on_where_its_outputs_end(self, have: int | None, first: int) -> None:
        link = lasting()
        handle = link.open("a")
        link.finish(link.session.step(handle, X[:4]))
        other = lasting(rules=link.rules, name="other")
        taken = other.finish(other.session.resume(["a"], have, 0, True, True))
        assert other.session.table.next_seqs(taken).tolist() == [first]
        outputs = other.finish(other.session.step(taken, X[first:7])).outputs
        assert outputs.tolist() == reference(X[:7])[0][first:].tolist()
        step = link.session.step(handle, X[4])
        link.run(step)
        assert isinstance(step.error, StreamEvicted)

    @pytest.mark.parametrize(
        ("name", "have", "epoch", "error", "code"),
        [
            ("none", None, 0, StreamRefused, Code.UNKNOWN_STREAM),
            ("a", None, 0, StreamRefused, Code.FENCED),
            ("a", 9, 2**63, DataLoss, Code.DATA_LOSS),
        ],
    )
    def test_refusals(self, name: str, have: int | None, epoch: int, error: Any, code: Code) -> None:
        link = lasting()
        link.finish(link.session.step(link.open("a"), X[:4]))
        resume = link.session.resume([name], have, epoch, False, True)
        link.run(resume)
        assert isinstance(resume.error, error)
        assert resume.error.code is code
        assert ("take_over=True" in str(resume.error)) == (code is Code.FENCED)  # what can be done about it

    def test_a_group_is_given_whole_or_not(self) -> None:
        link = lasting()
        link.open("a", "b")
        other = lasting(rules=link.rules, name="other")
        resume = other.session.resume(["a", "none"], None, 0, True, False)
        other.run(resume)
        assert isinstance(resume.error, StreamRefused)
        assert resume.error.stream == "none"
        assert set(link.rules.streams) == {"a", "b"}  # what was there before is not closed
        assert len(other.finish(other.session.resume(["a", "b"], None, 0, True, False)).rows) == 2


class TestStates:
    def test_a_state_is_read_with_its_seq(self) -> None:
        link = lasting()
        group = link.open("a", "b")
        link.finish(link.session.step(group, X[:2].reshape(2, 1, 3), rows=[1]))
        seqs, states = link.finish(link.session.read_state(group))
        assert seqs.tolist() == [0, 2]
        assert floats_of(states, 2, 2)[1].tolist() == reference(X[:2])[1].tolist()

    def test_a_swap_between_two_answers_has_all_states_read_again(self) -> None:
        large = gru_state(2, 75)  # so that a message is about one stream
        link = lasting(replace(RING_INFO, state=large, max_message_bytes=large.row_bytes))
        read = link.session.read_state(link.open("a", "b"))
        link.advance()
        link.serve(1)
        link.deliver()
        link.rules.info = replace(link.rules.info, state=gru_state(3, 2))
        for number, name in enumerate("ab"):
            link.rules.streams[name].state = np.full(6, number, np.float32)
        link.send([(link.peer, welcome(0, replace(link.rules.info, boot_id="boot 0")))])
        _, states = link.finish(read)
        assert floats_of(states, 6).tolist() == [[0] * 6, [1] * 6]

    def test_a_reset_waits_for_what_was_sent_and_holds_back_what_comes(self) -> None:
        link = lasting()
        handle = link.open("a")
        before = link.session.step(handle, X[:2])
        reset = link.session.reset(handle, STATE)
        after = link.session.step(handle, X[2:4])
        link.advance()
        assert [header[0] for header in headers(list(link.to_server))] == [Kind.STEP]
        link.run(before, reset, after)
        assert reset.error is None
        assert after.result().outputs.tolist() == reference(X[2:4], STATE)[0].tolist()
        assert link.session.table.next_seqs(handle).tolist() == [4]

    def test_a_fork_goes_on_from_where_its_source_is(self) -> None:
        link = lasting()
        group = link.open("a", "b")
        link.session.step(group, X[:4].reshape(2, 2, 3))
        fork = link.session.fork(group, ["c", "d"])
        step = link.session.step(group, X[4:6])
        copies = link.finish(fork)
        outputs = link.finish(link.session.step(copies, X[4:6])).outputs
        assert link.session.table.next_seqs(copies).tolist() == [3, 3]
        assert outputs.tolist() == link.finish(step).outputs.tolist()

    def test_a_fork_that_nobody_waits_for_is_not_made_or_closed_again(self) -> None:
        link = lasting()
        handle = link.open("a")
        link.session.step(handle, X[0])
        waiting = link.session.fork(handle, ["b"])
        link.session.cancel(waiting)
        link.run(waiting)
        asked = link.session.fork(handle, ["c"])
        link.advance()
        link.session.cancel(asked)
        link.run(asked)
        link.finish(link.session.step(handle, X[0]))
        link.finish(link.session.ping(0.0))
        assert set(link.rules.streams) == {"a"}

    def test_bad_input(self) -> None:
        link = lasting()
        handle = link.open("a")
        with pytest.raises(InvalidInput):
            link.session.reset(handle, np.zeros(3))
        with pytest.raises(InvalidInput):
            link.session.fork(handle, ["b", "c"])
        for have, epoch in ((-1, 0), ([1, 2], 0), (0, 2**64), (None, "x")):
            with pytest.raises(InvalidInput):
                link.session.resume(["b"], have, epoch, False, True)
        link.session.close(handle)
        for ask in (lambda: link.session.read_state(handle), lambda: link.session.reset(handle, None)):
            with pytest.raises(ClientClosed):
                ask()

    def test_what_waits_for_its_turn_ends_with_the_stream(self) -> None:
        link = lasting()
        handle = link.open("a")
        link.session.step(handle, X[0])
        waiting: list[Call[Any]] = [link.session.reset(handle, None), link.session.fork(handle, ["b"])]
        link.advance()
        link.send([(link.peer, evicted([1]))])
        link.deliver()
        for call in waiting:
            with pytest.raises(StreamEvicted):
                call.result()
        with pytest.raises(StreamEvicted):
            link.session.read_state(handle)
