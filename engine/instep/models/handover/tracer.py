"""Following a tensor through a network while it runs: which functions compute with it, and in which order.

Every function that torch runs passes through the tracer, whether a module, an operator or a method called it. So
nothing that a network does with its input is missed, and what a model folder cannot hold is refused by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any, Final, NoReturn, cast

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from instep.models.errors import ModelError, first_line
from instep.models.handover.layers import RECURRENT, RecurrentModule
from instep.models.recurrent.description import ACTIVATIONS, Activation, activation_name

_LAYERS: Final = (*RECURRENT.values(), nn.Linear, nn.LayerNorm, nn.BatchNorm1d)
"""Modules that are one step each; other modules are what they call."""
_SAME_VALUES: Final = frozenset(
    ("alias", "clone", "detach", "expand", "lift_fresh", "permute", "reshape_alias", "select", "slice", "split")
) | frozenset(("squeeze", "t", "to_copy", "transpose", "unbind", "unsafe_view", "unsqueeze", "view"))
"""Functions that only arrange values. A comparison of outputs shows whether what they leave out is missed."""
_NO_VALUES: Final = frozenset(
    ["empty_like", "full_like", "new_empty", "new_full", "new_ones", "new_zeros", "ones_like", "zeros_like"]
)
"""Functions that take no more than a shape."""


@dataclass(frozen=True, slots=True)
class Step:
    """What happened to a tensor: a layer or an activation."""

    what: nn.Module | Activation
    label: str
    """How sentences name it."""
    width: int
    """Values that it gives for a frame."""


class _EveryFunction:
    """Sees every function that torch runs.

    The method is not in `Tracer`, because one that a subclass of `TorchDispatchMode` defines itself is wrapped, and the
    wrapper imports torch._dynamo, which takes 2 s.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function and see what it does."""
        result = func(*args, **(kwargs or {}))
        self.see(func, args, kwargs or {}, result)
        return result

    def see(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        """Called after each function with its arguments and its result."""
        raise NotImplementedError


class Tracer(_EveryFunction, TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Use it as a context; `steps` then tells what happened to the tensor that it was told to `follow`.

    Args:
        subject: how sentences call what is traced.
        advice: what to do where it cannot be served.

    Raises:
        ModelError: in the code that it follows, where that does something that a model folder cannot hold.
    """

    def __init__(self, subject: str, advice: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._advice = advice
        self.steps: list[Step] = []
        self.initial_state: list[torch.Tensor] = []
        """What the recurrent module begins with, [layers, hidden size] by leaf; empty for zeros."""
        self.refusal: ModelError | None = None
        """Kept too, for code that catches every exception."""
        self._modules: list[tuple[str, nn.Module]] = []
        """Those that are running, outermost first."""
        self._subject = subject
        self._inside_layer = False
        self._is_away = False
        """Inside a layer nothing passes through the tracer: a recurrent one runs thousands of functions."""
        self._origins: dict[int, tuple[torch.Tensor, int]] = {}
        """By id, the tensor itself, so that no other gets its id, and the number of steps that lead to it."""

    def __exit__(self, *error: object) -> None:
        if not self._is_away:  # else an error has ended the layer
            super().__exit__(*(error or (None, None, None)))  # type: ignore[no-untyped-call]

    def follow(self, values: object, steps: int = 0) -> None:
        """From here on, these tensors are what the first `steps` steps gave."""
        for tensor in _tensors(values):
            if tensor.dtype != torch.float32:
                self.refuse(f"{self._subject} computes in {str(tensor.dtype).removeprefix('torch.')}")
            self._origins[id(tensor)] = tensor, steps

    def origin(self, values: object) -> int | None:
        """How many steps lead to the first of these tensors that is followed; None where none is."""
        found = (self._origins[id(tensor)][1] for tensor in _tensors(values) if id(tensor) in self._origins)
        return next(found, None)

    def watch(self, module: nn.Module) -> list[Any]:
        """Notice the layers in a module; returns the hooks to remove."""
        hooks: list[Any] = []
        for name, part in module.named_modules():
            enter, leave = partial(self._enter, plain_path(name)), partial(self._leave, plain_path(name))
            hooks.append(part.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(part.register_forward_hook(leave, with_kwargs=True))
        return hooks

    def refuse(self, sentence: str, advice: str = "") -> NoReturn:
        """Refuse what is traced."""
        self.refusal = ModelError(f"{sentence}: {advice or self._advice}")
        raise self.refusal

    def see(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        """Note what a function has done with the tensor that is followed."""
        origin = None if self._inside_layer else self.origin((args, kwargs))
        name = func.overloadpacket.__name__.strip("_") if func.namespace == "aten" else str(func)
        if origin is None or name in _NO_VALUES:
            return
        if name in _SAME_VALUES:
            self.follow(result, origin)
        elif name in ACTIVATIONS:
            self._check_parameters(name, func, args, kwargs)
            self._add(name, name, origin, result)
        else:
            self._refuse_function(name)

    def _add(self, what: nn.Module | Activation, label: str, origin: int, result: object) -> None:
        if origin != len(self.steps):
            given = f"the output of {self.steps[origin - 1].label}" if origin else "its input"
            self.refuse(
                f"{self._subject} uses {given} more than once, for {self.steps[origin].label} and for {label}",
                "run each layer once, on the output of the one before it, with one layer for the outputs of several "
                "heads, or write the network as a step and export it with instep.models.export_step",
            )
        self.steps.append(Step(what, label, next(_tensors(result)).shape[-1]))
        self.follow(result, len(self.steps))

    def _check_parameters(self, name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        x, *others = args
        declared = func._schema.arguments
        given = dict(zip([argument.name for argument in declared[1:]], others, strict=False)) | kwargs
        if name == "softmax":
            if given.pop("dim") not in (-1, x.ndim - 1):
                self.refuse("softmax over another dimension than the last cannot be served")
            given.pop("half_to_float")
        defaults = {argument.name: argument.default_value for argument in declared}
        for key, value in given.items():
            if value != defaults[key]:
                self.refuse(f"{name} with {key}={value} cannot be served, only with torch's default of {defaults[key]}")

    def _refuse_function(self, name: str) -> None:
        label, module = self._modules[-1] if self._modules else ("", None)
        kind = type(module)
        if module is not None and kind.__module__.startswith("torch.") and not isinstance(module, torch.fx.GraphModule):
            self.refuse(f"`{label}` is a {kind.__name__}, which cannot be served as a layer")
        where = self._subject if module is None else f"{kind.__name__}.forward"
        self.refuse(f"{where} computes `{name}`, which cannot be served as a layer")

    def _enter(self, label: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._modules.append((label, module))
        if not _is_layer(module):
            return
        self._inside_layer = True
        if _get_current_dispatch_mode() is self:  # and no other one that the forward has begun inside it
            self.__exit__()
            self._is_away = True
        if isinstance(module, RecurrentModule):
            state = (*args[1:], kwargs.get("hx"))
            if self.origin(state) is not None:
                self.refuse(f"{self._subject} runs `{label}` again on its state", "run it once over the whole sequence")
            self._begin(label, [tensor.detach() for tensor in _tensors(state)])

    def _begin(self, label: str, state: Sequence[torch.Tensor]) -> None:
        """Note what the recurrent module begins with: [layers, hidden size], with rows in the middle if there are."""
        if any(bool((leaf != leaf[:, :1]).any()) for leaf in state if leaf.ndim > 2):
            self.refuse(
                f"`{label}` begins each sequence with another state, and a model folder holds one for all",
                "hand over the layers one by one, and open each stream with its state",
            )
        if any(bool(leaf.any()) for leaf in state):
            self.initial_state = [leaf[:, 0] if leaf.ndim > 2 else leaf for leaf in state]

    def _leave(self, label: str, module: nn.Module, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        self._modules.pop()
        if _is_layer(module):
            self._inside_layer = False
            if self._is_away:
                self._is_away = False
                self.__enter__()  # type: ignore[no-untyped-call]
            origin = self.origin(args[0] if args else kwargs["input"])
            if origin is not None:
                self._add(module, f"`{label}`", origin, result)


def activation_of(given: object, place: str) -> Activation:
    """The activation that a name, a module or a function of torch means; `place` is how sentences call it.

    Raises:
        ModelError: when it is none that can be served.
    """
    name = activation_name(given)
    if name in ACTIVATIONS:
        return name
    allowed = f"give one of {', '.join(ACTIVATIONS)}, or torch's module or function of that name"
    if isinstance(given, type) and issubclass(given, nn.Module):
        raise ModelError(f"{place} is the class {given.__name__}: give a module of it, {given.__name__}()")
    if isinstance(given, str) and (close := get_close_matches(given.lower(), ACTIVATIONS, n=1)):
        allowed = f"did you mean {close[0]}? If not, {allowed}"
    if not callable(given) or isinstance(given, type):
        raise ModelError(f"{place} is {given!r:.80}: {allowed}")
    tracer, x = Tracer(place, allowed), torch.linspace(-3, 3, 12).view(3, 4)
    tracer.follow(x)
    try:
        with torch.no_grad(), tracer:
            result = cast("Callable[[torch.Tensor], object]", given)(x)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{place} is {given!r:.80}, which fails ({first_line(error)}): {allowed}") from None
    if len(tracer.steps) > 1 or tracer.origin(result) != len(tracer.steps):
        raise ModelError(f"{place} is {given!r:.80}, which is not one function: {allowed}")
    step = tracer.steps[0].what if tracer.steps else "none"
    assert not isinstance(step, nn.Module)
    return step


def plain_path(name: str) -> str:
    """A module's path without what torch.compile wraps around it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _is_layer(module: nn.Module) -> bool:
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in _LAYERS)


def _tensors(values: object) -> Any:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
