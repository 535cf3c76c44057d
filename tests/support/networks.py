"""The networks for which everything that is promised of any recurrent network is shown.

A new kind is one entry of `NETWORKS`. Each comes with torch or onnxruntime called directly, and nothing of the engine:
the same within rounding errors. Bits are those of the network's definition.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from instep.core.typing import F32, U8
from instep.models.folder import make_model
from instep.models.model import Model
from instep.models.onnx.importer import import_onnx
from instep.models.registry import parse_description
from instep.server.preparation import Prepared
from tests.support.onnx_graphs import Shape, graph, gru_step, node
from tests.support.pipelines import listens, whole_signal
from tests.support.steps import example, exported, leaves, step_of
from tests.support.torch_network import TorchNetwork

Run: TypeAlias = Callable[[F32, U8], tuple[F32, U8]]
"""Frames [T, R, features] and rows of states to outputs [T, R, outputs] and the rows after them."""
FEATURES: Final = 5


@dataclass(frozen=True)
class ServedNetwork:
    """A network to serve, and its truth."""

    model: Callable[[], Model]
    steps: Callable[[Prepared], Run] | None = None
    """Computes frame after frame."""
    sequence: Callable[[Prepared], Run] | None = None
    """Computes whole sequences, from the initial state at least."""


# ── Layers of torch ──────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def _layers(kind: str, **layers: Any) -> Model:
    fields = {"kind": kind, "features": FEATURES, kind: layers}
    return make_model(parse_description(fields), "random", name=kind, seed=4)


def _torch(ready: Prepared) -> Run:
    return TorchNetwork(ready.model).run


def _recurrent(kind: str, **layers: Any) -> ServedNetwork:
    return ServedNetwork(partial(_layers, kind, **layers), _torch, _torch)


# ── Steps of torch ───────────────────────────────────────────────────────────────────────────────────────────────────


def _eager(name: str, ready: Prepared) -> Run:
    module, first, spec = step_of(name), example(name), ready.network.state

    @torch.inference_mode()
    def run(x: F32, rows: U8) -> tuple[F32, U8]:
        state = _like(first, {leaf: torch.from_numpy(values.copy()) for leaf, values in spec.unpack(rows).items()})
        outputs = []
        for frame in torch.from_numpy(x):
            y, state = module(frame, state)
            parts = list(y.values()) if isinstance(y, dict) else [y]
            outputs.append(torch.cat([part.reshape(len(frame), -1) for part in parts], 1))
        after = {leaf.name: values.numpy() for leaf, values in zip(spec.leaves, leaves(state), strict=True)}
        return torch.stack(outputs).numpy(), spec.pack(after)

    return run


def _like(first: Any, state: Mapping[str, torch.Tensor]) -> Any:
    """The leaves in the form of the example."""
    if isinstance(first, torch.Tensor):
        return next(iter(state.values()))
    return dict(state) if isinstance(first, dict) else type(first)(state.values())


def _exported(name: str) -> ServedNetwork:
    return ServedNetwork(partial(exported, name), partial(_eager, name))


# ── Graphs in ONNX, with one state h ─────────────────────────────────────────────────────────────────────────────────


def _gru() -> onnx.ModelProto:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return gru_step(nn.GRU(FEATURES, 24), nn.Linear(24, 3))


def _softplus() -> onnx.ModelProto:
    rows: Shape = ["rows", 7]
    nodes = [
        node("Gemm", ["x", "A"], ["mixed"]),
        node("Add", ["mixed", "h"], ["sum"]),
        node("Tanh", ["sum"], ["hn"]),
        node("Softplus", ["hn"], ["y"]),
    ]
    weights = {"A": np.random.default_rng(3).standard_normal((FEATURES, 7)).astype(np.float32)}
    return graph(nodes, {"x": ["rows", FEATURES], "h": rows}, {"y": rows, "hn": rows}, weights)


@cache
def _imported(make: Callable[[], onnx.ModelProto]) -> Model:
    folder = Path(tempfile.mkdtemp(prefix="instep-onnx-"))
    (folder / "net.onnx").write_bytes(make().SerializeToString())
    return import_onnx(folder / "net.onnx", folder / "net")


def _onnxruntime(make: Callable[[], onnx.ModelProto], rows_axis: int, ready: Prepared) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(make().SerializeToString(), options, providers=["CPUExecutionProvider"])
    spec = ready.network.state

    def run(x: F32, rows: U8) -> tuple[F32, U8]:
        h = np.ascontiguousarray(spec.unpack(rows)["h"].swapaxes(0, rows_axis))
        outputs = []
        for frame in x:
            y, h = session.run(["y", "hn"], {"x": frame, "h": h})
            outputs.append(y)
        return np.stack(outputs), spec.pack({"h": np.ascontiguousarray(h.swapaxes(0, rows_axis))})

    return run


def _onnx(make: Callable[[], onnx.ModelProto], rows_axis: int) -> ServedNetwork:
    return ServedNetwork(partial(_imported, make), partial(_onnxruntime, make, rows_axis))


# ── All of them ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _signals(ready: Prepared) -> Run:
    return lambda x, rows: (np.stack([whole_signal(ready.model, x[:, row]) for row in range(len(rows))], 1), rows)


NETWORKS: Final[dict[str, ServedNetwork]] = {
    "gru": _recurrent("gru", hidden_size=24, num_layers=2),
    "lstm": _recurrent("lstm", hidden_size=32),
    "rnn": _recurrent("rnn", hidden_size=16, nonlinearity="relu"),
    "layer_norm_gru": _exported("layer_norm_gru"),
    "causal_convolution": _exported("causal_convolution"),
    "min_gru": _exported("min_gru"),
    "selective_state_space": _exported("selective_state_space"),
    "onnx": _onnx(_gru, rows_axis=1),
    "onnx softplus": _onnx(_softplus, rows_axis=0),
    "pipeline": ServedNetwork(listens, sequence=_signals),
}
