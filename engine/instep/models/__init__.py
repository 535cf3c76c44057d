"""Models: the protocol that kinds of models implement, their folders and weights, and how they are computed.

`save_model`, `export_step` and `load_model` are there for users; everything else is imported from the modules. `base`,
`registry`, `errors` and the descriptions need no torch, so that a command can check a configuration without the two
seconds that importing torch takes; hence nothing is imported before it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["export_step", "load_model", "save_model"]

if TYPE_CHECKING:
    from instep.models.folder import load_model
    from instep.models.handover.save import save_model
    from instep.models.module.export import export_step
else:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = {"load_model": "folder", "save_model": "handover.save", "export_step": "module.export"}[name]
        return getattr(import_module(f"instep.models.{module}"), name)
