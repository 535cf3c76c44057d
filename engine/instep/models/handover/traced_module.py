"""The layers of an `nn.Module`, read from the graph that `torch.export` makes of its forward.

The graph shows the layers. Comparing outputs then shows that nothing else in the forward matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NoReturn

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.utils._pytree import tree_leaves, tree_map

from instep.models.errors import ModelError, first_line
from instep.models.handover.check import Agreement, agreement, outputs_of
from instep.models.handover.layers import (
    RECURRENT,
    SERVED,
    Chain,
    Layer,
    RecurrentModule,
    check_recurrent,
    dense,
    folded,
    plain_path,
    recognised,
    shown,
    sizes,
)
from instep.models.model import Model
from instep.models.module.export import copied, exported, where
from instep.models.module.operators import Operator, name_of
from instep.models.numerics import dtype_name, evaluating
from instep.models.recurrent.description import Activation
from instep.models.registry import build

ROWS: Final = 32
STEPS: Final = 6
"""The number of random sequences, and of frames in each."""
MORE_STEPS: Final = 397
"""The additional frames of a second, longer input: a prime, so it is no multiple of a window or chunk."""
_LAYERS: Final = (*RECURRENT.values(), nn.Linear, nn.LayerNorm, nn.BatchNorm1d)
_OF_LAYERS: Final = frozenset(
    [
        "linear",
        "layer_norm",
        "batch_norm",
        "_native_batch_norm_legit_no_training",
        "gru",
        "lstm",
        "rnn_tanh",
        "rnn_relu",
    ]
)
_ARRANGING: Final = frozenset(
    ["chunk", "expand", "flatten", "getitem", "movedim", "narrow", "permute", "reshape", "select", "slice", "split"]
) | {"split_with_sizes", "squeeze", "swapaxes", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view"}
"""Operators that only rearrange values. If one drops a value that matters, the comparison of outputs shows it."""
_OF_SHAPES: Final = frozenset(
    ["empty_like", "full_like", "new_empty", "new_full", "new_ones", "new_zeros", "ones_like", "zeros_like"]
)
"""Operators that take only the shape of their tensor."""
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
        self._kind, self._has_example = type(module).__name__, example is not None
        _check_recurrent(module)
        dtype = next(module.parameters()).dtype
        if dtype != torch.float32:
            raise ModelError(f"the weights of {self._kind} are {dtype_name(dtype)}: convert them with .float()")
        given = example if isinstance(example, tuple) else (example,)
        if self._has_example and not (given and isinstance(given[0], torch.Tensor) and given[0].dtype == torch.float32):
            raise ModelError("example must be a float32 tensor of frames, or a tuple that begins with one")
        if self._has_example and given[0].numel() == given[0].shape[-1]:
            raise ModelError("example is a single frame, which does not tell its axes apart; give a sequence")
        self._module = module
        self._others = tree_map(lambda each: each.cpu() if isinstance(each, torch.Tensor) else each, given[1:])
        widths = dict.fromkeys(sizes(layer)[0] for layer in module.modules() if isinstance(layer, _LAYERS))
        shapes = [given[0].shape] if self._has_example else [(ROWS, STEPS, width) for width in widths]
        self._shape, root, program = self._exported(shapes)
        self.chain: Final[Chain] = _Walk(self._kind, root, program, self._shape[-1]).chain
        """The layers in the order in which the forward runs them."""
        if self.chain.initial_state and self._others:
            raise ModelError(
                f"{self._kind}.forward begins with a state that is not zero, and the example may be where it comes "
                "from: give zeros in the example, and open streams with the state"
            )

    def check(self, model: Model) -> None:
        """Compare a model of these layers with the forward on random frames of two lengths.

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

    def _copy(self) -> nn.Module:
        """A copy for a single run, because a forward may change attributes of its module."""
        return copied(self._module, self._kind).cpu()

    def _exported(self, shapes: Sequence[Sequence[int]]) -> tuple[Sequence[int], nn.Module, ExportedProgram]:
        """The first of these frame shapes that the forward accepts, a copy of the module, and its graph."""
        failure: Exception | None = None
        for shape in shapes:
            try:
                root = self._copy()
                with evaluating(root):
                    return shape, root, exported(root, (_frames(shape), *self._others), None)
            except Exception as error:  # whatever the user's forward raises
                failure = failure or error
        assert failure is not None
        example = "give an example of its arguments, as in save_model(path, net, example=(x, h)), or "
        raise ModelError(
            f"{self._kind}.forward{where(failure)} fails or does what torch.export cannot follow, "
            f"such as a decision by a value in a tensor, on frames {list(shapes[0])} "
            f"({first_line(failure):.200}); {'' if self._has_example else example}{_INSTEAD}"
        ) from failure

    def _compare(self, model: Model, shape: Sequence[int]) -> Agreement:
        x = _frames(shape)
        y = outputs_of(self._copy(), x, self._others, f"{self._kind}.forward")
        found = agreement(build(model, torch.device("cpu")), x.numpy(), y)
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


def _frames(shape: Sequence[int]) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class _Walk(fx.Interpreter):
    """Runs a graph and collects the layers along it.

    Raises:
        ModelError: when it computes something that a model folder cannot hold.
    """

    def __init__(self, kind: str, root: nn.Module, program: ExportedProgram, features: int) -> None:
        super().__init__(program.graph_module)
        self._kind, self._root = kind, root
        self._width = features
        self._before: list[Layer] = []
        self._after: list[Layer] = []
        self._recurrent: tuple[str, RecurrentModule] | None = None
        self._initial_state: list[torch.Tensor] = []
        self._labels: list[str] = []
        """The layers and activations so far."""
        self._origins: dict[fx.Node, int] = {}
        """For each node that depends on the frames: the number of layers and activations before it."""
        self._values: dict[fx.Node, Any] = {}
        self._is_open = False
        """Whether the last entry is a layer that an activation may follow."""
        signature, tensors = program.graph_signature, {**program.state_dict, **program.constants}
        self._frames = signature.user_inputs[0]
        given = iter(tree_leaves(program.example_inputs))
        program.graph.eliminate_dead_code()
        self.extra_traceback = False
        self.run(*(tensors[spec.target] if spec.target else next(given) for spec in signature.input_specs))
        self._check_returned(signature.output_specs, program.graph.output_node().args[0])
        if self._recurrent is None:
            raise ModelError(f"{kind}.forward does not run its recurrent module on its input; {SERVED}")
        initial = dict(zip(("h", "c"), self._initial_state, strict=False))
        self.chain: Chain = Chain(self._before, self._recurrent, self._after, initial)

    def run_node(self, n: fx.Node) -> Any:
        self._values[n] = value = super().run_node(n)
        if n.op == "placeholder" and n.name == self._frames:
            self._origins[n] = 0
        given = [node for node in n.all_input_nodes if node in self._origins]
        tensors = [each for each in tree_leaves(value) if isinstance(each, torch.Tensor)]
        if n.op != "call_function" or not given or not tensors or _name(n) in _OF_SHAPES:
            return value
        if _name(n) in ("to", "type_as") and n.args[0] not in self._origins:
            return value
        if any(each.dtype != torch.float32 for each in tensors):
            self._refuse(f"{self._kind}.forward computes in {dtype_name(tensors[0].dtype)}")
        self._origins[n] = self._follow(n, given)
        return value

    def _follow(self, n: fx.Node, given: Sequence[fx.Node]) -> int:
        """Process a node, and return the number of layers and activations up to its result."""
        origin, name = self._origins[given[0]], _name(n)
        path = [path for path, _ in n.meta.get("nn_module_stack", {"": ("", "")}).values()][-1]
        module = self._root.get_submodule(path)
        label = f"`{plain_path(path)}`"
        if name in _OF_LAYERS and isinstance(module, _LAYERS):
            self._add(label, origin)
            self._add_layer(label, module, n, given)
            return len(self._labels)
        if len(given) == 1 and name in _ARRANGING:
            return origin
        activation: Activation | None = None
        if len(given) == 1 and isinstance(x := self._values[given[0]], torch.Tensor):
            activation = recognised(lambda values: self._computed(n, {given[0]: values}), x.shape)
        is_torchs = path and type(module).__module__.startswith("torch.")
        if activation is None and is_torchs:
            self._refuse(f"{label} is {shown(module)}, which cannot be served as a layer")
        if activation is None:
            self._refuse(f"{self._kind}.forward computes `{name}`, which cannot be served as a layer")
        if activation == "none":
            return origin
        label = label if is_torchs else name
        self._add(label, origin)
        layers = self._before if self._recurrent is None else self._after
        if self._is_open:
            layers[-1] = layers[-1]._replace(activation=activation)
        else:
            layers.append(Layer(label, dense(torch.eye(self._width)), activation))  # which changes no value
        self._is_open = False
        return len(self._labels)

    def _computed(self, n: fx.Node, replaced: dict[fx.Node, torch.Tensor]) -> Any:
        args, kwargs = fx.map_arg((n.args, n.kwargs), lambda each: replaced.get(each, self._values[each]))
        target: Any = n.target
        return target(*args, **kwargs)

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
            if not (self._is_open and isinstance(layers[-1].module, nn.Linear)):
                layers.append(Layer(label, dense(torch.eye(module.num_features))))
            linear = layers[-1].module
            assert isinstance(linear, nn.Linear)
            layers[-1] = layers[-1]._replace(module=folded(linear, module))
        self._width = sizes(module)[1]
        self._is_open = not isinstance(module, RecurrentModule)

    def _begin(self, label: str, n: fx.Node) -> None:
        leaves = tree_leaves(fx.map_arg(n.args[1], self._values.__getitem__))
        if any(bool((leaf != leaf[:, :1]).any()) for leaf in leaves):
            self._refuse(
                f"{label} begins each sequence with another state, and a model folder holds one for all",
                "hand over the layers one by one, and open each stream with its state",
            )
        if any(bool(leaf.any()) for leaf in leaves):
            self._initial_state = [leaf[:, 0] for leaf in leaves]

    def _check_returned(self, specs: Sequence[Any], results: Sequence[Any]) -> None:
        returned = [result for spec, result in zip(specs, results, strict=True) if spec.kind == OutputKind.USER_OUTPUT]
        if not returned or self._origins.get(returned[0]) != len(self._labels):
            last = self._labels[-1] if self._labels else "its layers"
            raise ModelError(
                f"{self._kind}.forward does not return first what comes last, from {last}; return the outputs first, "
                "as a tensor or a tuple, and compute everything with torch"
            )

    def _refuse(self, sentence: str, advice: str = _INSTEAD) -> NoReturn:
        raise ModelError(f"{sentence}: {advice}")


def _name(n: fx.Node) -> str:
    target: Any = n.target
    return name_of(target) if isinstance(target, Operator) else getattr(target, "__name__", str(target))


def _check_recurrent(module: nn.Module) -> None:
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
        if any(type(part).__module__.startswith("torch.ao.") for part in parts.values()):
            raise ModelError(f"{kind} is quantised: hand over the module as it was trained, in float32")
        raise ModelError(f"{kind} has no recurrent module; {SERVED}")
