"""Models: the protocol that kinds of models implement, their folders and weights, and certification of batch sizes.

`instep.models.save_model` and `instep.models.load_model` are there for users; everything else is imported from the
modules. `base`, `registry`, `errors`, `ulp` and the descriptions need no torch, so that a command can check a
configuration without the two seconds that importing torch takes; hence nothing is imported before it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["load_model", "save_model"]

if TYPE_CHECKING:
    from instep.models.folder import load_model
    from instep.models.handover.save import save_model
else:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from instep.models import folder
        from instep.models.handover import save

        return folder.load_model if name == "load_model" else save.save_model
