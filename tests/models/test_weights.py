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


def test_a_later_change_of_the_file_does_not_reach_what_was_loaded(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(good_tensors(), path)
    loaded = load_weights(path, DESCRIPTION)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(bytes(size))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in good_tensors().items())


def refused(path: Path, tensors: dict[str, torch.Tensor], *named: str) -> None:
    save_file(tensors, path)
    with pytest.raises(ModelError) as error:
        load_weights(path, DESCRIPTION)
    assert all(name in str(error.value) for name in named)


def test_tensors_that_are_missing_too_many_or_not_finite_are_named(tmp_path: Path) -> None:
    path, tensors = tmp_path / "w.safetensors", good_tensors()
    refused(path, {name: tensors[name] for name in list(tensors)[2:]}, *list(tensors)[:2])
    refused(path, tensors | {f"gru.weight_ih_l{layer}": torch.zeros(1) for layer in range(1, 7)}, "gru.weight_ih_l1")
    for value in (float("nan"), float("inf")):
        tensors["gru.weight_hh_l0"][4, 1] = value
        refused(path, tensors, "gru.weight_hh_l0")


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
