from __future__ import annotations

import struct
import zlib
from typing import Any

import pytest

from instep.recording.errors import RecordingError
from instep.recording.schema import RecordingHeader, row_crc, sound_rows
from tests.support.recordings import make_header

DESCRIPTION: dict[str, Any] = {
    "features": 5,
    "before": [{"size": 7, "activation": "relu", "bias": True}],
    "gru": {"hidden_size": 6, "num_layers": 2, "bias": True},
    "after": [],
}


def test_crc_is_that_of_the_columns_bytes() -> None:
    columns = struct.pack("<q", 3) + "größe".encode() + b"\x00\xff" + struct.pack("<q", -1)
    assert row_crc(3, "größe", None, b"\x00\xff", -1) == zlib.crc32(columns)


def test_header_survives_its_rows() -> None:
    header = make_header(DESCRIPTION, arithmetic="torch 2.13 on cuda:0")
    assert RecordingHeader.from_rows(header.rows()) == header


def test_header_with_a_flipped_bit_is_refused_by_name() -> None:
    rows = [
        (key, value.replace("ab", "ac", 1) if key == "model_fingerprint" else value, crc)
        for key, value, crc in make_header(DESCRIPTION).rows()
    ]
    with pytest.raises(RecordingError, match="model_fingerprint"):
        RecordingHeader.from_rows(rows)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("arithmetic", "1"),
        ("features", '"3"'),
        ("description", '"gru"'),
        ("model_name", "not json"),
        ("description", "[" * 100_000),
        ("format_version", "3"),
        ("surprise", "1"),
        ("output_names", "[]"),
        ("description", '{"output_names": ["one too few"]}'),
        ("description", '{"output_names": [1, 2]}'),
        ("description", '{"output_names": 1}'),
    ],
)
def test_header_of_the_wrong_kind_is_refused(key: str, value: str) -> None:
    rows = {row[0]: row for row in make_header(DESCRIPTION, outputs=2).rows()}
    rows[key] = (key, value, row_crc(key, value))
    with pytest.raises(RecordingError):
        RecordingHeader.from_rows(list(rows.values()))


def test_header_holds_the_names_of_outputs_in_the_description() -> None:
    plain, named = (make_header(DESCRIPTION, outputs=2, output_names=names) for names in ((), ("yes", "no")))
    assert RecordingHeader.from_rows(named.rows()) == named
    assert RecordingHeader.from_rows(plain.rows()) == plain
    differing = [row[0] for row, other in zip(named.rows(), plain.rows(), strict=True) if row != other]
    assert differing == ["description"], "an older engine reads a header without names"


def test_header_with_a_missing_row_is_refused() -> None:
    with pytest.raises(RecordingError, match="model_folder"):
        RecordingHeader.from_rows([row for row in make_header(DESCRIPTION).rows() if row[0] != "model_folder"])


@pytest.mark.parametrize(
    ("row", "sound"),
    [
        ((1, 2, None, None, "kind", "detail", None), True),
        ((1, 2, 3, 4, "kind", "detail", None), True),
        ((1, 2, 3, 4, None, "detail", None), False),
        ((1, 2, "3", 4, "kind", "detail", None), False),
        ((1, 2, 3, 4, "kind", b"detail", b"state"), False),
        ((1, 2, 3.5, 4, "kind", "detail", None), False),
    ],
)
def test_rows_hold_what_their_columns_declare(row: tuple[Any, ...], sound: bool) -> None:
    crc = row_crc(*(column if not isinstance(column, float) else 3 for column in row))
    good = (1, 2, None, None, "kind", "", None, row_crc(1, 2, None, None, "kind", "", None))
    assert sound_rows("events", [(*row, crc)]) == sound
    assert sound_rows("events", [good, good, (*row, crc), good]) == (4 if sound else 2)
    assert sound_rows("events", [good, (*row, crc + 1), good]) == 1
