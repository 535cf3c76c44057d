"""Six ways to tamper with a recording, each with the CRC left as it was and with the CRC computed again."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
from rich.console import Console

from instep.models.folder import load_model
from instep.replay.command import run
from tests.support.forger import Forger
from tests.support.recordings import Recorded, make_gru, record_gru

LENGTHS = [12, 30, 25, 30]
STREAM = 2
Values: TypeAlias = npt.NDArray[Any]
Tamper: TypeAlias = Callable[[Forger], None]


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    return record_gru(tmp_path, make_gru(3, 8), LENGTHS, initial=[2, 3])


def verify(path: Path, model_folder: Path | None = None) -> tuple[int, str]:
    file = io.StringIO()
    status = run(path, model_folder=model_folder, streams=[], json=False, console=Console(file=file, width=200))
    return status, file.getvalue()


def change_frame(forger: Forger, seq: int, column: str, change: Callable[[Values], None]) -> None:
    batch, at = forger.find_frame(STREAM, seq)
    values = forger.column(batch, column)
    change(values[at])
    forger.change_batch(batch, **{column: values})


def flip_one_bit_of_an_output(forger: Forger) -> None:
    def flip(y: Values) -> None:
        y.view(np.uint32)[5] ^= 1

    change_frame(forger, 17, "y", flip)


def change_one_input(forger: Forger) -> None:
    def change(x: Values) -> None:
        x[1] += 0.25

    change_frame(forger, 17, "x", change)


def swap_two_frames(forger: Forger) -> None:
    # Inputs and outputs together: each is still a pair that the network once made.
    one, at = forger.find_frame(STREAM, 17)
    other, other_at = forger.find_frame(STREAM, 18)
    for column in ("x", "y"):
        values, other_values = forger.column(one, column), forger.column(other, column)
        values[at], other_values[other_at] = other_values[other_at].copy(), values[at].copy()
        forger.change_batch(one, **{column: values})
        forger.change_batch(other, **{column: other_values})


def swap_two_seqs(forger: Forger) -> None:
    for seq, becomes in ((17, 1000), (18, 17), (1000, 18)):
        batch, at = forger.find_frame(STREAM, seq)
        values = forger.column(batch, "seqs")
        values[at] = becomes
        forger.change_batch(batch, seqs=values)


def drop_frame(forger: Forger, seq: int) -> None:
    batch, at = forger.find_frame(STREAM, seq)
    kept = {name: np.delete(forger.column(batch, name), at, axis=0) for name in ("streams", "seqs", "x", "y")}
    assert batch["size"] > 1
    forger.change_batch(batch, **kept)


def lose_a_frame(forger: Forger) -> None:
    drop_frame(forger, 17)


def lose_the_first_frame(forger: Forger) -> None:
    drop_frame(forger, 0)


def lose_a_frame_and_count_again(forger: Forger) -> None:
    drop_frame(forger, 17)
    for seq in range(18, LENGTHS[STREAM - 1]):
        batch, at = forger.find_frame(STREAM, seq)
        values = forger.column(batch, "seqs")
        values[at] = seq - 1
        forger.change_batch(batch, seqs=values)
    closing = next(row for row in forger.rows("closings") if row["stream"] == STREAM)
    forger.change("closings", closing["position"], frames=closing["frames"] - 1)


def lose_the_last_frame(forger: Forger) -> None:
    drop_frame(forger, LENGTHS[STREAM - 1] - 1)


def start_from_anothers_state(forger: Forger) -> None:
    openings = {row["stream"]: row for row in forger.rows("openings")}
    forger.change("openings", openings[STREAM]["position"], initial_state=openings[3]["initial_state"])


TAMPERINGS = [
    flip_one_bit_of_an_output,
    change_one_input,
    swap_two_frames,
    swap_two_seqs,
    lose_a_frame,
    lose_the_first_frame,
    lose_a_frame_and_count_again,
    lose_the_last_frame,
    start_from_anothers_state,
]


def test_untouched_it_is_verified(recorded: Recorded) -> None:
    status, text = verify(recorded.path)
    assert status == 0
    assert text.splitlines()[-1] == "verified: 4 streams, 97 frames, exact, 0 mismatches"


@pytest.mark.parametrize("tamper", TAMPERINGS)
def test_with_the_crc_left_wrong_it_is_damaged(recorded: Recorded, tamper: Tamper) -> None:
    forger = Forger(recorded.path, recorded.path.with_name("forged.rec"), fix_crc=False)
    tamper(forger)
    status, text = verify(forger.path)
    assert (status, "does not match its CRC" in text) == (2, True)


@pytest.mark.parametrize("tamper", TAMPERINGS)
def test_with_the_crc_computed_again_it_is_a_mismatch_of_that_stream(recorded: Recorded, tamper: Tamper) -> None:
    forger = Forger(recorded.path, recorded.path.with_name("forged.rec"))
    tamper(forger)
    status, text = verify(forger.path)
    assert status == 1
    assert f"mismatch in stream {STREAM} (stream-{STREAM}):\n" in text
    assert text.splitlines()[-1].endswith(", 1 mismatch")


@pytest.mark.parametrize("table", ["closings", "batches"])
def test_a_row_that_is_gone_is_damage(recorded: Recorded, table: str) -> None:
    forger = Forger(recorded.path, recorded.path.with_name("forged.rec"))
    position = forger.rows(table)[1]["position"]
    forger.remove(table, position)
    status, text = verify(forger.path)
    assert status == 2
    assert f"is damaged: the row at position {position} is missing" in text


@pytest.mark.parametrize("seq", [0, 5])
def test_a_stream_that_got_anothers_state(tmp_path: Path, seq: int) -> None:
    # Not forged: this is what an engine would record that mixed up two slots.
    recorded = record_gru(tmp_path, make_gru(3, 8), LENGTHS, initial=[2, 3], mix_up=(STREAM - 1, 3, seq))
    status, text = verify(recorded.path)
    assert status == 1
    assert f"mismatch in stream {STREAM} (stream-{STREAM}):\n  frame {seq}, element" in text
    assert text.splitlines()[-1].endswith(", 1 mismatch")


class TestAnotherModelsWeights:
    @pytest.fixture
    def other(self, tmp_path: Path) -> Recorded:
        return record_gru(tmp_path / "other", make_gru(3, 8, seed=1), [1])

    def test_are_refused_by_their_fingerprint(self, recorded: Recorded, other: Recorded) -> None:
        status, text = verify(recorded.path, other.folder)
        assert status == 2
        assert "is not the one the recording was made with" in text

    def test_in_the_recorded_place_are_refused_too(self, recorded: Recorded, other: Recorded) -> None:
        weights = "weights.safetensors"
        (recorded.folder / weights).write_bytes((other.folder / weights).read_bytes())
        status, text = verify(recorded.path)
        assert status == 2
        assert "is not the one the recording was made with" in text

    def test_with_a_header_whose_crc_is_wrong_are_damage(self, recorded: Recorded, other: Recorded) -> None:
        forger = Forger(recorded.path, recorded.path.with_name("forged.rec"), fix_crc=False)
        forger.change_header("model_fingerprint", json.dumps(load_model(other.folder).fingerprint))
        status, text = verify(forger.path, other.folder)
        assert status == 2
        assert "'model_fingerprint' is damaged: its CRC does not match" in text

    def test_with_a_forged_fingerprint_are_a_mismatch(self, recorded: Recorded, other: Recorded) -> None:
        forger = Forger(recorded.path, recorded.path.with_name("forged.rec"))
        forger.change_header("model_fingerprint", json.dumps(load_model(other.folder).fingerprint))
        status, text = verify(forger.path, other.folder)
        assert status == 1
        assert "4 mismatches" in text.splitlines()[-1]

    def test_of_another_shape_are_refused_even_with_a_forged_fingerprint(
        self, recorded: Recorded, tmp_path: Path
    ) -> None:
        larger = record_gru(tmp_path / "larger", make_gru(3, 9), [1])
        forger = Forger(recorded.path, recorded.path.with_name("forged.rec"))
        forger.change_header("model_fingerprint", json.dumps(load_model(larger.folder).fingerprint))
        status, text = verify(forger.path, larger.folder)
        assert status == 2
        assert "is not the one the recording was made with" in text
