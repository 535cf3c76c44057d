"""The layers of an `nn.Module`, read from the graph that `torch.fx` makes of its forward.

The graph shows which layers there are. A comparison of outputs shows that nothing else matters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from operator import attrgetter
from types import MappingProxyType
from typing import Any, Final, NoReturn

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from instep.core.typing import F32
from instep.models.agreement import Agreement, agreement, first_output
from instep.models.errors import ModelError, first_line
from instep.models.handover.layers import (
    RECURRENT,
    SERVED,
    Chain,
    Layer,
    RecurrentModule,
    check_recurrent,
    dense,
    folded,
    sizes,
)
from instep.models.model import Model
from instep.models.recurrent.description import ACTIVATIONS, Activation, activation_name
from instep.models.recurrent.module import FUNCTIONS
from instep.models.registry import build

ROWS: Final = 32
STEPS: Final = 6
"""Of the random frames: sequences, and frames of each."""
MORE_STEPS: Final = 397
"""A second input is longer by this prime, which neither a window nor a chunk of frames divides."""
_LAYERS: Final = (*RECURRENT.values(), nn.Linear, nn.LayerNorm, nn.BatchNorm1d)
_ARRANGING: Final = frozenset(
    ["chunk", "expand", "flatten", "getitem", "movedim", "narrow", "permute", "reshape", "select", "split", "squeeze"]
) | {"swapaxes", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view"}
"""Functions that only arrange values. The comparison of outputs shows whether what they leave out is missed."""
_OF_SHAPES: Final = frozenset(
    ["empty_like", "full_like", "new_empty", "new_full", "new_ones", "new_zeros", "ones_like", "zeros_like"]
)
"""Functions that take only the shape of their tensor."""
_LIKE: Final = frozenset(["to", "type_as"])
"""Methods that take only the dtype and the device of their argument."""
_SIZES: Final = frozenset(["dim", "is_contiguous", "is_floating_point", "ndimension", "numel", "size", "stride"])
"""Methods whose results do not depend on values."""
_INSTEAD: Final = (
    "write the network as a step and export it with instep.models.export_step, or hand over the layers that are served "
    "one by one: save_model(path, net.gru, before=[…], after=[…])"
)


class TracedModule:
    """An `nn.Module` with one `nn.GRU`, `nn.LSTM` or `nn.RNN` somewhere in it.

    Args:
        module: the whole network; it may be compiled, and on any device.
        example: its input, or a tuple of all its arguments; random frames if None.

    Raises:
        ModelError: when it does something that a model folder cannot hold.
    """

    def __init__(self, module: nn.Module, example: Any) -> None:
        self._module, self._kind, self._has_example = module, type(module).__name__, example is not None
        _check_recurrent(module)
        tensor = next(module.parameters())
        if tensor.dtype != torch.float32:
            raise ModelError(f"the weights of {self._kind} are {_plain(tensor.dtype)}: convert them with .float()")
        self._device = tensor.device
        given = example if isinstance(example, tuple) else (example,)
        if self._has_example and not (given and isinstance(given[0], torch.Tensor) and given[0].dtype == torch.float32):
            raise ModelError("example must be a float32 tensor of frames, or a tuple that begins with one")
        if self._has_example and given[0].numel() == given[0].shape[-1]:
            raise ModelError("example is a single frame, which does not tell its axes apart; give a sequence")
        self._others = given[1:]
        layers = (layer for layer in module.modules() if _is_layer(layer))
        shapes = [given[0].shape] if self._has_example else [(ROWS, STEPS, sizes(layer)[0]) for layer in layers]
        with evaluating(module):
            self._shape, tracer, graph = self._traced(list(dict.fromkeys(shapes)))
            self.chain: Final = _Walk(self._kind, tracer, self._shape[-1]).chain(graph)
        """The layers in the order in which the forward runs them."""
        if self.chain.initial_state and self._others:
            raise ModelError(
                f"{self._kind}.forward begins with a state that is not zero, and the example may be where it comes "
                "from: give zeros in the example, and open streams with the state"
            )

    def check(self, model: Model) -> None:
        """Compare what a model of these layers gives with what the forward gives, on random frames of two lengths.

        Raises:
            ModelError: when they differ by more than float32 rounds, or the forward depends on the length.
        """
        found = self._compare(model, self._shape)
        if found.steps_axis >= 0:
            longer = list(self._shape)
            longer[found.steps_axis] += MORE_STEPS
            if not self._has_example:
                longer[found.rows_axis] = 1
            self._compare(model, longer)

    def _traced(self, shapes: Sequence[Sequence[int]]) -> tuple[Sequence[int], _Tracer, fx.Graph]:
        """The graph for frames of the first of these shapes that the forward takes."""
        failure: Exception | None = None
        for shape in shapes:
            tracer = _Tracer(self._frames(shape))
            try:
                with _unchanged(self._module):
                    return shape, tracer, tracer.trace(_OfFrames(self._module, self._others))
            except Exception as error:  # whatever the user's forward raises
                failure = failure or error
        assert failure is not None
        advice = "give an example of its arguments, as in save_model(path, net, example=(x, h)), or "
        if self._has_example or isinstance(failure, fx.proxy.TraceError):
            advice = ""
        if kept := _kept(self._module, failure):
            advice = f"it keeps a state between calls in {kept}: start every sequence from zeros, or "
        raise ModelError(
            f"{self._kind}.forward fails or does what torch.fx cannot follow on frames {list(shapes[0])} "
            f"({first_line(failure):.200}); {advice}{_INSTEAD}"
        ) from failure

    def _frames(self, shape: Sequence[int]) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(self._device)

    def _compare(self, model: Model, shape: Sequence[int]) -> Agreement:
        x = self._frames(shape)
        y = outputs_of(self._module, x, self._others, f"{self._kind}.forward")
        found = agreement(build(model, torch.device("cpu")), x.cpu().numpy(), y)
        if found is None or not found.agrees:
            how = f"it gives the shape {list(y.shape)}"
            if found is not None:
                how = f"they differ by {found.error:.2g}, where rounding explains {found.tolerance:.2g}"
            raise ModelError(
                f"{self._kind}.forward on frames {list(shape)} does not give what its layers do in the order in which "
                f"it runs them ({model.description.in_words()}): {how}; return the values of its last layer for each "
                "frame, or for the last frame of each sequence, however long it is"
            )
        return found


def outputs_of(module: nn.Module, x: torch.Tensor, others: Sequence[Any], subject: str) -> F32:
    """The first output of a network over sequences.

    Args:
        module: the network.
        x: its frames.
        others: its further arguments.
        subject: how sentences call it.

    Raises:
        ModelError: when it fails, or returns no tensor.
    """
    try:
        with evaluating(module), _unchanged(module):
            result = module(x.clone(), *others)
    except Exception as error:  # whatever the user's forward raises
        raise ModelError(
            f"{subject} fails on frames {list(x.shape)} ({first_line(error):.200}); a network over sequences of any "
            "length is needed here, while instep.models.export_step takes a step"
        ) from error
    y: F32 = first_output(result, subject).float().cpu().numpy()
    return y


class _OfFrames(nn.Module):
    """A network as a function of its frames alone."""

    def __init__(self, module: nn.Module, others: Sequence[Any]) -> None:
        super().__init__()
        self.module, self._others = module, others

    def forward(self, x: torch.Tensor) -> Any:
        return self.module(x, *self._others)


class _Proxy(fx.Proxy):
    """A tensor in the forward that is followed, with the shape of a real one."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.node.meta["value"], name)
        return super().__getattr__(name) if callable(value) or isinstance(value, torch.Tensor) else value

    def __len__(self) -> int:
        return len(self.node.meta["value"])


class _Tracer(fx.Tracer):
    """Runs a forward on frames and records its calls, with their results as `value` in the nodes' `meta`.

    Layers and all modules of torch are one call each. What torch.compile wraps is called in its place.
    """

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self._x = x
        self._is_computing = False

    def call(self, node: fx.Node, replaced: Mapping[fx.Node, torch.Tensor] = MappingProxyType({})) -> Any:
        """What a node computes from the results of others, some of them replaced."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: replaced.get(each, self.value(each)))
        target: Any = node.target
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        self._is_computing = True
        try:
            return (self.root.get_submodule(target) if node.op == "call_module" else target)(*args, **kwargs)
        finally:
            self._is_computing = False

    def value(self, node: fx.Node) -> Any:
        """The result of a node."""
        return node.meta["value"] if "value" in node.meta else attrgetter(str(node.target))(self.root)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> Any:
        proxy = super().create_proxy(kind, target, *args, **kwargs)
        node = proxy.node
        node.meta["value"] = self._x if kind == "placeholder" else self.call(node)
        return node.meta["value"] if kind == "call_method" and target in _SIZES else proxy

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_layer(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        inner: Any = getattr(m, "_orig_mod", m)
        call = forward if _is_plain(m) else inner.forward
        return call(*args, **kwargs) if self._is_computing else super().call_module(inner, call, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        items: Any = obj
        return iter([items[at] for at in range(len(self.value(obj.node)))])


class _Walk:
    """The layers along a graph.

    Raises:
        ModelError: when it computes something that a model folder cannot hold.
    """

    def __init__(self, kind: str, tracer: _Tracer, features: int) -> None:
        self._kind, self._tracer = kind, tracer
        self._width = features
        self._before: list[Layer] = []
        self._after: list[Layer] = []
        self._recurrent: tuple[str, RecurrentModule] | None = None
        self._initial_state: list[torch.Tensor] = []
        self._labels: list[str] = []
        """Of the layers and activations so far."""
        self._origins: dict[fx.Node, int] = {}
        """Of nodes whose values depend on the frames: how many of these lead to them."""
        self._is_open = False
        """Whether the last one was a layer that takes an activation."""

    def chain(self, graph: fx.Graph) -> Chain:
        """Its layers."""
        self._use_what_changed_in_place(graph)
        graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        for node in graph.nodes:
            self._follow(node)
        if self._recurrent is None:
            raise ModelError(f"{self._kind}.forward does not run its recurrent module on its input; {SERVED}")
        initial = dict(zip(("h", "c"), self._initial_state, strict=False))
        return Chain(self._before, self._recurrent, self._after, initial)

    def _use_what_changed_in_place(self, graph: fx.Graph) -> None:
        """Where a call returns its own argument, let all later uses of that refer to the call."""
        seen: set[fx.Node] = set()
        for node in graph.nodes:
            seen.add(node)
            for given in node.all_input_nodes if node.op != "output" else ():
                value = self._tracer.value(given)
                if isinstance(value, torch.Tensor) and self._tracer.value(node) is value:
                    given.replace_all_uses_with(node, lambda user: user not in seen)

    def _follow(self, n: fx.Node) -> None:
        given = [node for node in n.all_input_nodes if node in self._origins]
        if n.op == "output":
            self._check_returned(n.args[0])
        elif n.op == "placeholder":
            self._origins[n] = 0
        elif given and _name(n) not in _OF_SHAPES and not (_name(n) in _LIKE and n.args[0] not in self._origins):
            tensors = [each for each in tree_leaves(self._tracer.value(n)) if isinstance(each, torch.Tensor)]
            if any(each.dtype != torch.float32 for each in tensors):
                self._refuse(f"{self._kind}.forward computes in {_plain(tensors[0].dtype)}")
            self._origins[n] = self._after_node(n, given)

    def _after_node(self, n: fx.Node, given: Sequence[fx.Node]) -> int:
        """How many layers and activations lead to the result of a node."""
        origin, name = self._origins[given[0]], _name(n)
        module = self._tracer.root.get_submodule(str(n.target)) if n.op == "call_module" else None
        if len(given) == 1 and module is None and name in _ARRANGING:
            return origin
        if module is not None and _is_layer(module):
            label = f"`{_path(n)}`"
            self._add(label, origin)
            self._add_layer(label, module, n, given)
            return len(self._labels)
        activation: Activation | None = None
        if len(given) == 1 and isinstance(x := self._tracer.value(given[0]), torch.Tensor):
            activation = _recognised(lambda values: self._tracer.call(n, {given[0]: values}), x.shape)
        if activation is None and type(module).__module__.startswith("torch."):
            self._refuse(f"`{_path(n)}` is {_shown(module)}, which cannot be served as a layer")
        if activation is None:
            self._refuse(f"{self._kind}.forward computes `{name}`, which cannot be served as a layer")
        if activation == "none":
            return origin
        label = name if module is None else f"`{_path(n)}`"
        self._add(label, origin)
        layers = self._before if self._recurrent is None else self._after
        if self._is_open:
            layers[-1] = layers[-1]._replace(activation=activation)
        else:
            layers.append(Layer(label, dense(torch.eye(self._width)), activation))  # which changes no value
        self._is_open = False
        return len(self._labels)

    def _add(self, label: str, origin: int) -> None:
        if origin != len(self._labels):
            given = f"the output of {self._labels[origin - 1]}" if origin else "its input"
            self._refuse(
                f"{self._kind}.forward uses {given} more than once, for {self._labels[origin]} and for {label}",
                "run each layer once, on the output of the one before it, with one layer for the outputs of several "
                "heads, or write the network as a step and export it with instep.models.export_step",
            )
        self._labels.append(label)

    def _add_layer(self, label: str, module: nn.Module, n: fx.Node, given: Sequence[fx.Node]) -> None:
        layers = self._before if self._recurrent is None else self._after
        if isinstance(module, RecurrentModule):
            if self._recurrent is not None:
                self._refuse(f"{self._kind}.forward runs {label} twice", "train one with num_layers=2")
            if len(given) > 1:
                self._refuse(f"{self._kind}.forward runs {label} on a state that depends on the frames")
            self._begin(label, n)
            self._recurrent = label, module
        elif isinstance(module, nn.Linear | nn.LayerNorm):
            layers.append(Layer(label, module).checked())
        elif isinstance(module, nn.BatchNorm1d):
            if module.running_mean is None:
                raise ModelError(f"{label} keeps no running statistics; train it with track_running_stats=True")
            if not (self._is_open and isinstance(layers[-1].module, nn.Linear)):
                layers.append(Layer(label, dense(torch.eye(module.num_features, device=module.running_mean.device))))
            linear = layers[-1].module
            assert isinstance(linear, nn.Linear)
            layers[-1] = layers[-1]._replace(module=folded(linear, module))
        self._width = sizes(module)[1]
        self._is_open = not isinstance(module, RecurrentModule)

    def _begin(self, label: str, n: fx.Node) -> None:
        """Note what the recurrent module begins with: [layers, hidden size], with rows in the middle if there are."""
        state = fx.map_arg((n.args[1:], n.kwargs.get("hx")), self._tracer.value)
        leaves = [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]
        if any(bool((leaf != leaf[:, :1]).any()) for leaf in leaves if leaf.ndim > 2):
            self._refuse(
                f"{label} begins each sequence with another state, and a model folder holds one for all",
                "hand over the layers one by one, and open each stream with its state",
            )
        if any(bool(leaf.any()) for leaf in leaves):
            self._initial_state = [leaf[:, 0] if leaf.ndim > 2 else leaf for leaf in leaves]

    def _check_returned(self, returned: Any) -> None:
        while isinstance(returned, list | tuple) and returned:
            returned = returned[0]
        if not isinstance(returned, fx.Node) or self._origins.get(returned) != len(self._labels):
            last = self._labels[-1] if self._labels else "its layers"
            raise ModelError(
                f"{self._kind}.forward does not return first what comes last, from {last}; return the outputs first, "
                "as a tensor or a tuple, and compute everything with torch"
            )

    def _refuse(self, sentence: str, advice: str = _INSTEAD) -> NoReturn:
        raise ModelError(f"{sentence}: {advice}")


def activation_of(given: object, place: str) -> Activation:
    """The activation that a name, a module or a function of torch means; `place` is how sentences call it.

    Raises:
        ModelError: when it is none that can be served.
    """
    name = activation_name(given)
    if name in ACTIVATIONS:
        return name
    allowed = f"give one of {', '.join(ACTIVATIONS)}, or torch's module or function of that name"
    if isinstance(given, str) and (close := get_close_matches(given.lower(), ACTIVATIONS, n=1)):
        allowed = f"did you mean {close[0]}? If not, {allowed}"
    found = _recognised(given, (4, 30)) if callable(given) and not isinstance(given, type) else None
    if found is None:
        raise ModelError(f"{place} is {_shown(given)}, which cannot be served: {allowed}")
    return found


@torch.no_grad()
def _recognised(function: Callable[[torch.Tensor], Any], shape: Sequence[int]) -> Activation | None:
    """The activation that gives the same values as a function for tensors of a shape, some of them huge."""
    x = 10 * torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    x.view(-1)[::7] *= 1e25
    try:
        y = function(x.clone())
    except Exception:  # whatever the user's function raises
        return None
    if not isinstance(y, torch.Tensor) or y.shape != x.shape:
        return None
    alike = (name for name, each in FUNCTIONS.items() if torch.allclose(y.cpu(), each(x), rtol=1e-5, atol=1e-6))
    return next(alike, None)


def plain_path(name: str) -> str:
    """A module's path without what torch.compile wraps around it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _path(n: fx.Node) -> str:
    return plain_path(str(n.target).removeprefix("module."))


def _name(n: fx.Node) -> str:
    return getattr(n.target, "__name__", str(n.target)).strip("_")


def _shown(value: object) -> str:
    return " ".join(f"{value!r:.120}".split())


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_plain(module: nn.Module) -> bool:
    """Whether torch.compile did not touch it."""
    return not hasattr(module, "_orig_mod") and module._compiled_call_impl is None


def _is_layer(module: nn.Module) -> bool:
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in _LAYERS)


def _check_recurrent(module: nn.Module) -> None:
    """Refuse a module that does not have one recurrent module that can be served."""
    kind = type(module).__name__
    parts = dict(module.named_modules())
    found = {plain_path(name): part for name, part in parts.items() if isinstance(part, RecurrentModule)}
    if len(found) > 1:
        names = ", ".join(f"`{name}` ({type(part).__name__})" for name, part in found.items())
        raise ModelError(
            f"{kind} has {len(found)} recurrent modules, {names}, and one can be handed over: write the network as a "
            "step and export it with instep.models.export_step, or train one module, with num_layers if they follow "
            "each other"
        )
    for name, part in found.items():
        check_recurrent(f"`{name}`", part)
    if not found:
        raise ModelError(f"{kind} has no recurrent module; {SERVED}")


def _kept(module: nn.Module, failure: Exception) -> str:
    """The tensors that a module keeps as plain attributes, or why it could not set a buffer; empty if neither."""
    names = [
        f"`{name}`"
        for part in module.modules()
        for name, value in vars(part).items()
        if not name.startswith("_") and any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))
    ]
    return "a buffer" if "to buffer" in str(failure) else ", ".join(names)


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Give all parts of a module the attributes and buffers back that a forward sets."""
    before = [(part, dict(vars(part)), dict(part._buffers)) for part in module.modules()]
    try:
        yield
    finally:
        for part, attributes, buffers in before:
            for there, wanted in ((vars(part), attributes), (part._buffers, buffers)):
                there.clear()
                there.update(wanted)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run a module as it is served: evaluating, without gradients, and without compiling anything."""
    training = [part for part in module.modules() if part.training]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if not all(map(_is_plain, module.modules())):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        module.eval()
        try:
            yield
        finally:
            for part in training:
                part.training = True
