"""Another kind of model: leaky integrators that also count their frames.

Its state has two leaves of different dtypes, and it has no module of torch and no reference: what the engine does with
it, it does for any kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import numpy as np

from instep.core.typing import F32, I64
from instep.models.base import Leaf, Shape, StateSpec
from instep.models.folder import make_model
from instep.models.model import Model
from instep.models.portable.form import Builder, Form, narrow, select
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


def normal_form(description: LeakyDescription) -> Form:
    """The step."""
    b, shape = Builder(), (description.features,)
    x, frames, level = b.input("float32", shape), b.input("int64", ()), b.input("float32", shape)
    gained = b.map("mul", b.tensor("gain", "float32", shape), x)
    now = b.map("add", b.map("mul", description.keep, level), gained)
    count = b.map("add", frames, 1)
    y = b.fresh("float32", (description.features + 1,))
    b.map("copy", now, out=narrow(y, 0, 0, description.features))
    b.map("copy", b.cast(count, "float32"), out=select(y, 0, description.features))
    return b.form([y, count, now])


@contextmanager
def registered() -> Iterator[None]:
    """The kind is known while the block runs."""

    def parse(fields: Mapping[str, Any]) -> LeakyDescription:
        return LeakyDescription(**fields)

    def none(*_: object) -> None:
        return None

    with mock.patch.dict(KINDS, leaky=ModelKind(parse, normal_form, none, none)):
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
