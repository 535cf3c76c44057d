"""Each format, written by the command and read by others' code: the standard library, numpy, pyarrow, mcap."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from instep.export.command import Export, run
from instep_tools.formats import mcap_file
from instep_tools.formats.write import Format
from instep_tools.problems import CommandProblem
from tests.support.written import FEATURES, NAMES, OUTPUTS, Row, Written, exact, write_recording

FLOATS = [*(f"x{at}" for at in range(FEATURES)), *(f"y{at}" for at in range(OUTPUTS))]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return write_recording(tmp_path)


def export(written: Written, format: Format, *streams: str) -> Path:
    path = written.path.with_name(f"out.{format}")
    run(Export(written.path, path, streams, part_frames=16), Console(quiet=True))
    return path


def read_csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        head, *lines = csv.reader(file)
    assert head == ["stream", "stream_id", "seq", "time", *FLOATS]
    rows = []
    for name, stream_id, seq, time, *texts in lines:
        floats = [float(np.float32(text)) for text in texts]
        time_ns = int(np.datetime64(time.removesuffix("Z"), "ns").astype(np.int64))
        rows.append(Row(name, int(stream_id), int(seq), time_ns, floats[:FEATURES], floats[FEATURES:]))
    return rows


def read_npz(path: Path) -> list[Row]:
    with np.load(path) as file:
        columns = dict(file)
    kinds = {name: column.dtype.str for name, column in columns.items()}
    assert kinds.pop("stream").startswith("<U")
    assert kinds.pop("metadata").startswith("|S")
    assert kinds == {"stream_id": "<u4", "seq": "<u8", "time_ns": "<i8", "x": "<f4", "y": "<f4"}
    labels = (columns[name].tolist() for name in ("stream", "stream_id", "seq", "time_ns"))
    rows = zip(*labels, columns["x"].tolist(), columns["y"].tolist(), strict=True)
    return [Row(*values) for values in rows]


def read_parquet(path: Path) -> list[Row]:
    from pyarrow import parquet

    found = parquet.read_table(path)
    kinds = ["string", "uint32", "uint64", "timestamp[ns, tz=UTC]", *["float"] * len(FLOATS)]
    assert found.column_names == ["stream", "stream_id", "seq", "time", *FLOATS]
    assert list(map(str, found.schema.types)) == kinds
    texts = [column.to_pylist() for column in found.drop_columns("time").columns]
    columns = zip(*texts[:3], found["time"].to_numpy().astype(np.int64).tolist(), *texts[3:], strict=True)
    return [
        Row(name, stream_id, seq, time_ns, floats[:FEATURES], floats[FEATURES:])
        for name, stream_id, seq, time_ns, *floats in columns
    ]


def read_mcap(path: Path) -> list[Row]:
    from mcap.reader import make_reader

    rows = []
    with path.open("rb") as file:
        for schema, channel, message in make_reader(file, validate_crcs=True).iter_messages(log_time_order=False):
            assert schema is not None
            assert (schema.name, schema.encoding, channel.message_encoding) == ("instep.Frame", "jsonschema", "json")
            frame = json.loads(message.data)
            x, y = (np.array(frame[part], np.float32).tolist() for part in "xy")
            assert message.sequence == frame["seq"]
            assert message.publish_time == message.log_time
            rows.append(Row(channel.topic, int(channel.metadata["stream_id"]), frame["seq"], message.log_time, x, y))
    return rows


READERS: dict[Format, Callable[[Path], list[Row]]] = {
    "csv": read_csv,
    "npz": read_npz,
    "parquet": read_parquet,
    "mcap": read_mcap,
}


@pytest.fixture(params=READERS)
def format(request: pytest.FixtureRequest) -> Format:
    found: Format = request.param
    return found


def test_what_was_recorded_reads_back_bit_for_bit_and_in_order(written: Written, format: Format) -> None:
    assert len(written.rows) > 60
    assert exact(READERS[format](export(written, format))) == exact(written.rows)


def test_only_some_streams(written: Written, format: Format) -> None:
    found = READERS[format](export(written, format, "mic-1"))
    assert exact(found) == exact(written.of(1, 3))


def test_a_stream_without_frames(written: Written, format: Format) -> None:
    path = export(written, format, "mic-2")
    if format == "npz":
        with np.load(path) as file:
            shapes = {name: file[name].shape for name in file if name != "metadata"}
            labels = dict.fromkeys(("stream", "stream_id", "seq", "time_ns"), (0,))
            assert shapes == {**labels, "x": (0, FEATURES), "y": (0, OUTPUTS)}
    else:
        assert READERS[format](path) == []


def test_csv_has_no_more_digits_than_a_float32_needs(written: Written) -> None:
    with export(written, "csv").open(encoding="utf-8", newline="") as file:
        texts = {text for line in list(csv.reader(file))[1:] for text in line[4:]}
    assert {"0.1", "-0", "1e-45", "3.4028235e+38", "0.33333334", "nan"} < texts
    for text in texts - {"nan", "-0"}:
        digits = len(text.split("e")[0].lstrip("-0.").replace(".", "").rstrip("0"))
        value = np.float32(text)
        assert digits == 1 or np.float32(f"{float(value):.{digits - 2}e}") != value, text


def test_mcap_has_a_channel_for_each_stream_and_a_summary(written: Written) -> None:
    from mcap.reader import make_reader

    with export(written, "mcap").open("rb") as file:
        summary = make_reader(file).get_summary()
    assert summary is not None
    found = {(channel.topic, channel.metadata["stream_id"]) for channel in summary.channels.values()}
    assert found == {(name, str(number)) for number, name in enumerate(NAMES[:4], 1)}
    assert summary.statistics is not None
    assert summary.statistics.message_count == len(written.rows)
    times = [row.time_ns for row in written.rows]
    assert (summary.statistics.message_start_time, summary.statistics.message_end_time) == (times[0], times[-1])


def test_more_streams_than_mcap_has_channels(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcap_file, "MOST_CHANNELS", 3)
    with pytest.raises(CommandProblem, match="at most 3 channels"):
        export(written, "mcap")
    assert len(read_mcap(export(written, "mcap", NAMES[0], NAMES[1]))) == len(written.of(1, 2, 3))


def metadata_of(path: Path, format: Format) -> dict[str, str]:
    if format == "npz":
        with np.load(path) as file:
            found: dict[str, str] = json.loads(file["metadata"].item())
            return found
    if format == "parquet":
        from pyarrow import parquet

        values = parquet.read_schema(path).metadata
        return {key.decode().removeprefix("instep."): value.decode() for key, value in values.items()}
    from mcap.reader import make_reader

    with path.open("rb") as stream:
        return next(record.metadata for record in make_reader(stream).iter_metadata() if record.name == "instep")


@pytest.mark.parametrize("format", ["npz", "parquet", "mcap"], indirect=True)
def test_what_is_known_about_the_model_goes_with_the_rows(written: Written, format: Format) -> None:
    found = metadata_of(export(written, format), format)
    assert json.loads(found.pop("inputs")) == FLOATS[:FEATURES]
    assert json.loads(found.pop("outputs")) == FLOATS[FEATURES:]
    assert found == {"model": "test", "fingerprint": "ab" * 32, "arithmetic": "portable-1", "version": "0.1.0"}
