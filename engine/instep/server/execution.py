"""Where steps run: in a process, a thread or the loop; chosen by the configuration and the machine."""

from __future__ import annotations

import os
from typing import Final

import torch

from instep.config import Config, EngineConfig
from instep.runtime.executor import InlineExecutor, Step, StepExecutor, ThreadExecutor, usable_cores
from instep.runtime.process_executor import ProcessExecutor
from instep.server.preparation import CannotServe

_FEW_CORES: Final = 2
"""Too few for the loop, a process for steps and what else there is."""
_LIGHT_BATCH: Final = 128
"""The most single frames in a batch that the loop steps. (AMD EPYC with 2 cores, GRU 40→128, 256 streams in closed
loop: 86,000 messages/s with 96, 95,000 with 128, 90,000 with 192, 72,000 with all of them stepped in a process.)"""


def steps_in_process(engine: EngineConfig, device: torch.device) -> bool:
    """Whether steps get a process of their own.

    Raises:
        CannotServe: when they were to, and cannot.
    """
    obstacles = {
        f"the device is {device}": device.type != "cpu",
        "this system has no fork": not hasattr(os, "fork"),
    }
    if engine.steps_in == "process":
        for obstacle, is_there in obstacles.items():
            if is_there:
                raise CannotServe(f"engine.steps_in is process, but {obstacle}; use auto or thread")
        return True
    return engine.steps_in == "auto" and not any(obstacles.values()) and usable_cores() > 1


def max_light_batch(config: Config, forks: bool) -> int:
    """The most single frames in a batch, where the loop itself steps those; 0 where it does not.

    It does where a process for steps would share its cores.
    """
    steps_inline = config.engine.steps_in == "inline"
    if forks:
        steps_inline = config.recording.file is None and usable_cores() <= _FEW_CORES
    return min(_LIGHT_BATCH, config.engine.max_batch_size) if steps_inline else 0


def busy_poll_ns(config: Config) -> int:
    """For how long the loop polls; 0 where that would keep the recorder from a core.

    (Intel Xeon with 2 cores, GRU 40→128, 64 streams at 50 Hz, recorded: p99 8.7 ms with polling, 7.1 ms without; the
    median of a single stream in closed loop is the same.)
    """
    has_no_core = config.recording.file is not None and usable_cores() <= _FEW_CORES
    return 0 if has_no_core else config.engine.busy_poll_us * 1000


def make_executor(config: Config, step: Step, forks: bool) -> StepExecutor:
    """The executor that the configuration asks for.

    Raises:
        CannotServe: when its process cannot be started.
    """
    engine = config.engine
    if not forks:
        executor = InlineExecutor if engine.steps_in == "inline" else ThreadExecutor
        return executor(step)
    try:
        # Twice as long as the loop: it waits for the loop.
        return ProcessExecutor(step, engine.max_batch_size, 2 * busy_poll_ns(config))
    except OSError as error:
        raise CannotServe(f"no process for the steps can be started ({error}); set engine.steps_in to thread") from None
