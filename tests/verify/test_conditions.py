"""What a recording is replayed with: the model, the device, and whether its bits must come out equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from instep.models.base import RecurrentModel
from instep.models.certify import Certification, Exactness, certify
from instep.models.numerics import numerics
from instep.models.recurrent.network import RecurrentNetwork
from instep.recording.schema import RecordingHeader
from instep.verify import conditions
from instep.verify.conditions import device_for, find_conditions, recorded_model, recorded_threads
from instep.verify.report import CannotVerify
from tests.support.models import SEED_SIZED, with_head
from tests.support.recordings import Recorded, make_gru, make_header, record_gru

CPU = torch.device("cpu")
NETWORK = RecurrentNetwork(SEED_SIZED, CPU)


def header(**changes: Any) -> RecordingHeader:
    fields = {"numerics": numerics(CPU), **changes}
    return make_header(SEED_SIZED.description.as_json(), **fields)


def test_on_the_machine_that_recorded_bits_are_required() -> None:
    found = find_conditions([header(buckets=(4, 16, 1024))], NETWORK, certify_all)
    assert found.step_bits
    assert found.whole_bits
    assert found.buckets == (4, 16), "those of the recording, up to a useful number of rows"


def test_this_machine_is_certified() -> None:
    certification = certify(NETWORK, (8, 16))
    found = find_conditions([header(buckets=(8, 16))], NETWORK)
    assert found.buckets == certification.buckets
    assert found.step_bits == (certification.exactness == "exact" and certification.buckets == (8, 16))
    assert found.whole_bits == (found.step_bits and certification.whole_sequence)


@pytest.mark.parametrize("buckets", [(3, 8), (-4, 4), (0,), (), (1024,)])
def test_buckets_that_fit_nothing_are_replaced(buckets: tuple[int, ...]) -> None:
    found = find_conditions([header(buckets=buckets)], NETWORK, certify_all)
    assert found.buckets[0] >= NETWORK.row_multiple
    assert found.buckets[-1] <= conditions.MOST_ROWS
    assert len(found.buckets) > 2


def test_buckets_keep_to_the_network() -> None:
    network = RecurrentNetwork(with_head(3, 8, 2), torch.device("cpu"))
    assert all(bucket % 32 == 0 for bucket in find_conditions([header(buckets=(4, 8))], network, certify_all).buckets)


@pytest.mark.parametrize("exactness", ["tolerance", "off"])
def test_an_engine_that_promised_no_bits(exactness: str) -> None:
    found = find_conditions([header(exactness=exactness)], NETWORK, certify_all)
    assert found.step_notes == (f"the engine ran with exactness {exactness}, which promises no bits",)
    assert not found.step_bits
    assert not found.whole_bits


def test_another_machine() -> None:
    there = {**numerics(CPU), "torch": "1.9"}
    (note,) = find_conditions([header(numerics=there)], NETWORK, certify_all).step_notes
    assert note == (f"this machine differs from the one that recorded: torch 1.9 there, {torch.__version__} here")


def certifying(exactness: Exactness, *buckets: int, whole_sequence: bool = False) -> Callable[..., Certification]:
    return lambda network, candidates: Certification(exactness, buckets, 0, whole_sequence)


def test_a_machine_that_certifies_nothing() -> None:
    found = find_conditions([header()], NETWORK, certifying("tolerance", 4, 8, 16))
    assert found.step_notes == ("on this machine, a frame's bits depend on the batch size",)
    assert not found.step_bits
    assert not found.whole_bits


def test_a_machine_that_certifies_only_stepping() -> None:
    found = find_conditions([header()], NETWORK, certifying("exact", 4, 8, 16))
    assert found.step_bits
    assert not found.whole_bits
    assert found.whole_notes == ("on this machine, a whole sequence in one call has other bits than stepping it",)


def test_a_machine_that_does_not_certify_all_batch_sizes_of_the_recording() -> None:
    found = find_conditions([header()], NETWORK, certifying("exact", 8, 16, whole_sequence=True))
    assert found.buckets == (8, 16)
    assert found.step_notes == ("on this machine, a frame has other bits in batches of 4, which the engine used",)
    other = find_conditions([header(buckets=(3,))], NETWORK, certifying("exact", 8, 16, whole_sequence=True))
    assert other.step_bits, "where other batch sizes are used, these are as good as any"


def certify_all(network: RecurrentModel, candidates: Sequence[int]) -> Certification:
    return Certification("exact", tuple(candidates), 0, whole_sequence=True)


def test_every_engine_that_wrote_counts() -> None:
    other = header(numerics={**numerics(CPU), "torch": "1.9"}, buckets=(4, 8, 64), exactness="off")
    found = find_conditions([header(buckets=(4, 16)), other, other], NETWORK, certify_all)
    assert found.buckets == (4, 8, 16, 64)
    assert len(found.step_notes) == 2
    assert found.step_notes[0] == "the engine ran with exactness off, which promises no bits"
    assert "torch 1.9 there" in found.step_notes[1]


@pytest.mark.parametrize("device", ["cpu", "cuda:99", "cuda:x", "nonsense"])
def test_a_device_that_is_not_here_is_the_cpu(device: str) -> None:
    assert device_for(header(numerics={"device": device})) == torch.device("cpu")


@pytest.mark.parametrize(
    ("recorded", "used"), [("1", 1), ("2", 2), ("0", 1), ("-3", 1), ("10000000", 1), ("²", 1), (None, 1)]
)
def test_as_many_threads_as_recorded(recorded: str | None, used: int) -> None:
    before = torch.get_num_threads()
    with recorded_threads(header(numerics={} if recorded is None else {"threads": recorded})):
        assert torch.get_num_threads() == used
    assert torch.get_num_threads() == before


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    return record_gru(tmp_path, make_gru(), [1])


def changed(header: RecordingHeader, model_folder: str) -> RecordingHeader:
    return make_header(
        header.description, model_folder=model_folder, model_fingerprint=header.model_fingerprint, model_name="m"
    )


def test_where_the_recording_says(recorded: Recorded) -> None:
    assert recorded_model(recorded.header, None).fingerprint == recorded.header.model_fingerprint


def test_where_the_user_says(recorded: Recorded, tmp_path: Path) -> None:
    moved = recorded.folder.rename(tmp_path / "moved")
    assert recorded_model(recorded.header, moved).fingerprint == recorded.header.model_fingerprint


@pytest.mark.parametrize(
    ("place", "sentence"),
    [("", "its folder is not recorded"), ("/nowhere/model", "/nowhere/model"), ("a" * 300, "aaa"), ("a\0b", "--model")],
)
def test_a_model_that_is_not_there(recorded: Recorded, place: str, sentence: str) -> None:
    with pytest.raises(CannotVerify, match="no longer there") as raised:
        recorded_model(changed(recorded.header, place), None)
    assert sentence in str(raised.value)
    assert "--model" in str(raised.value)


def test_a_folder_that_is_no_model(recorded: Recorded, tmp_path: Path) -> None:
    with pytest.raises(CannotVerify, match=r"the model cannot be loaded: there is no model folder .*nothing: "):
        recorded_model(recorded.header, tmp_path / "nothing")


def test_a_description_that_is_none(recorded: Recorded) -> None:
    description = {**recorded.header.description, "gru": {"hidden_size": 4, "num_layers": 1, "surprise": 1}}
    with pytest.raises(CannotVerify, match="description of its network is not valid, so the file is damaged"):
        recorded_model(replace(recorded.header, description=description), recorded.folder)
