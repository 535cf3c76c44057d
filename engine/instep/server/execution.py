"""Where steps run: in a process, a thread or the loop; chosen by the machine."""

from __future__ import annotations

import os
from typing import Final

import torch

from instep.config import Config
from instep.runtime.executor import Step, StepExecutor, ThreadExecutor, usable_cores
from instep.runtime.process_executor import ProcessExecutor
from instep.server.preparation import CannotServe

_FEW_CORES: Final = 2
"""Too few for the loop, a process for steps and what else there is."""
_BUSY_POLL_NS: Final = 300_000
"""How long the loop polls after an event, rather than sleep and be woken, which costs more than a small step."""
_LIGHT_BATCH: Final = 128
"""The most single frames in a batch that the loop steps. (AMD EPYC with 2 cores, GRU 40→128, 256 streams in closed
loop: 86,000 messages/s with 96, 95,000 with 128, 90,000 with 192, 72,000 with all of them stepped in a process.)"""


def steps_in_process(device: torch.device) -> bool:
    """Whether steps on this device get a process of their own."""
    return device.type == "cpu" and hasattr(os, "fork") and usable_cores() > 1


def max_light_batch(config: Config, forks: bool) -> int:
    """The most single frames in a batch, where the loop itself steps those; 0 where it does not.

    It does where a process for steps would share its cores.
    """
    steps_inline = forks and config.recording.file is None and usable_cores() <= _FEW_CORES
    return min(_LIGHT_BATCH, config.engine.max_batch_size) if steps_inline else 0


def busy_poll_ns(config: Config) -> int:
    """For how long the loop polls; 0 where that would keep the recorder from a core.

    (Intel Xeon with 2 cores, GRU 40→128, 64 streams at 50 Hz, recorded: p99 8.7 ms with polling, 7.1 ms without; the
    median of a single stream in closed loop is the same.)
    """
    has_no_core = config.recording.file is not None and usable_cores() <= _FEW_CORES
    return 0 if has_no_core else _BUSY_POLL_NS


def make_executor(config: Config, step: Step, forks: bool) -> StepExecutor:
    """A process that steps, where it `forks`; otherwise a thread.

    Raises:
        CannotServe: when its process cannot be started.
    """
    if not forks:
        return ThreadExecutor(step)
    try:
        # Twice as long as the loop: it waits for the loop.
        return ProcessExecutor(step, config.engine.max_batch_size, 2 * busy_poll_ns(config))
    except OSError as error:
        raise CannotServe(f"no process for the steps can be started: {error}") from None
