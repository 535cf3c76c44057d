"""Streams are resumed after a loss of the connection: what becomes of their frames, and what is left to people."""

from __future__ import annotations

import pytest

from instep_client.protocol.codes import Code
from instep_client.protocol.errors import DataLoss, StreamEvicted
from tests.support.fake_server import reference
from tests.support.session_link import X, lasting, lose


class TestFrames:
    def test_what_was_applied_is_answered_again_and_the_rest_is_applied(self) -> None:
        link = lasting()
        handle = link.open("a")
        steps = [link.session.step(handle, x) for x in X[:4]]
        link.advance()
        link.serve(1)
        link.serve(1)
        link.deliver()
        link.cut()
        for step, outputs in zip(steps, reference(X[:4])[0], strict=True):
            assert link.finish(step).outputs.tolist() == outputs.tolist()
        assert len(link.rules.streams["a"].applied) == 4
        assert link.rules.failures == []


class TestPersonsDecide:
    def test_streams_that_are_gone_end_and_the_others_go_on(self) -> None:
        link = lasting()
        handles = {name: link.open(name) for name in ("gone", "expired", "taken", "well")}
        steps = {name: link.session.step(handle, X[0]) for name, handle in handles.items()}
        del link.rules.streams["gone"]
        link.rules.expire("expired")
        link.rules.take_over("taken")
        lose(link)
        link.run(*steps.values())
        codes = {name: step.error.code for name, step in steps.items() if isinstance(step.error, StreamEvicted)}
        assert codes == {"gone": Code.UNKNOWN_STREAM, "expired": Code.EXPIRED, "taken": Code.FENCED}
        assert steps["well"].result().outputs.shape == (2,)
        with pytest.raises(StreamEvicted):
            link.session.step(handles["gone"], X[0])

    def test_a_server_that_lost_frames(self) -> None:
        link = lasting()
        handle, other = link.open("a"), link.open("b")
        link.finish(link.session.step(handle, X[:5]))
        link.rules.forget("a", 2)
        step = link.session.step(handle, X[5])
        lose(link)
        link.run(step)
        assert isinstance(step.error, DataLoss)
        assert (step.error.code, step.error.have, step.error.server_has) == (Code.DATA_LOSS, 5, 3)
        assert link.finish(link.session.step(other, X[0])).outputs.shape == (2,)
        again = link.finish(link.session.resume(["a"], None, 0, True, True))
        assert link.session.table.next_seqs(again).tolist() == [3]
        assert link.finish(link.session.step(again, X[3:5])).outputs.tolist() == reference(X[:5])[0][3:].tolist()

    def test_a_server_that_lost_a_frame_behind_one_whose_output_did_not_come(self) -> None:
        link = lasting()
        group = link.open("a", "b")
        both = link.session.step(group, X[:2])
        link.advance()
        one = link.session.step(group, X[2:3], rows=[0])
        link.advance()
        link.serve(1)
        link.to_client.clear()
        link.serve(1)
        link.deliver()
        assert one.done
        link.rules.forget("a", 2)
        lose(link)
        link.run(both)
        assert isinstance(both.error, DataLoss)
        assert [(failure.stream, failure.code) for failure in both.error.failures] == [("a", Code.DATA_LOSS)]
        assert both.error.outputs is not None
        assert both.error.outputs[1].tolist() == reference(X[1:2])[0][0].tolist()
        assert link.finish(link.session.step(group, X[:1], rows=[1])).outputs.shape == (1, 2)
