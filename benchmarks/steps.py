"""`python -m benchmarks.steps`: compiled steps against torch's modules and against the processor's multiply-adds.

Both sides and a loop of independent fused multiply-adds are called in turn, and only calls count in which the operating
system did not switch this thread out. A step that appears faster than that loop is an error of measurement, and the
exit status is 1 then. The compiled step continues its states from call to call; torch's module begins with the same
ones.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any, Final

import numpy as np
import torch
from llvmlite import ir

from benchmarks.report import machine
from instep.models.folder import make_model
from instep.models.network import PortableNetwork
from instep.models.portable.lanes import F32, I64, POINTER, Lanes
from instep.models.portable.machine import Library, host, object_code
from instep.models.registry import parse_description, torch_network

SIZES: Final = ((12, 64, 1), (40, 128, 1), (256, 256, 2), (64, 512, 1), (161, 400, 2))
"""Inputs, hidden size, layers."""
ROWS: Final = (1, 4, 16, 64, 256, 512)
_CHAINS, _UNROLLED, _TIMES = 12, 16, 3000
"""Independent multiply-adds under way, more than any processor's latency asks for; rounds in the loop, and loops."""


def main() -> int:
    """Measure and print; one JSON object a line with `--json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__)
    parser.add_argument("--kind", action="append", choices=("gru", "lstm", "rnn"), help="default: all three")
    parser.add_argument("--rows", type=int, action="append", help="default: " + ", ".join(map(str, ROWS)))
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--json", action="store_true", help="one object a line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = machine()
    _write(json.dumps(found) if options.json else f"{found['processor']}, one thread")
    is_possible = True
    for kind in options.kind or ("gru", "lstm", "rnn"):
        for inputs, hidden, layers in SIZES:
            for row in measured(kind, (inputs, hidden, layers), options.rows or ROWS, options.seconds):
                is_possible &= row["of_ceiling"] <= 1
                if options.json:
                    _write(json.dumps(row))
                else:
                    _write(
                        f"{kind} {inputs}→{hidden} × {layers}  {row['rows']:4} rows {row['us']:9.1f} µs  "
                        f"/ torch {row['of_torch']:.2f}  of the ceiling {row['of_ceiling']:.2f}"
                    )
    return 0 if is_possible else 1


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def measured(kind: str, sizes: tuple[int, int, int], rows: Sequence[int], seconds: float) -> Iterator[dict[str, Any]]:
    """A result for each number of rows."""
    inputs, hidden, layers = sizes
    description = parse_description(
        {"kind": kind, "features": inputs, kind: {"hidden_size": hidden, "num_layers": layers}}
    )
    model = make_model(description, "random", name=kind)
    network, module = PortableNetwork(model), torch_network(model, torch.device("cpu"))
    assert module is not None
    multiply_adds = sum(math.prod(tensor.shape) for tensor in model.weights.values() if tensor.dim() > 1)
    ceiling, of_ceiling = _ceiling()
    for count in rows:
        random = np.random.default_rng(0)
        x = random.standard_normal((count, inputs)).astype(np.float32)
        states, y = model.state.initial(count), np.zeros((count, hidden), np.float32)
        bound = network.bind(x, states, y)
        frames = torch.from_numpy(x)[None]
        leaves = {name: torch.from_numpy(leaf.copy()) for name, leaf in model.state.unpack(states).items()}
        own, torchs, peak = _in_turn(
            (lambda: bound.run_all(count), lambda: module.forward(frames, leaves), ceiling),  # noqa: B023
            seconds,
        )
        rate = multiply_adds * count / own
        yield {
            "kind": kind,
            "sizes": list(sizes),
            "rows": count,
            "us": own * 1e6,
            "of_torch": own / torchs,
            "of_ceiling": rate / (of_ceiling / peak),
        }


@torch.inference_mode()
def _in_turn(calls: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """The median seconds of each call."""
    samples: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, samples)) < 3:
        for call, found in zip(calls, samples, strict=True):
            call()  # so that its code and numbers are in the caches again
            switches, began = _switches(), time.perf_counter()
            call()
            took = time.perf_counter() - began
            if _switches() == switches:
                found.append(took)
    return [median(found) for found in samples]


def _switches() -> int:
    used = resource.getrusage(resource.RUSAGE_THREAD)
    return used.ru_nivcsw + used.ru_nvcsw


def _ceiling() -> tuple[Callable[[], object], int]:
    """A loop of independent multiply-adds, and how many it makes."""
    processor = host()
    module = ir.Module("ceiling")
    module.triple = processor.triple
    code = Lanes(module, "ceiling", [POINTER, I64], processor.columns)
    memory, times = code.function.args
    b, vector = code.b, code.vector(F32)
    first, second = (code.get(code.at(memory, code.i(at), vector), vector, 4) for at in (0, 1))
    sums = [code.room(vector) for _ in range(_CHAINS)]
    for number, total in enumerate(sums):
        b.store(b.fmul(first, code.const(number)), total)
    with code.loop(times):
        for total in sums * _UNROLLED:
            b.store(code.fma(b.load(total, typ=vector), second, first), total)
    for number, total in enumerate(sums):
        code.put(b.load(total, typ=vector), code.at(memory, code.i(number), vector), 4)
    b.ret_void()
    library = Library(object_code(str(module), processor), {})
    run = library.function("ceiling", ctypes.c_void_p, ctypes.c_long)
    numbers = np.full(_CHAINS * processor.columns, 0.5, np.float32)

    def call() -> object:
        numbers[:] = 0.5
        return run(numbers.ctypes.data, _TIMES)

    return call, _CHAINS * _UNROLLED * processor.columns * _TIMES


if __name__ == "__main__":
    sys.exit(main())
