"""What the process that forks commands for tests does before it forks: what most of its forks would do themselves.

It imports what they need, loads the compiled kernels and builds the command line. Nothing of this starts a thread.
"""

from __future__ import annotations

import gc
import importlib
from functools import cache

from typer import main

from instep.cli import app
from instep.streaming.warm_up import warm_up

for module in (
    *("instep.models.recurrent.network", "instep.export.command", "instep.server.serve", "instep.shadow.command"),
    *("instep.verify.command", "instep_client", "instep_tools.app", "pydantic.type_adapter"),
    "torch._dynamo",  # which the optimizers import, in 2 s
):
    importlib.import_module(module)
warm_up()
main.get_command = cache(main.get_command)
main.get_command(app)
gc.freeze()  # else a fork that looks for garbage among all that is imported makes a copy of each page of it
