"""The demo: recorded speech from hundreds of producers, served, recorded and verified."""

from __future__ import annotations

from pathlib import Path
from typing import Final

MODEL_FOLDER: Final = Path(__file__).parent / "model"
"""The trained model that ships with the package: `instep demo` and `instep serve --demo` serve it."""
