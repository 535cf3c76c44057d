"""What the process that forks commands for tests does before it forks: what most of its forks would do themselves.

It imports what they need, loads the compiled kernels (or compiles them, where they are not cached yet) and builds the
command line. Nothing of this starts a thread, as long as torch uses one only.
"""

from __future__ import annotations

import gc
import importlib
import os
from functools import cache

import torch
from typer import main

from instep.models.folder import make_model
from instep.models.recurrent.description import DESCRIPTIONS
from instep.models.registry import build, parse_description
from instep.program import app
from instep.runtime.stepper import Stepper
from instep.streaming.kernels import compile_kernels

for module in (
    *("instep.export.command", "instep.server.serve", "instep.replay.shadow"),
    *("instep.replay.command", "instep_client", "instep_tools.send", "pydantic.type_adapter"),
    "torch._dynamo",  # which the optimizers import, in 2 s
):
    importlib.import_module(module)
compile_kernels()
for kind in DESCRIPTIONS:
    description = parse_description({"kind": kind, "features": 1, kind: {"hidden_size": 16}})
    network = build(make_model(description, init="random", seed=0, name=kind), torch.device("cpu"))
    Stepper(network, 16, 1, network.device)
main.get_command = cache(main.get_command)
main.get_command(app)
assert len(os.listdir("/proc/self/task")) == 1, "a fork would have none of the other threads"
gc.freeze()  # else a fork that looks for garbage among all that is imported makes a copy of each page of it
