"""What can be stepped: descriptions, weights files, the network, and certification of batch sizes.

`instep.models.save_model` and `instep.models.load_model` are there for users; everything else is imported from the
modules. `description`, `errors` and `ulp` need no torch, so that a command can check a configuration without the two
seconds that importing torch takes; hence nothing is imported before it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["load_model", "save_model"]

if TYPE_CHECKING:
    from instep.models.folder import load_model, save_model
else:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from instep.models import folder

        return getattr(folder, name)
