"""What a pipeline does with the values of a frame before the network, and with the network's outputs after it.

A step is one class here and one line in `STEPS`. It describes itself without torch, and it is written three times: in
primitives for one row, in torch for the rows of a batch, and in numpy for the independent reference. They share no
code.
"""
# ruff: noqa: D102 - see `FrameStep`

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field, StrictFloat, StrictInt, model_validator

from instep.models.base import Leaf, PlainFields
from instep.models.pipeline.angles import exact_cosines, exact_sines
from instep.models.portable.builder import Builder, narrow
from instep.models.portable.form import View
from instep_client.protocol.state_spec import DTYPES

if TYPE_CHECKING:
    import torch

Values: TypeAlias = npt.NDArray[Any]
"""[rows, values], float64 or float32 as the reference's dtype."""
States: TypeAlias = dict[str, npt.NDArray[Any]]
Tensors: TypeAlias = "dict[str, torch.Tensor]"
Views: TypeAlias = dict[str, View]
Count: TypeAlias = Annotated[int, Field(ge=1, strict=True)]
Number: TypeAlias = Annotated[StrictFloat | StrictInt, Field(ge=-1e30, le=1e30)]
"""Far within float32."""


class FrameStep(PlainFields, ABC):
    """A step as `model.yaml` holds it: one key, its name, and its options."""

    name: ClassVar[str]
    main: ClassVar[str]
    """The option that stands for all of them in `name: value`."""
    has_reference: ClassVar[bool] = True
    """Whether a small error before the step stays small after it."""

    def outputs(self, inputs: int) -> int:
        """Values per frame after it."""
        return inputs

    def leaves(self, inputs: int) -> tuple[Leaf, ...]:
        """Its part of a stream's state."""
        return ()

    @abstractmethod
    def in_words(self) -> str:
        """`context 3`."""

    def tensors(self, inputs: int) -> dict[str, npt.NDArray[np.float32]]:
        """Its constants by name; equal on every machine."""
        return {}

    @abstractmethod
    def write(self, b: Builder, x: View, state: Views, *tensors: View) -> tuple[View, Views]:
        """Add its primitives for one row: values [inputs] and leaves [*shape] to values and leaves after the frame."""

    @abstractmethod
    def run(self, x: torch.Tensor, state: Tensors, *tensors: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        """The same in torch: values [rows, inputs] and leaves [rows, *shape] to those after the frame."""

    def refer(self, x: Values, state: States) -> tuple[Values, States]:
        """The same in numpy, where `has_reference` is set: values and states after a frame of every row."""
        raise NotImplementedError


class Context(FrameStep):
    """The values before a frame in front of it: of the last `frames` frames, or the last `values` values.

    Features with a context of past frames, and windows that overlap: frames of 160 samples with 352 values of context
    are windows of 512 samples at every 160th. Before a stream's first frame the context is zeros.
    """

    name: ClassVar = "context"
    main: ClassVar = "frames"
    frames: Count | None = None
    values: Count | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Context:
        if (self.frames is None) == (self.values is None):
            raise ValueError("context takes either frames or values: how much of the past to put before each frame")
        return self

    def _size(self, inputs: int) -> int:
        return self.values or (self.frames or 0) * inputs

    def outputs(self, inputs: int) -> int:
        return inputs + self._size(inputs)

    def leaves(self, inputs: int) -> tuple[Leaf, ...]:
        return (Leaf("context", (self._size(inputs),), DTYPES["float32"]),)

    def in_words(self) -> str:
        return f"context of {self.values} values" if self.values else f"context of {self.frames} frames"

    def write(self, b: Builder, x: View, state: Views, *tensors: View) -> tuple[View, Views]:
        size, inputs = state["context"].shape[0], x.shape[0]
        both = b.fresh("float32", (size + inputs,))
        b.map("copy", state["context"], out=narrow(both, 0, 0, size))
        b.map("copy", x, out=narrow(both, 0, size, inputs))
        return both, {"context": narrow(both, 0, inputs, size)}

    def run(self, x: torch.Tensor, state: Tensors, *tensors: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        import torch

        both = torch.cat([state["context"], x], 1)
        return both, {"context": both[:, x.shape[1] :]}

    def refer(self, x: Values, state: States) -> tuple[Values, States]:
        both = np.concatenate([state["context"], x], axis=1)
        return both, {"context": both[:, x.shape[1] :]}


_RAISED: Final = {"hann": 0.5, "hamming": 0.54, "none": 1.0}
"""a in the window a - (1 - a) cos(2 π i / n)."""


class Spectrum(FrameStep):
    """The spectrum of a frame as of one window of samples: n // 2 + 1 values for n samples.

    The samples are multiplied with the window (periodic, as `torch.hann_window` makes it) and transformed as by
    `torch.fft.rfft`. `log_power` is ln(re² + im² + floor).
    """

    name: ClassVar = "spectrum"
    main: ClassVar = "scale"
    scale: Literal["magnitude", "power", "log_power"] = "magnitude"
    window: Literal["hann", "hamming", "none"] = "hann"
    floor: Annotated[Number, Field(gt=0)] = 1e-12

    def outputs(self, inputs: int) -> int:
        return inputs // 2 + 1

    def in_words(self) -> str:
        return f"{self.scale.replace('_', ' ')} spectrum"

    def tensors(self, inputs: int) -> dict[str, npt.NDArray[np.float32]]:
        """The window, and cosines and sines of every frequency, [n // 2 + 1, n] each."""
        cosines = exact_cosines(inputs)
        raised = _RAISED[self.window]
        window = raised - (1 - raised) * cosines
        turns = np.outer(np.arange(self.outputs(inputs)), np.arange(inputs)) % inputs
        sines = exact_sines(inputs)
        return {
            "window": window.astype(np.float32),
            "cosines": cosines[turns].astype(np.float32),
            "sines": sines[turns].astype(np.float32),
        }

    def write(self, b: Builder, x: View, state: Views, *tensors: View) -> tuple[View, Views]:
        window, cosines, sines = tensors
        windowed = b.map("mul", x, window)
        re, im = b.dense(windowed, cosines, 0.0), b.dense(windowed, sines, 0.0)
        power = b.map("fma", re, re, b.map("mul", im, im))
        if self.scale == "magnitude":
            return b.map("sqrt", power), {}
        return (b.map("log", b.map("add", power, float(self.floor))) if self.scale == "log_power" else power), {}

    def run(self, x: torch.Tensor, state: Tensors, *tensors: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        import torch

        found = torch.view_as_real(torch.fft.rfft(x * tensors[0])).square()
        power = found[..., 0] + found[..., 1]
        if self.scale == "magnitude":
            return power.sqrt(), {}
        return ((power + self.floor).log() if self.scale == "log_power" else power), {}

    def refer(self, x: Values, state: States) -> tuple[Values, States]:
        size = x.shape[1]
        turns = np.arange(size) / size
        raised = _RAISED[self.window]
        found = np.fft.rfft(x * (raised - (1 - raised) * np.cos(2 * np.pi * turns)), axis=1)
        power = found.real**2 + found.imag**2
        match self.scale:
            case "magnitude":
                values = np.sqrt(power)
            case "power":
                values = power
            case "log_power":
                values = np.log(power + self.floor)
        return values.astype(x.dtype), {}


class Smooth(FrameStep):
    """Exponential smoothing of every value: `keep` of what it was and the rest of what it is now.

    The first frame of a stream passes unchanged.
    """

    name: ClassVar = "smooth"
    main: ClassVar = "keep"
    keep: Annotated[Number, Field(ge=0, lt=1)]

    def leaves(self, inputs: int) -> tuple[Leaf, ...]:
        return Leaf("smoothed", (inputs,), DTYPES["float32"]), Leaf("has_begun", (), DTYPES["bool"])

    def in_words(self) -> str:
        return f"smooth {self.keep:g}"

    def write(self, b: Builder, x: View, state: Views, *tensors: View) -> tuple[View, Views]:
        fresh = b.map("mul", x, float(1 - self.keep))
        blend = b.map("fma", state["smoothed"], float(self.keep), fresh)
        y = b.map("where", state["has_begun"], blend, x)
        return y, {"smoothed": y, "has_begun": b.map("copy", True, out=b.fresh("bool", ()))}

    def run(self, x: torch.Tensor, state: Tensors, *tensors: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        import torch

        blend = state["smoothed"] * self.keep + x * (1 - self.keep)
        y = torch.where(state["has_begun"].unsqueeze(1), blend, x)
        return y, {"smoothed": y, "has_begun": torch.ones_like(state["has_begun"])}

    def refer(self, x: Values, state: States) -> tuple[Values, States]:
        blend = self.keep * state["smoothed"] + (1 - self.keep) * x
        y = np.where(state["has_begun"][:, None].astype(bool), blend, x).astype(x.dtype)
        return y, {"smoothed": y, "has_begun": np.ones(len(x), state["has_begun"].dtype)}


class Hysteresis(FrameStep):
    """Every value becomes 1 when it reaches `on`, 0 when it falls to `off` or below, and stays what it was between.

    A stream begins at 0.
    """

    name: ClassVar = "hysteresis"
    main: ClassVar = "on"
    has_reference: ClassVar = False
    on: Number
    off: Number

    @model_validator(mode="after")
    def _in_order(self) -> Hysteresis:
        if not self.off < self.on:
            raise ValueError("hysteresis: off must be less than on")
        return self

    def leaves(self, inputs: int) -> tuple[Leaf, ...]:
        return (Leaf("is_on", (inputs,), DTYPES["bool"]),)

    def in_words(self) -> str:
        return f"hysteresis {self.on:g}/{self.off:g}"

    def write(self, b: Builder, x: View, state: Views, *tensors: View) -> tuple[View, Views]:
        stays = b.map("and", state["is_on"], b.map("not", b.map("le", x, float(self.off))))
        is_on = b.map("or", stays, b.map("ge", x, float(self.on)))
        return b.cast(is_on, "float32"), {"is_on": is_on}

    def run(self, x: torch.Tensor, state: Tensors, *tensors: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        is_on = (state["is_on"] & ~(x <= self.off)) | (x >= self.on)
        return is_on.float(), {"is_on": is_on}


STEPS: Final[dict[str, type[FrameStep]]] = {step.name: step for step in (Context, Spectrum, Smooth, Hysteresis)}


def parse_step(value: object) -> object:
    """A step of its form in `model.yaml`: `{name: options}`, or `{name: value}` for its main option.

    Raises:
        ValueError: for anything else, pydantic's own for a wrong option.
    """
    if isinstance(value, FrameStep):
        return value
    if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in STEPS:
        raise ValueError(f"a step is one of {', '.join(STEPS)} with its options, such as `context: 3`")
    ((name, options),) = value.items()
    step = STEPS[name]
    return step.model_validate(options if isinstance(options, Mapping) else {step.main: options})


def sizes(steps: Sequence[FrameStep], inputs: int) -> list[int]:
    """Values per frame before each step and after the last."""
    found = [inputs]
    for step in steps:
        found.append(step.outputs(found[-1]))
    return found
