"""A kind of model without a module of torch and without a float64 reference: bits alone decide."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from instep.models.folder import write_model
from instep.recording.reader import RecordingReader
from instep.replay import verifier
from instep.replay.command import run
from instep.replay.rendering import render
from instep.replay.report import Report
from instep_client import AsyncClient
from tests.support.forger import Forger
from tests.support.leaky import leaky, registered
from tests.support.running import running
from tests.support.verifying import ignore_progress

MODEL = leaky(3)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with registered():
        yield


@pytest.fixture
async def path(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A recording of two streams, beside its model."""
    write_model(tmp_path / "model", MODEL)
    found = tmp_path / "a.instep"
    async with running(MODEL, recording={"path": found}, folder=tmp_path / "model") as server:
        async with AsyncClient(server.endpoint) as client:
            for name in ("one", "other"):
                stream = await client.open(name)
                await stream.step(rng.standard_normal((20, 3)).astype(np.float32))
                await stream.close()
    return found


def verified(path: Path, json: bool = False) -> tuple[int, str]:
    file = io.StringIO()
    status = run([path], None, [], Console(file=file, width=160), json=json)
    return status, file.getvalue()


def test_equal_bits_are_enough_and_the_report_says_what_was_not_checked(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = verified(path)
    assert status == 0
    assert text.splitlines()[-2:] == [
        "compiled step: every frame, bit for bit; definition: every frame, bit for bit",
        "verified: 2 streams, 40 frames, exact, 0 mismatches",
    ]
    assert verified(path, json=True)[0] == 0
    fields = json.loads(capsys.readouterr().out)
    assert (fields["max_error"], fields["max_distance"], fields["reference"]) == (None, None, "none")
    assert fields["elements"]["stepped"] == fields["elements"]["definition"] > 0
    assert fields["elements"]["torch"] == fields["elements"]["float64 reference"] == 0


def forged(path: Path, change: Callable[[np.float32], np.float32]) -> Path:
    forger = Forger(path, path.with_name("forged.instep"))
    batch, at = forger.find_frame(1, 11)
    y = forger.column(batch, "y")
    y[at, 2] = change(y[at, 2])
    forger.change_batch(batch, y=y)
    return forger.path


def test_one_wrong_bit_is_a_mismatch(path: Path) -> None:
    status, text = verified(forged(path, lambda value: np.nextafter(value, np.float32(9))))
    assert status == 1
    assert "frame 11, element 2: recorded " in text
    assert text.splitlines()[-1] == "not verified: 2 streams, 40 frames, 1 mismatch"


def without_promise(path: Path) -> Report:
    """Verified as if the engine had promised no bits."""
    forger = Forger(path, path.with_name("no-bits.instep"))
    forger.change_header("arithmetic", json.dumps("torch on cuda:0"))
    with RecordingReader(forger.path) as reader:
        return verifier.verify(reader, MODEL, [], ignore_progress)


def test_where_bits_need_not_be_equal_only_the_last_digits_may_differ(path: Path) -> None:
    assert without_promise(path).verdict == "exact"
    near = without_promise(forged(path, lambda value: value + np.float32(1e-6)))
    assert (near.verdict, near.verified) == ("within tolerance", True)
    far = without_promise(forged(path, lambda value: value + np.float32(0.1)))
    assert [stream.verdict for stream in far.streams] == ["not checked", "exact"]
    assert not far.verified
    file = io.StringIO()
    render(far, Console(file=file, width=160))
    assert "from frame 11 on: bits differ, and no float64 reference bounds by how much they may" in file.getvalue()
