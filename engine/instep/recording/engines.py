"""Which engine may go on with a recording of another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from instep.recording.errors import RecordingError
from instep.recording.schema import RecordingHeader

_MAY_DIFFER: Final = ("instep_version", "numerics", "exactness", "buckets", "max_ulp", "durability", "output_names")


def refuse_other_engine(
    path: Path, last: RecordingHeader, now: RecordingHeader, accept_numerics_change: bool = False
) -> None:
    """Raise RecordingError when streams would not go on exactly: another model, or floats with other bits."""
    if now.model_fingerprint != last.model_fingerprint:
        raise RecordingError(
            f"{path} is a recording of the model {last.model_name!r} (fingerprint {last.model_fingerprint[:12]}…), and "
            f"this engine serves {now.model_name!r} ({now.model_fingerprint[:12]}…); choose another file"
        )
    if now.numerics != last.numerics and not accept_numerics_change:
        raise RecordingError(
            f"{path} was written where floats come out with other bits "
            f"({'; '.join(differing(last.numerics, now.numerics))}), so its streams would not go on exactly; go on all "
            "the same with --accept-numerics-change, or choose another file"
        )


def changed_values(last: RecordingHeader, now: RecordingHeader) -> dict[str, Any]:
    """The header's values that differ for the engine that continues."""
    before, after = asdict(last), asdict(now)
    return {key: after[key] for key in _MAY_DIFFER if after[key] != before[key]}


def differing(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """The differences, in words."""
    return [
        f"{key} {there.get(key, 'unknown')} there, {here.get(key, 'unknown')} here"
        for key in sorted({*there, *here})
        if there.get(key) != here.get(key)
    ]
