from __future__ import annotations

import numpy as np
import pytest

import instep_client
from instep_client.protocol import errors
from instep_client.protocol.codes import SENTENCES, Code
from instep_client.protocol.errors import FrameFailure, FramesRefused


def test_one_tree_and_familiar_relatives() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert all(issubclass(kind, errors.InstepError) for kind in kinds)
    assert issubclass(errors.ConnectionFailed, ConnectionError)
    assert issubclass(errors.InvalidInput, ValueError)


def test_every_code_has_a_sentence() -> None:
    assert set(SENTENCES) == set(Code)


def test_refusals_say_the_code_the_reason_and_the_stream() -> None:
    refused = errors.StreamRefused(Code.NAME_IN_USE, "taken", "mic")
    assert (refused.code, refused.sentence, refused.stream) == (Code.NAME_IN_USE, "taken", "mic")
    assert str(refused) == "NAME_IN_USE: taken (stream 'mic')"
    evicted = errors.StreamEvicted(Code.IDLE, "idle", "mic")
    assert (str(evicted), evicted.stream) == ("IDLE: idle (stream 'mic')", "mic")


@pytest.mark.parametrize(("count", "more"), [(1, ""), (3, ", and 2 more streams")])
def test_refused_frames_name_the_first_stream_and_count_the_others(count: int, more: str) -> None:
    failures = tuple(FrameFailure(f"s{i}", 7, Code.NOT_FINITE, 7) for i in range(count))
    refused = FramesRefused(Code.NOT_FINITE, "bad", failures, np.zeros(2, np.float32))
    assert str(refused) == f"NOT_FINITE: bad (stream 's0', seq 7, expected 7{more})"
    assert refused.sentence == "bad"
    assert refused.failures == failures
    assert refused.outputs.shape == (2,)


def test_the_package_offers_what_it_lists() -> None:
    assert all(hasattr(instep_client, name) for name in instep_client.__all__)
    tree = {
        name for name, kind in vars(errors).items() if isinstance(kind, type) and kind.__module__ == errors.__name__
    }
    assert tree <= set(instep_client.__all__)
