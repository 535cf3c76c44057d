"""Steps around a network: the truth is torch's own `stft` and `nn.GRU` over whole signals, or a loop in Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from instep.core.typing import F32
from instep.models.base import RecurrentModel
from instep.models.certify import candidate_buckets, certify
from instep.models.errors import ModelError
from instep.models.folder import load_model, write_model
from instep.models.registry import build, parse_description
from instep.models.stepping import step_rows
from instep.models.weights import weights_bytes
from instep.recording.reader import RecordingReader
from instep.verify import verifier
from instep_client import AsyncClient
from tests.support.pipelines import CONTEXT, HOP, LISTENS, gru_inside, listens, whole_signal
from tests.support.running import CPU, running
from tests.support.verifying import ignore_progress


def small(**parts: Any) -> dict[str, Any]:
    return {"kind": "pipeline", "features": 3, "network": {"features": 3, "gru": {"hidden_size": 4}}, **parts}


def stepped(network: RecurrentModel, x: F32) -> F32:
    """Frames [T, R, features] one after another."""
    step, rows, outputs = network.bind(x.shape[1]), network.state.initial(x.shape[1]), []
    for frame in x:
        y, rows = step_rows(step, network.state, frame, rows, network.description.outputs)
        outputs.append(y)
    return np.stack(outputs)


def test_overlapping_windows_spectra_and_smoothing_are_those_of_the_whole_signal(rng: np.random.Generator) -> None:
    model = listens(LISTENS)
    network = build(model, CPU)
    x = rng.standard_normal((30, network.row_multiple, HOP)).astype(np.float32)
    y = stepped(network, x)
    for row in (0, 5):
        np.testing.assert_allclose(y[:, row], whole_signal(model, x[:, row]), atol=2e-6)


def test_batch_sizes_and_whole_sequences_have_the_bits_that_are_certified(rng: np.random.Generator) -> None:
    network = build(listens(LISTENS), CPU)
    found = certify(network, candidate_buckets(network, 128))
    x = rng.standard_normal((9, found.buckets[-1], HOP)).astype(np.float32)
    if found.exactness == "exact":
        y = stepped(network, x)
        for bucket in found.buckets:
            np.testing.assert_array_equal(stepped(network, x[:, -bucket:]), y[:, -bucket:])
    x = x[:, : found.buckets[0]]
    whole = network.sequence(x, network.state.initial(found.buckets[0]))
    assert whole is not None
    compare = np.testing.assert_array_equal if found.whole_sequence else np.testing.assert_allclose
    compare(whole[0], stepped(network, x))


def test_the_reference_in_float64_agrees_and_knows_rows_of_different_lengths(rng: np.random.Generator) -> None:
    model = listens(LISTENS)
    reference = build(model, CPU).reference(np.float64)
    assert reference is not None
    x = rng.standard_normal((12, 2, HOP)).astype(np.float32)
    state = {
        name: leaf.copy() for name, leaf in model.description.state.unpack(model.description.state.initial(2)).items()
    }
    y, after = reference.run(x.astype(np.float64), state, np.array([2] * 7 + [1] * 5))
    np.testing.assert_allclose(y[:, 0], whole_signal(model, x[:, 0]), atol=2e-6)
    np.testing.assert_allclose(y[:7, 1], whole_signal(model, x[:7, 1]), atol=2e-6)
    np.testing.assert_array_equal(after["before.0.context"][1], x[:7, 1].ravel()[-CONTEXT:])
    assert after["after.0.has_begun"].all()


def test_the_reference_in_float64_rounds_nothing_to_the_float32_of_its_frames(rng: np.random.Generator) -> None:
    model = listens(
        small(before=[{"smooth": 0.9}, {"spectrum": "power"}], network={"features": 2, "gru": {"hidden_size": 4}})
    )
    reference = build(model, CPU).reference(np.float64)
    assert reference is not None
    x, active = rng.standard_normal((9, 2, 3)).astype(np.float32), np.array([2] * 9)
    state = model.description.state.unpack(model.description.state.initial(2))
    state = {name: leaf.astype(np.float64) if leaf.dtype.kind == "f" else leaf for name, leaf in state.items()}
    (y, after), (wide, wide_after) = (reference.run(frames, state, active) for frames in (x, x.astype(np.float64)))
    assert y.dtype == wide.dtype == np.float64
    np.testing.assert_array_equal(y, wide)
    smoothed = x[0].astype(np.float64)
    for frame in x[1:].astype(np.float64):
        smoothed = 0.9 * smoothed + (1 - 0.9) * frame
    for leaves in (after, wide_after):
        np.testing.assert_allclose(leaves["before.0.smoothed"], smoothed, rtol=0, atol=1e-14)


def test_a_context_of_frames_is_those_before_and_zeros_at_first(rng: np.random.Generator) -> None:
    model = listens(small(before=[{"context": 2}], network={"features": 9, "gru": {"hidden_size": 4}}))
    x = rng.standard_normal((6, 4, 3)).astype(np.float32)
    padded = np.concatenate([np.zeros((2, 4, 3), np.float32), x])
    with torch.inference_mode():
        y, _ = gru_inside(model, 9, 4)(
            torch.from_numpy(np.concatenate([padded[:-2], padded[1:-1], padded[2:]], axis=2))
        )
    np.testing.assert_allclose(stepped(build(model, CPU), x), y.numpy(), atol=1e-6)


def test_hysteresis_switches_at_its_thresholds_and_has_no_reference(rng: np.random.Generator) -> None:
    model = listens(small(after=[{"hysteresis": {"on": 0.1, "off": -0.1}}]))
    network = build(model, CPU)
    x = rng.standard_normal((40, 4, 3)).astype(np.float32)
    with torch.inference_mode():
        values = gru_inside(model, 3, 4)(torch.from_numpy(x))[0].numpy()
    is_on, expected = np.zeros(values[0].shape, bool), []
    for row in values:
        is_on = np.where(row >= 0.1, True, np.where(row <= -0.1, False, is_on))
        expected.append(is_on)
    assert 0 < np.mean(expected) < 1
    np.testing.assert_array_equal(stepped(network, x), np.array(expected, np.float32))
    assert network.reference(np.float64) is None


async def test_it_is_served_continued_and_verified(tmp_path: Path, rng: np.random.Generator) -> None:
    model = listens(LISTENS)
    write_model(tmp_path / "model", model)
    assert load_model(tmp_path / "model").fingerprint == model.fingerprint
    x = rng.standard_normal((3, 20, HOP)).astype(np.float32)
    recording = {"file": tmp_path / "r.instep"}
    async with running(model, recording=recording) as server, AsyncClient(server.endpoint) as client:
        streams = [await client.open(f"s{number}") for number in range(3)]
        first = [await stream.step(frames[:11]) for stream, frames in zip(streams, x, strict=True)]
        _, state = await streams[0].read_state()
        np.testing.assert_array_equal(state["before.0.context"], x[0, :11].ravel()[-CONTEXT:])
        await client.close(park=True)
    async with running(model, recording=recording) as server, AsyncClient(server.endpoint) as client:
        for number, frames in enumerate(x):
            stream = await client.resume(f"s{number}", 11, take_over=True)
            y = np.concatenate([first[number], await stream.step(frames[11:])])
            np.testing.assert_allclose(y, whole_signal(model, frames), atol=2e-6)
    with RecordingReader(tmp_path / "r.instep") as reader:
        report = verifier.verify(reader, load_model(tmp_path / "model"), (), ignore_progress)
    is_exact = certify(build(model, CPU), candidate_buckets(build(model, CPU), 256)).whole_sequence
    assert {stream.verdict for stream in report.streams} == {"exact" if is_exact else "within tolerance"}


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"before": [{"context": 2}]}, "frames of 3 values are 9 values after the steps"),
        ({"before": [{"contxt": 2}]}, "a step is one of context, spectrum, smooth, hysteresis"),
        ({"before": [{"context": {}}]}, "context takes either frames or values"),
        ({"before": [{"context": 0}]}, "greater than or equal to 1"),
        ({"after": [{"smooth": 1.0}]}, "less than 1"),
        ({"after": [{"hysteresis": {"on": 0.4, "off": 0.5}}]}, "off must be less than on"),
        ({"after": [{"hysteresis": {"on": float("inf"), "off": 0.5}}]}, "inf is wrong, it should be less"),
        ({"after": [{"hysteresis": {"on": 10**400, "off": 0.5}}]}, "is wrong, it should be less"),
        ({"after": [{"context": {"values": 10**12}}]}, "an extent of leaf context is 1000000000000"),
        ({}, "a pipeline without steps is its network"),
        ({"network": {"features": 3}, "after": [{"smooth": 0.5}]}, "network: gru: it is missing"),
        ({"network": small(after=[{"smooth": 0.5}]), "after": [{"smooth": 0.5}]}, "a network that is not a pipeline"),
    ],
)
def test_a_description_that_cannot_be_is_refused_with_a_sentence(parts: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        parse_description(small(**parts))


def test_it_says_what_it_does() -> None:
    description = parse_description(LISTENS)
    assert description.in_words() == ("16 features → context of 48 values → log power spectrum → GRU 8 → smooth 0.75")
    assert parse_description(description.as_json(defaults=False)) == description
    assert parse_description(description.as_json()) == description


def test_thresholds_are_written_in_model_yaml_as_the_manual_shows_them(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text(
        "kind: pipeline\nfeatures: 3\nnetwork: {kind: gru, features: 3, gru: {hidden_size: 4}}\n"
        "after: [hysteresis: {on: 0.6, off: 0.4}]\n"
    )
    same = listens(small(after=[{"hysteresis": {"on": 0.6, "off": 0.4}}]))
    (tmp_path / "weights.safetensors").write_bytes(weights_bytes(same.weights))
    assert load_model(tmp_path).fingerprint == same.fingerprint
