"""What a pipeline does with the values of a frame before the network, and with the network's outputs after it.

A step is one class here and one line in `STEPS`. It describes itself without torch, runs over the rows of a batch in
torch, and once more in numpy, from its definition, for the independent reference. The two share no code.
"""
# ruff: noqa: D102 - see `FrameStep`

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field, StrictFloat, StrictInt, model_validator

from instep.models.base import Leaf, PlainFields
from instep_client.protocol.state_spec import DTYPES

if TYPE_CHECKING:
    import torch

Values: TypeAlias = npt.NDArray[Any]
"""[rows, values], float64 or float32 as the reference's dtype."""
States: TypeAlias = dict[str, npt.NDArray[Any]]
Tensors: TypeAlias = "Mapping[str, torch.Tensor]"
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

    def multiply_adds(self, inputs: int) -> int:
        """Of one frame, about."""
        return inputs

    @abstractmethod
    def in_words(self) -> str:
        """`context 3`."""

    def constants(self, inputs: int, device: torch.device) -> tuple[torch.Tensor, ...]:
        """What `run` needs besides, made once."""
        return ()

    @abstractmethod
    def run(self, x: torch.Tensor, out: torch.Tensor, state: Tensors, *constants: torch.Tensor) -> None:
        """Step a frame of every row.

        Args:
            x: [rows, inputs].
            out: contiguous, [rows, outputs].
            state: by leaf, [rows, *shape]; changes in place.
            constants: those above.
        """

    @abstractmethod
    def refer(self, x: Values, state: States) -> tuple[Values, States]:
        """The same in numpy: values and states after a frame of every row."""


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

    def run(self, x: torch.Tensor, out: torch.Tensor, state: Tensors, *constants: torch.Tensor) -> None:
        context = state["context"]
        size = context.shape[1]
        out[:, :size].copy_(context)
        out[:, size:].copy_(x)
        context.copy_(out[:, x.shape[1] :])

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

    def multiply_adds(self, inputs: int) -> int:
        return 5 * inputs * max(1, round(math.log2(inputs)))

    def in_words(self) -> str:
        return f"{self.scale.replace('_', ' ')} spectrum"

    def constants(self, inputs: int, device: torch.device) -> tuple[torch.Tensor, ...]:
        import torch

        raised = _RAISED[self.window]
        return (torch.hamming_window(inputs, True, raised, 1 - raised, device=device),)

    def run(self, x: torch.Tensor, out: torch.Tensor, state: Tensors, *constants: torch.Tensor) -> None:
        import torch

        (window,) = constants
        found = torch.view_as_real(torch.fft.rfft(x * window)).square_()
        torch.add(found[..., 0], found[..., 1], out=out)
        if self.scale == "magnitude":
            out.sqrt_()
        elif self.scale == "log_power":
            out.add_(self.floor).log_()

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

    def run(self, x: torch.Tensor, out: torch.Tensor, state: Tensors, *constants: torch.Tensor) -> None:
        import torch

        # Not `lerp` or `add(alpha=)`: whether they round once or twice depends on where an element is.
        blend = state["smoothed"].mul_(self.keep).add_(x * (1 - self.keep))
        torch.where(state["has_begun"].unsqueeze(1), blend, x, out=out)
        state["smoothed"].copy_(out)
        state["has_begun"].fill_(True)

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

    def run(self, x: torch.Tensor, out: torch.Tensor, state: Tensors, *constants: torch.Tensor) -> None:
        is_on = state["is_on"]
        is_on.logical_and_((x <= self.off).logical_not_()).logical_or_(x >= self.on)
        out.copy_(is_on)

    def refer(self, x: Values, state: States) -> tuple[Values, States]:
        is_on = (x >= self.on) | (state["is_on"].astype(bool) & ~(x <= self.off))
        return is_on.astype(x.dtype), {"is_on": is_on.astype(state["is_on"].dtype)}


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
