from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep.replay.report import Coverage, Divergence, Report, StreamReport, Verdict


def stream(number: int, verdict: Verdict, frames: int = 10, **changes: Any) -> StreamReport:
    fields: dict[str, Any] = {
        "problems": ["frame 3 is missing"] if verdict == "mismatch" else [],
        "divergence": None,
        "max_error": 1.25e-7 * number,
        "not_compared": 0,
    }
    return StreamReport(number, f"mic-{number}", frames, verdict=verdict, **{**fields, **changes})


def report(*streams: StreamReport, **changes: Any) -> Report:
    fields: dict[str, Any] = {
        "file": Path("a.rec"),
        "model_name": "m",
        "fingerprint": "ab",
        "finished": True,
        "notes": (),
        "seconds": 1.23456,
    }
    return Report(streams=streams, **{**fields, **changes})


@pytest.mark.parametrize(
    ("streams", "line"),
    [
        (
            (stream(1, "exact", 5000), stream(2, "empty", 0), stream(10, "exact", 687)),
            "verified: 3 streams, 5,687 frames, exact, 0 mismatches",
        ),
        (
            (stream(1, "within tolerance", 1),),
            "verified: 1 stream, 1 frame, within tolerance, 0 mismatches",
        ),
        (
            (stream(1, "within tolerance"), stream(2, "mismatch"), stream(3, "exact")),
            "not verified: 3 streams, 30 frames, 1 mismatch",
        ),
    ],
)
def test_summary(streams: tuple[StreamReport, ...], line: str) -> None:
    assert report(*streams).summary() == line


def test_what_was_not_checked_is_not_verified() -> None:
    found = report(stream(1, "exact"), stream(2, "not checked"), stream(3, "within tolerance"))
    assert found.verdict == "not checked"
    assert not found.verified
    assert found.summary() == "not verified: 3 streams, 30 frames, 0 mismatches, 1 stream not checked"
    assert (found.as_json()["verified"], found.as_json()["unchecked"]) == (False, 1)
    both = report(stream(1, "mismatch"), stream(2, "not checked"))
    assert both.summary() == "not verified: 2 streams, 20 frames, 1 mismatch, 1 stream not checked"


def test_a_divergence_in_words_tells_neighbouring_floats_apart() -> None:
    one = float(np.float32(0.1))
    next_one = float(np.nextafter(np.float32(0.1), np.float32(1)))
    found = Divergence("stepped", "output", 7, 3, one, next_one)
    assert found.sentence() == "frame 7, element 3: recorded 0.1, stepped 0.10000001"
    state = Divergence("float64 reference", "final state", 7, 3, one, 0.1000000123456)
    assert state.sentence() == (
        "final state before frame 7, element 3: recorded 0.1, float64 reference 0.1000000123456"
    )
    nan = Divergence("definition", "output", 0, 0, float("nan"), 1.0)
    assert nan.sentence() == "frame 0, element 0: recorded nan, definition 1.0"


def test_json_holds_everything_even_what_json_cannot_say() -> None:
    divergence = Divergence("stepped", "output", 7, 3, float("nan"), 0.5)
    found = report(
        stream(1, "mismatch", divergence=divergence, max_error=float("inf"), max_difference=0.25),
        stream(2, "exact", not_compared=4),
        definition=Coverage(1, 2),
    )
    fields = json.loads(json.dumps(found.as_json(), allow_nan=False))
    named = ("verified", "verdict", "summary", "frames", "mismatches", "not_compared", "max_error", "definition")
    assert [fields[name] for name in named] == [
        *(False, "mismatch", found.summary(), 20, 1, 4, "inf", {"streams": 1, "frames": 2})
    ]
    wrong, right = fields["streams"]
    assert (wrong["first_divergence"]["recorded"], wrong["first_divergence"]["replayed"]) == ("nan", 0.5)
    assert (right["name"], right["first_divergence"], right["max_error"]) == ("mic-2", None, 2.5e-7)
    assert report(stream(1, "exact"), reference="none").as_json()["max_distance"] is None


def test_the_first_wrong_value_of_a_stream_is_kept_and_the_worst_verdict() -> None:
    far, later = (Divergence("stepped", "output", frame, 3, 0.25, 0.5) for frame in (40, 50))
    found = stream(5, "empty", 0)
    found.worsen("within tolerance")
    for divergence in (far, later):
        found.add_mismatch(divergence)
    found.worsen("exact")
    assert (found.verdict, found.divergence, len(found.problems)) == ("mismatch", far, 2)


def test_a_recording_that_has_lost_its_end_is_not_verified() -> None:
    found = report(stream(1, "exact"), lost="the last commits are missing")
    assert (found.verdict, found.verified) == ("exact", False)
    assert found.summary() == "not verified: 1 stream, 10 frames, 0 mismatches, the last commits are missing"
