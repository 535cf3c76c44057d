"""Steps around a network: the truth is torch's `stft` and `nn.GRU` over whole signals, a loop, or the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from instep.core.typing import F32, U8
from instep.models.base import StateSpec
from instep.models.errors import ModelError
from instep.models.folder import load_model, write_model
from instep.models.network import PortableNetwork
from instep.models.registry import parse_description
from instep.models.stepping import step_frames
from instep.models.weights import weights_bytes
from instep.recording.reader import RecordingReader
from instep.verify import verifier
from instep_client import AsyncClient
from tests.support.pipelines import CONTEXT, HOP, LISTENS, gru_inside, listens, whole_signal
from tests.support.running import running
from tests.support.verifying import ignore_progress


def small(**parts: Any) -> dict[str, Any]:
    return {"kind": "pipeline", "features": 3, "network": {"features": 3, "gru": {"hidden_size": 4}}, **parts}


def stepped(network: PortableNetwork, x: F32) -> F32:
    """Frames [T, R, features] one after another, from the initial state."""
    return step_frames(network, x, network.state.initial(x.shape[1]))[0]


def test_overlapping_windows_spectra_and_smoothing_are_those_of_the_whole_signal(rng: np.random.Generator) -> None:
    model = listens(LISTENS)
    network = PortableNetwork(model)
    x = rng.standard_normal((30, 6, HOP)).astype(np.float32)
    y = stepped(network, x)
    for row in (0, 5):
        np.testing.assert_allclose(y[:, row], whole_signal(model, x[:, row]), atol=2e-6)


SPECTRA: dict[str, dict[str, Any]] = {
    "listens": LISTENS,
    **{
        f"{scale} {window} {size}": {
            "kind": "pipeline",
            "features": size,
            "before": [{"spectrum": {"scale": scale, "window": window}}],
            "network": {"kind": "rnn", "features": size // 2 + 1, "rnn": {"hidden_size": 4}},
        }
        for scale, window, size in (("magnitude", "hamming", 15), ("power", "none", 32), ("log_power", "hann", 21))
    },
    "everything": {
        "kind": "pipeline",
        "features": 3,
        "before": [{"smooth": 0.3}, {"context": 2}, {"smooth": 0.9}, {"context": {"values": 4}}],
        "network": {
            "kind": "lstm",
            "features": 13,
            "lstm": {"hidden_size": 6, "num_layers": 2},
            "initial_state": "learned",
        },
        "after": [{"spectrum": "magnitude"}, {"context": 1}, {"smooth": 0.5}],
    },
}


@pytest.mark.parametrize("name", SPECTRA)
def test_the_normal_form_the_module_of_torch_and_the_reference_agree(name: str, rng: np.random.Generator) -> None:
    network = PortableNetwork(listens(SPECTRA[name]))
    x, rows = rng.standard_normal((12, 7, network.description.features)).astype(np.float32), network.state.initial(7)
    y, after = step_frames(network, x, rows)
    whole, reference = network.sequence(x, rows), network.reference(np.float64)
    assert whole is not None
    assert reference is not None
    truth, final = reference.run(x.astype(np.float64), widened(network.state, rows), np.full(12, 7))
    for outputs, states in ((y, after), whole):
        np.testing.assert_allclose(outputs, truth, rtol=1e-4, atol=2e-5)
        for leaf, values in network.state.unpack(states).items():
            np.testing.assert_allclose(values, final[leaf], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", SPECTRA)
def test_bits_are_those_of_the_definition_in_every_batch(name: str, rng: np.random.Generator) -> None:
    network = PortableNetwork(listens(SPECTRA[name]))
    x, rows = rng.standard_normal((9, 40, network.description.features)).astype(np.float32), network.state.initial(40)
    y, after = step_frames(network, x, rows)
    found, leaves = network.definition().run(x, network.state.unpack(rows), np.full(9, 40))
    assert found.tobytes() == y.tobytes()
    assert network.state.pack(leaves).tobytes() == after.tobytes()
    for first, last in ((0, 1), (5, 8), (7, 24), (0, 33)):
        assert stepped(network, x[:, first:last]).tobytes() == np.ascontiguousarray(y[:, first:last]).tobytes()


def widened(spec: StateSpec, rows: U8) -> dict[str, Any]:
    """Leaves of the reference in float64."""
    return {
        name: leaf.astype(np.float64) if leaf.dtype.kind == "f" else leaf.copy()
        for name, leaf in spec.unpack(rows).items()
    }


def test_the_reference_in_float64_agrees_and_knows_rows_of_different_lengths(rng: np.random.Generator) -> None:
    model = listens(LISTENS)
    reference = PortableNetwork(model).reference(np.float64)
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
    reference = PortableNetwork(model).reference(np.float64)
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
    np.testing.assert_allclose(stepped(PortableNetwork(model), x), y.numpy(), atol=1e-6)


def test_hysteresis_switches_at_its_thresholds_and_has_no_reference(rng: np.random.Generator) -> None:
    model = listens(small(after=[{"hysteresis": {"on": 0.1, "off": -0.1}}]))
    network = PortableNetwork(model)
    x = rng.standard_normal((40, 4, 3)).astype(np.float32)
    with torch.inference_mode():
        values = gru_inside(model, 3, 4)(torch.from_numpy(x))[0].numpy()
    is_on, expected = np.zeros(values[0].shape, bool), []
    for row in values:
        is_on = np.where(row >= 0.1, True, np.where(row <= -0.1, False, is_on))
        expected.append(is_on)
    assert 0 < np.mean(expected) < 1
    np.testing.assert_array_equal(stepped(network, x), np.array(expected, np.float32))
    rows = network.state.initial(4)
    whole, defined = network.sequence(x, rows), network.definition().run(x, network.state.unpack(rows), np.full(40, 4))
    assert whole is not None
    for y in (whole[0], defined[0]):
        np.testing.assert_array_equal(y, np.array(expected, np.float32))
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
    assert {stream.verdict for stream in report.streams} == {"exact"}


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
