"""Who may do what, against the table of docs/security.md."""

from __future__ import annotations

import pytest

from instep.security.policy import Verb, allowed, allowed_to_see, looked_up
from instep.security.principals import LOCAL, Principal, Role

KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
MIC, OTHER = "mic-1", "imu-1"
PRODUCER, OPERATOR, NODE = Role.PRODUCER, Role.OPERATOR, Role.NODE
CLIENTS = set(Role) - {NODE}


def principal(role: Role, *streams: str, models: frozenset[str] | None = None) -> Principal:
    return Principal(name="ann", key=KEY, role=role, streams=streams or ("*",), models=models)


@pytest.mark.parametrize(
    ("verb", "roles"),
    [
        (Verb.HELLO, CLIENTS),
        (Verb.OPEN, {PRODUCER, OPERATOR}),
        (Verb.RESUME, {PRODUCER, OPERATOR}),
        (Verb.READ_STATE, CLIENTS),
        (Verb.USE, {PRODUCER, OPERATOR}),
        (Verb.LIST, CLIENTS),
        (Verb.REMOVE, {OPERATOR}),
    ],
)
def test_what_each_role_may_do_with_streams_that_match(verb: Verb, roles: set[Role]) -> None:
    assert {role for role in Role if allowed(principal(role, "mic-*"), verb, MIC)} == roles
    assert {role for role in Role if allowed(principal(role, "mic-*"), verb)} == roles
    for role in Role:
        assert allowed(principal(role, "mic-*"), verb, MIC, OTHER) is (role in roles and verb is Verb.HELLO)
        assert allowed(principal(role, "mic-*", "imu-?"), verb, MIC, OTHER) is (role in roles)
    assert allowed(LOCAL, verb, MIC, OTHER)


def test_nodes_speak_among_themselves_and_operators_manage_them() -> None:
    assert {role for role in Role if allowed(principal(role), Verb.TAKE_PART)} == {NODE}
    assert {role for role in Role if allowed(principal(role), Verb.MANAGE)} == {OPERATOR}


def test_a_model_is_one_of_those_named() -> None:
    assert allowed(principal(PRODUCER), Verb.HELLO, "ears")
    assert allowed(principal(PRODUCER, models=frozenset({"ears"})), Verb.HELLO, "ears")
    assert not allowed(principal(PRODUCER, models=frozenset({"ears"})), Verb.HELLO, "eyes")


@pytest.mark.parametrize("streams", [(), ("",)])
def test_patterns_of_nothing_match_nothing(streams: tuple[str, ...]) -> None:
    nothing = Principal.model_construct(name="ann", key=KEY, role=PRODUCER, streams=streams, models=frozenset())
    assert not any(allowed(nothing, verb, MIC) for verb in Verb)


def test_a_foreign_name_is_looked_up_as_one_that_no_stream_has() -> None:
    names = looked_up(principal(PRODUCER, "mic-*"), Verb.RESUME, [MIC, OTHER, "imu-2"])
    assert names[0] == MIC
    assert not any(name.isprintable() for name in names[1:])
    assert len(set(names)) == 3  # as many different ones as before


def test_a_producer_sees_what_it_uses_itself() -> None:
    assert [allowed_to_see(principal(role), "ann") for role in Role] == [True, True, True, True]
    assert [allowed_to_see(principal(role), "bob") for role in Role] == [False, True, True, True]
