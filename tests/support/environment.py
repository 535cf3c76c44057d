"""The environment in which tests run, and the processes that they start: nothing of the user's, one thread."""

from __future__ import annotations

import os


def set_up() -> None:
    """Change `os.environ`. Call it before torch is imported anywhere: OpenMP reads it only once."""
    # Several threads on a busy machine make small matrices many times slower, and a process with threads cannot be
    # forked (`warmed.py`). What the engine uses it sets itself.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["OMP_WAIT_POLICY"] = "passive"  # and where a test asks for two, each would spin while it waits
    for name in [name for name in os.environ if name.startswith("INSTEP_")]:
        del os.environ[name]
