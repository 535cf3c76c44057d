"""A kind of model that the engine does not have: a description, a normal form, and a line in the registry."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from instep.models.folder import load_model, write_model
from instep.models.network import PortableNetwork
from instep.models.registry import build
from tests.support.leaky import by_hand, leaky, registered
from tests.support.running import CPU

MODEL = leaky(3)
SPEC = MODEL.description.state


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with registered():
        yield


def test_its_folder_is_read_back(tmp_path: Path) -> None:
    write_model(tmp_path, MODEL)
    found = load_model(tmp_path)
    assert (found.description, found.fingerprint) == (MODEL.description, MODEL.fingerprint)
    assert isinstance(build(found, CPU), PortableNetwork)


def test_without_a_module_of_torch_and_a_reference_the_definition_is_left() -> None:
    network, x = build(MODEL, CPU), np.ones((5, 2, 3), np.float32)
    rows = SPEC.initial(2)
    assert (network.sequence(x, rows), network.reference(np.float64)) == (None, None)
    definition = network.definition()
    assert definition is not None
    y, after = definition.run(x, SPEC.unpack(rows), np.array([2, 2, 2, 1, 1]))
    expected, level, _ = by_hand(MODEL, x[:, 0])
    np.testing.assert_array_equal(y[:, 0], expected)
    np.testing.assert_array_equal(after["level"][0], level)
    assert after["frames"].tolist() == [3 + 5, 3 + 3]
