"""A second kind of model: leaky integrators that also count their frames, stepped in numpy.

Its state has two leaves of different dtypes, its step does not work in place, and it has no call for whole sequences
and no reference: what the engine does with it, it does for any kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch

from instep.core.typing import F32, I64
from instep.models.base import Leaf, Shape, StateSpec
from instep.models.folder import make_model
from instep.models.model import Model
from instep.models.registry import KINDS, ModelKind
from instep_client.protocol.state_spec import DTYPES


@dataclass(frozen=True)
class LeakyDescription:
    """`level ← keep · level + x`; the outputs are the levels and, last, the number of frames."""

    features: int
    keep: float = 0.5
    kind: str = "leaky"

    @property
    def outputs(self) -> int:
        return self.features + 1

    @property
    def state(self) -> StateSpec:
        level = Leaf("level", (self.features,), DTYPES["float32"], initial=0.25)
        return StateSpec((Leaf("frames", (), DTYPES["int64"], initial=3), level))

    def tensor_shapes(self) -> dict[str, Shape]:
        return {"gain": (self.features,)}

    def tensor_dtype(self, tensor: str) -> str:
        return "float32"

    def in_words(self) -> str:
        return f"{self.features} leaky integrators"

    def as_json(self, *, defaults: bool = True) -> dict[str, Any]:
        return asdict(self)


class LeakyStep:
    def __init__(self, network: LeakyNetwork, rows: int) -> None:
        self._keep, self._gain = network.description.keep, network.gain
        features = network.description.features
        self.x = torch.zeros(rows, features)
        self.y = torch.zeros(rows, features + 1)
        self.state = {"level": torch.zeros(rows, features), "frames": torch.zeros(rows, dtype=torch.int64)}
        self.new_state = {name: torch.zeros_like(leaf) for name, leaf in self.state.items()}

    def run(self) -> None:
        level, frames = self.state["level"].numpy(), self.state["frames"].numpy()
        with np.errstate(all="ignore"):
            now = np.float32(self._keep) * level + self._gain * self.x.numpy()
        self.new_state["level"].numpy()[...] = now
        self.new_state["frames"].numpy()[...] = frames + 1
        self.y.numpy()[:, :-1] = now
        self.y.numpy()[:, -1] = frames + 1


class LeakyNetwork:
    row_multiple = 1
    least_probes = 8
    kernel = "numpy"

    def __init__(self, model: Model, device: torch.device) -> None:
        assert isinstance(model.description, LeakyDescription)
        self.description: LeakyDescription = model.description
        self.fingerprint = model.fingerprint
        self.state = self.description.state
        self.device = device
        self.gain: F32 = model.weights["gain"].numpy()
        self.multiply_adds = 2 * self.description.features

    def select_step(self, buckets: Sequence[int], rows: int) -> None:
        pass

    def select_quickest(self) -> None:
        pass

    def bind(self, rows: int) -> LeakyStep:
        return LeakyStep(self, rows)

    def sequence(self, x: Any, state: Any) -> None:
        return None

    def reference(self, dtype: Any) -> None:
        return None


@contextmanager
def registered(network: type[LeakyNetwork] = LeakyNetwork) -> Iterator[None]:
    """The kind is known while the block runs, and is computed by this class."""

    def parse(fields: Mapping[str, Any]) -> LeakyDescription:
        return LeakyDescription(**fields)

    with mock.patch.dict(KINDS, leaky=ModelKind(parse, network)):
        yield


def leaky(features: int = 3) -> Model:
    """A model of this kind; its gains are random."""
    return make_model(LeakyDescription(features), "random", name="leaky", seed=5)


def by_hand(model: Model, x: F32, level: F32 | None = None, frames: int = 3) -> tuple[F32, F32, int]:
    """The truth in plain Python floats rounded once per operation: outputs, level and count after frames [T, F]."""
    assert isinstance(model.description, LeakyDescription)
    gain = model.weights["gain"].tolist()
    levels = [0.25] * len(gain) if level is None else level.tolist()
    outputs = []
    for frame in x.tolist():
        levels = [
            _round(_round(model.description.keep * was) + _round(g * value))
            for was, g, value in zip(levels, gain, frame, strict=True)
        ]
        frames += 1
        outputs.append([*levels, float(frames)])
    return np.array(outputs, np.float32).reshape(len(x), -1), np.array(levels, np.float32), frames


def _round(value: float) -> float:
    assert math.isfinite(value)
    return float(np.float32(value))


SLOTS: I64 = np.array([7, 2, 9], np.int64)
"""Some slots for tests."""
