"""The layers of an `nn.Module`, found by running its forward, and compared with what the forward gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Final, cast

import torch
from torch import nn

from instep.models.agreement import Agreement, agreement, first_output
from instep.models.errors import ModelError, first_line
from instep.models.handover.layers import SERVED, Chain, FrameLayer, Recurrent, RecurrentModule, dense, layer_of_module
from instep.models.handover.tracer import Step, Tracer, plain_path
from instep.models.model import Model
from instep.models.recurrent.description import Activation
from instep.models.registry import build

ROWS, STEPS = 2, 6
"""Of the random input: sequences, and frames of each."""
MORE_STEPS: Final = 397
"""A second input is longer by this prime, which neither a window nor a chunk of frames divides."""


class TracedModule:
    """An `nn.Module` with one `nn.GRU`, `nn.LSTM` or `nn.RNN` somewhere in it.

    Args:
        module: the whole network; it may be compiled, and on any device.
        example: its input, or a tuple of all its arguments; random frames if None.

    Raises:
        ModelError: when it has none of these, or several, or one that cannot be served.
    """

    def __init__(self, module: nn.Module, example: Any) -> None:
        self._module = module
        self._kind = type(module).__name__
        self._layers = {plain_path(name): part for name, part in module.named_modules() if name}
        self._recurrent = self._only_recurrent()
        tensor = next(iter(module.parameters()))
        if tensor.dtype != torch.float32:
            raise ModelError(
                f"the weights of {self._kind} are {str(tensor.dtype).removeprefix('torch.')}, and only float32 is "
                "served: convert it with .float()"
            )
        self._device = tensor.device
        self._arguments: tuple[Any, ...] | None = None
        self._steps: Sequence[Step] = ()
        if example is not None:
            self._arguments = example if isinstance(example, tuple) else (example,)
            if not isinstance(self._arguments[0], torch.Tensor) or self._arguments[0].dtype != torch.float32:
                raise ModelError("example must be a float32 tensor of frames, or a tuple that begins with one")

    def chain(self) -> Chain:
        """The layers in the order in which the forward runs them.

        Raises:
            ModelError: when it cannot be run, or computes something that a model folder cannot hold.
        """
        if self._arguments is not None:
            try:
                return self._layers_of(self._arguments)
            except _CannotRun as error:
                shape = list(self._arguments[0].shape)
                raise ModelError(
                    f"{self._kind}.forward fails on the example {shape} {error}; give an example that it takes"
                ) from error
        linears = [part.in_features for part in self._layers.values() if isinstance(part, nn.Linear)]
        failure = ""
        for features in dict.fromkeys([*self._first_sizes(), *linears]):
            try:
                self._arguments = (_random_frames((ROWS, STEPS, features), self._device),)
                return self._layers_of(self._arguments)
            except _CannotRun as error:
                failure = failure or f"on random input [{ROWS}, {STEPS}, {features}] {error}"
        raise ModelError(
            f"{self._kind}.forward fails {failure}; give it an example of its input, as in "
            f"save_model(path, net, example=x), or hand over its layers: {self.call_to_make()}"
        )

    def check(self, model: Model) -> None:
        """Compare what a model of these layers gives with what the forward gives, on random frames of two lengths.

        Raises:
            ModelError: when they differ by more than float32 rounds, or the forward depends on the length.
        """
        assert self._arguments is not None
        x, *others = self._arguments
        found = self._compare(model, x.shape)
        axes = [found.steps_axis]
        if x.numel() == x.shape[-1]:  # one frame does not tell its axes apart
            axes = sorted([found.steps_axis, found.rows_axis], reverse=self._recurrent.batch_first)
        for axis in axes:
            if axis < 0:
                continue
            longer = list(x.shape)
            longer[axis] += MORE_STEPS
            self._check_layers(_random_frames(longer, self._device), others, x.shape)
            if self._compare(model, longer).steps_axis == axis:
                return

    def _check_layers(self, x: torch.Tensor, others: Sequence[Any], before: Sequence[int]) -> None:
        by_hand = f"take frames of any length, or hand over the layers one by one: {self.call_to_make()}"
        place = f"on frames {list(x.shape)}"
        try:
            steps = self._trace((x, *others)).steps
        except _CannotRun as error:
            raise ModelError(
                f"{self._kind}.forward runs on frames {list(before)} and fails {place} {error}, but a stream may have "
                f"any length: {by_hand}"
            ) from error
        except ModelError as error:
            raise ModelError(f"{place}, {error}") from error
        if [(step.what, step.label) for step in steps] != [(step.what, step.label) for step in self._steps]:
            raise ModelError(
                f"{self._kind}.forward runs other layers {place} than on {list(before)}, but a stream may have any "
                f"length: {by_hand}"
            )

    def _compare(self, model: Model, shape: Sequence[int]) -> Agreement:
        assert self._arguments is not None
        x = _random_frames(shape, self._device)
        with evaluating(self._module):
            y = first_output(self._module(x.clone(), *self._arguments[1:]), self._kind)
        network = build(model, torch.device("cpu"))
        found = agreement(network, x.cpu().numpy(), y.float().cpu().numpy())
        if found is None:
            raise ModelError(
                f"{self._kind}.forward gives the shape {list(y.shape)} for frames {list(x.shape)}; return the "
                f"{model.description.outputs} values of its last layer for each frame, or for the last frame of each "
                f"sequence: {model.description.in_words()}"
            )
        if not found.agrees:
            raise ModelError(
                f"{self._kind}.forward gives other values than its layers do in the order in which it runs them "
                f"({model.description.in_words()}): on frames {list(x.shape)} they differ by {found.error:.2g}, "
                f"where rounding explains {found.tolerance:.2g}; return the values of its last layer for each frame, "
                "or for the last frame of each sequence, however long it is"
            )
        return found

    def call_to_make(self) -> str:
        """The call that hands over the layers one by one, in the order of the attributes, without activations."""
        recurrent_at = list(self._layers.values()).index(self._recurrent)
        places: dict[str, list[str]] = {"before": [], "after": []}
        words = []
        for at, (name, part) in enumerate(self._layers.items()):
            if isinstance(part, RecurrentModule):
                words.append(f"`{name}` ({type(part).__name__} {part.input_size}→{part.hidden_size})")
                continue
            if isinstance(part, nn.Linear):
                words.append(f"`{name}` (Linear {part.in_features}→{part.out_features})")
            elif isinstance(part, nn.LayerNorm):
                words.append(f"`{name}` (LayerNorm)")
            else:
                continue
            places["before" if at < recurrent_at else "after"].append(f'({_expression(name)}, "none")')
        given = "".join(f", {place}=[{', '.join(pairs)}]" for place, pairs in places.items() if pairs)
        (name,) = (name for name, part in self._layers.items() if part is self._recurrent)
        activations = '; name the activation after each layer in place of "none"' if given else ""
        return f"{self._kind} has {' and '.join(words)}{activations}: save_model(path, {_expression(name)}{given})"

    def _only_recurrent(self) -> RecurrentModule:
        everything = {"": self._module, **self._layers}
        found = {name: part for name, part in everything.items() if isinstance(part, RecurrentModule)}
        if len(found) == 1:
            ((name, module),) = found.items()
            Recurrent.of(f"`{name}`", module)  # for what it says about one that cannot be served
            return module
        if found:
            names = ", ".join(f"`{name}` ({type(part).__name__})" for name, part in found.items())
            raise ModelError(
                f"{self._kind} has {len(found)} recurrent modules, {names}, and one can be handed over: write the "
                "network as a step and export it with instep.models.export_step, or train one module, with num_layers "
                "if they follow each other"
            )
        for name, part in everything.items():
            if sentence := why_not_served(part):
                raise ModelError(f"{self._kind} has `{name}`, and {sentence}" if name else sentence)
        raise ModelError(f"{self._kind} has no recurrent module; {SERVED}")

    def _first_sizes(self) -> Iterator[int]:
        """Of the layers up to the recurrent one, in the attributes' order: the frames' size is likely the first."""
        for part in self._layers.values():
            if isinstance(part, nn.Linear):
                yield part.in_features
            elif part is self._recurrent:
                break
        yield self._recurrent.input_size

    def _layers_of(self, arguments: Sequence[Any]) -> Chain:
        traced = self._trace(arguments)
        self._steps = traced.steps
        if traced.initial_state and len(arguments) > 1:
            raise ModelError(
                f"{self._kind}.forward begins with a state that is not zero, and the example may be where it comes "
                "from: give zeros in the example, and open streams with the state"
            )
        return _chain(traced.steps, traced.initial_state, self._kind, arguments[0].shape[-1])

    def _trace(self, arguments: Sequence[Any]) -> Tracer:
        without_it = (
            "write the network as a step and export it with instep.models.export_step; or train it without that; or, "
            "where it comes first or last, compute it in the client and hand over the other layers: "
            f"{self.call_to_make()}"
        )
        tracer = Tracer(f"{self._kind}.forward", without_it)
        x = arguments[0].clone()  # the forward may change it
        tracer.follow(x)
        hooks = tracer.watch(self._module)
        try:
            with evaluating(self._module), tracer:
                result = self._module(x, *arguments[1:])
        except ModelError:
            raise
        except Exception as error:
            raise _CannotRun(f"({first_line(error)})") from error
        finally:
            for hook in hooks:
                hook.remove()
        if tracer.refusal is not None:
            raise tracer.refusal
        if tracer.origin(first_output(result, self._kind)) != len(tracer.steps):
            last = tracer.steps[-1].label if tracer.steps else "its layers"
            raise ModelError(
                f"{self._kind}.forward does not return first what comes last, from {last}; return the outputs first, "
                "and compute everything with torch"
            )
        return tracer


class _CannotRun(Exception):
    pass


def why_not_served(module: nn.Module) -> str | None:
    """What to do about a module of a kind that takes a recurrent one's place; None for others."""
    kind = type(module)
    name = kind.__name__
    if "quantized" in kind.__module__:
        return f"a quantised {name} cannot be served, only float32: hand over the network that it was made from"
    if isinstance(module, nn.RNNCellBase):
        whole = name.removesuffix("Cell")
        return (
            f"an nn.{name} is one step of {'a' if whole == 'GRU' else 'an'} {whole}: make an nn.{whole} of the same "
            "sizes and copy the cell's weights to it (weight_ih to weight_ih_l0, and so on)"
        )
    if isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
        return "a compiled graph cannot be served: hand over the module that it was made from, or its state dict"
    return None


def _chain(steps: Sequence[Step], initial_state: Sequence[torch.Tensor], kind: str, features: int) -> Chain:
    before: list[FrameLayer] = []
    after: list[FrameLayer] = []
    recurrent: Recurrent | None = None
    layers, width = before, features
    previous: Step | None = None
    for step in steps:
        last = layers[-1] if previous and isinstance(previous.what, nn.Linear | nn.LayerNorm | nn.BatchNorm1d) else None
        if isinstance(step.what, RecurrentModule):
            if recurrent is not None:
                raise ModelError(f"{kind}.forward runs {step.label} twice: train one with num_layers=2")
            recurrent, layers = Recurrent.of(step.label, step.what), after
        elif isinstance(step.what, nn.Linear | nn.LayerNorm):
            layers.append(layer_of_module(step.label, step.what))
        elif isinstance(step.what, nn.BatchNorm1d):
            if step.what.running_mean is None:
                raise ModelError(f"{step.label} keeps no running statistics; train it with track_running_stats=True")
            if last is None or not last.is_dense:
                last = dense(step.label, torch.eye(step.what.num_features, device=step.what.running_mean.device))
                layers.append(last)
            layers[-1] = last.normalised(step.what)
        else:
            activation = cast("Activation", step.what)
            if last is not None:
                layers[-1] = replace(last, activation=activation)
            else:
                layers.append(dense(step.label, torch.eye(width), None, activation))  # which changes no value
        previous, width = step, step.width
    if recurrent is None:
        raise ModelError(f"{kind}.forward does not run its recurrent module on its input; {SERVED}")
    return Chain(before, recurrent, after, dict(zip(("h", "c"), initial_state, strict=False)))


def _random_frames(shape: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)


def _expression(name: str) -> str:
    """How Python reaches a part of `net`: `net.body[0].gru`."""
    return "net" + "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in name.split("."))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run a module as it is served: evaluating, without gradients, and without compiling anything."""
    training = [part for part in module.modules() if part.training]
    is_compiled = any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in module.modules())
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if is_compiled and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        module.eval()
        try:
            yield
        finally:
            for part in training:
                part.training = True
