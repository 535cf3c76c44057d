from __future__ import annotations

from instep_client.protocol import errors
from instep_client.protocol.codes import SENTENCES, Code


def test_one_tree_and_familiar_relatives() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert all(issubclass(kind, errors.InstepError) for kind in kinds)
    assert issubclass(errors.ConnectionFailed, ConnectionError)
    assert issubclass(errors.InvalidInput, ValueError)


def test_every_code_has_a_sentence() -> None:
    assert set(SENTENCES) == set(Code)
