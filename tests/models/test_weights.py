from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from instep.models.errors import ModelError
from instep.models.model import load_weights
from instep.models.recurrent.description import DenseLayer, GruDescription, GruLayers

DESCRIPTION = GruDescription(features=2, gru=GruLayers(hidden_size=3), after=(DenseLayer(size=4, activation="tanh"),))


def good_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in DESCRIPTION.tensor_shapes().items()}


def test_what_safetensors_wrote_is_read_bit_for_bit(tmp_path: Path) -> None:
    tensors = good_tensors()
    save_file(tensors, tmp_path / "w.safetensors")
    loaded = load_weights(tmp_path / "w.safetensors", DESCRIPTION)
    assert list(loaded) == list(DESCRIPTION.tensor_shapes())
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_a_later_change_of_the_file_does_not_reach_what_was_loaded(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(good_tensors(), path)
    loaded = load_weights(path, DESCRIPTION)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(bytes(size))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in good_tensors().items())


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    tensors = good_tensors()
    del tensors["gru.bias_hh_l0"], tensors["after.0.weight"]
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"lacks .* tensor gru\.bias_hh_l0 \[9\], after\.0\.weight \[4, 3\]; add"):
        load_weights(tmp_path / "w.safetensors", DESCRIPTION)


def test_extra_tensors_are_named_and_long_lists_cut_short(tmp_path: Path) -> None:
    extra = {f"gru.weight_ih_l{layer}": torch.zeros(1) for layer in range(1, 7)}
    save_file(good_tensors() | extra, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"does not have: tensor 'gru\.weight_ih_l1', .*l4' and 2 more; leave"):
        load_weights(tmp_path / "w.safetensors", DESCRIPTION)


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
    ],
)
def test_non_finite_weights_are_named(tmp_path: Path, value: float) -> None:
    tensors = good_tensors()
    tensors["gru.weight_hh_l0"][4, 1] = value
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"tensor gru\.weight_hh_l0 of .* NaN or infinity in 1 of 27"):
        load_weights(tmp_path / "w.safetensors", DESCRIPTION)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04 a zip, as torch.save writes", save(good_tensors())[:-4]],
    ids=["empty", "zip", "cut short"],
)
def test_what_is_not_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"w\.safetensors is not a whole safetensors file"):
        load_weights(tmp_path / "w.safetensors", DESCRIPTION)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_file_loads_as_the_description_says_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(save(good_tensors()))
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, header + 8) | st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    try:
        loaded = load_weights(path, DESCRIPTION)
    except ModelError:
        return
    shapes = {name: tuple(tensor.shape) for name, tensor in loaded.items()}
    assert shapes == DESCRIPTION.tensor_shapes()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in loaded.values())
