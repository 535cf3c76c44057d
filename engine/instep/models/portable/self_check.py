"""A check that this machine computes `portable-1`: digests of what it computes are compared with stored ones."""

from __future__ import annotations

from functools import cache
from typing import Final

from instep.models.errors import ModelError
from instep.models.portable.form import ARITHMETIC
from instep.models.portable.network import CompiledStep
from instep.models.portable.samples import STATE, digest_of, sample_form, sample_inputs

ROWS: Final = 27
"""Some go through the code for many rows, and some through that for a few."""
DIGEST: Final = "23be88ba53a734e6622ad644172056967364af800c643b174ee5045b565548af"
"""Of `ROWS` rows of the samples."""


@cache
def check_arithmetic() -> None:
    """Compute the samples, which takes milliseconds once their code is cached.

    Raises:
        ModelError: when one bit is another than it was when the arithmetic was defined.
    """
    form, tensors = sample_form()
    x, h, counts = sample_inputs(ROWS)
    y, after = CompiledStep(form, tensors, STATE, "the samples").run(x, STATE.pack({"h": h, "counts": counts}))
    if (found := digest_of([y, after])) != DIGEST:
        raise ModelError(
            f"this machine does not compute {ARITHMETIC} as it is defined (digest {found[:12]}… instead of "
            f"{DIGEST[:12]}…), so its answers could not be verified elsewhere: update llvmlite, and report the "
            "processor and the version of llvmlite"
        )
