from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from instep.recording.engines import changed_values, differing, refuse_other_engine
from instep.recording.errors import RecordingError
from tests.support.recordings import gru_description, make_gru, make_header


def header(**changes: Any) -> Any:
    return make_header(gru_description(make_gru(3, 4)), **changes)


def test_differences_in_words() -> None:
    assert differing({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "4", "d": "5"}) == [
        "b 2 there, 4 here",
        "c 3 there, unknown here",
        "d unknown there, 5 here",
    ]


def test_another_model_is_always_refused() -> None:
    other = header(model_fingerprint="cd" * 32, model_name="other")
    for accepted in (False, True):
        with pytest.raises(
            RecordingError, match=r"a\.rec is a recording of the model 'test' .*this engine serves 'other'"
        ):
            refuse_other_engine(Path("a.rec"), header(), other, accepted)


def test_other_numerics_are_refused_unless_accepted() -> None:
    other = header(numerics={"torch": "1.9", "threads": "1"}, buckets=(4,))
    with pytest.raises(
        RecordingError, match=r"with other bits \(torch .* there, 1\.9 here\).*--accept-numerics-change"
    ):
        refuse_other_engine(Path("a.rec"), header(), other)
    refuse_other_engine(Path("a.rec"), header(), other, True)
    refuse_other_engine(Path("a.rec"), header(), header(buckets=(4,), model_folder="elsewhere"))


def test_what_changed_and_matters() -> None:
    now = header(numerics={"torch": "1.9"}, buckets=(4,), durability="fsync", model_folder="elsewhere", created_ns=5)
    assert changed_values(header(), now) == {"numerics": {"torch": "1.9"}, "buckets": (4,), "durability": "fsync"}
    assert changed_values(now, now) == {}
    named = header(output_names=("a", "b", "c", "d"))
    assert changed_values(header(), named) == {"output_names": ("a", "b", "c", "d")}
