"""Calls that users seldom mix: streams end, sleep, are resumed twice and closed while answers about them are due."""

from __future__ import annotations

import numpy as np
import pytest

from instep_client.protocol.errors import StreamEvicted
from tests.support.fake_server import F32, reference
from tests.support.ring_link import RingLink

X: F32 = np.random.default_rng(5).standard_normal((20, 3)).astype(np.float32)


def test_a_claim_that_is_answered_late_says_nothing_of_the_next_stream_in_its_row() -> None:
    link = RingLink()
    a = link.open("a")
    link.send(link.server.hibernate("a"))
    link.run()
    resumed = link.session.resume(["a"], 0, int(link.session.epochs(a)[0]), False, True)
    link.advance()
    link.session.step(a, X[0])
    link.advance()
    link.serve()
    link.deliver()
    assert resumed.error is None
    with pytest.raises(StreamEvicted):
        link.session.close(a)
    link.advance()
    opened = link.session.open(["b"], None, True)
    link.advance()
    link.serve()
    link.serve()
    link.to_client.reverse()  # OPENED arrives before the RESUMED of the client's own claim
    b = link.finish(opened)
    assert b.rows.tolist() == a.rows.tolist()
    outputs = link.finish(link.session.step(b, X[1])).outputs
    assert np.array_equal(outputs, reference(X[1:2])[0][0])
    assert len(link.server.streams["b"].applied) == 1
    assert not link.server.streams["a"].applied
