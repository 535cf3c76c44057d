"""Clusters in virtual time keep their promises through all faults, and each rule is needed for that.

Each scenario below is an order of events in which a rule matters: it passes with all rules, and fails without that one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from instep.cluster.rules import Assignment
from tests.cluster.simulation import DEAD_S, Broken, Client, Holder, Node, Rule, World, simulate


def settled(*broken: Rule, streams: int = 2) -> World:
    """One shard with a server and a copy, of three nodes, and a network without surprises."""
    world = World(1, frozenset(broken), shards=1, streams=streams)
    world.calm()
    world.run_until(lambda: view(world).copy and world.server(0).link)
    world.run(0.5)
    return world


def view(world: World) -> Assignment:
    return world.directory.rules.shards[0]


def nodes(world: World) -> tuple[Node, Node, Node]:
    """The node with the server, the one with the copy, and the third."""
    server, copy = world.node(view(world).server), world.node(view(world).copy)
    third = next(node for node in world.nodes if node not in (server, copy))
    return server, copy, third


def holder(world: World, node: Node) -> Holder:
    child = node.agent.children[0]
    assert isinstance(child, Holder)
    return child


def transactions_do_not_arrive(world: World) -> None:
    server, copy, _ = nodes(world)
    world.cut(server, copy, 5.0)
    world.run(0.3)
    server.kill(back_s=10.0)


def server_is_cut_off_from_the_directory(world: World) -> None:
    world.cut(nodes(world)[0], world.directory.machine, 6.0)


def server_is_cut_off_from_directory_and_copy(world: World) -> None:
    server, copy, _ = nodes(world)
    world.cut(server, world.directory.machine, 6.0)
    world.cut(server, copy, 6.0)


def server_is_lost_while_a_copy_is_made(world: World) -> None:
    server, copy, _ = nodes(world)
    world.clock.catches["copy rows"] = 1
    copy.kill(back_s=20.0)
    world.run_until(lambda: world.clock.caught)
    world.run(0.1)
    server.kill(back_s=2.0)


def directory_begins_again(world: World) -> None:
    world.directory.restart()


def client_comes_to_a_former_server(world: World) -> None:
    server, copy, _ = nodes(world)
    world.old_table = server.agent.table
    world.cut(server, world.directory.machine, 20.0)
    world.cut(server, copy, 20.0)
    world.run_until(lambda: view(world).term == 2 and world.directory.rules.table().endpoints[0])
    table, world.old_table = world.old_table, None
    world.run(3.0)
    world.old_table = table
    world.cut(world.clients[0].machine, copy, 4.0)
    world.run(4.0)
    world.old_table = None


def late_word_of_a_former_copy(world: World) -> None:
    server, copy, third = nodes(world)
    world.clock.catches["attached"] = 1
    holder(world, copy).is_alive = False
    world.run_until(lambda: view(world).copy == third.name)
    world.run(1.0)
    holder(world, third).is_alive = False
    world.run_until(lambda: view(world).joining)
    world.clock.release()
    world.run(0.02)
    server.kill(back_s=4.0)


def late_transaction_of_a_former_process(world: World) -> None:
    server, _, _ = nodes(world)
    world.clock.catches["copy row"] = 1
    world.run_until(lambda: world.clock.caught)
    world.server(0).is_alive = False
    world.run(2.0)
    world.clock.release()
    world.run(0.1)
    server.kill(back_s=10.0)


def power_fails_while_another_copy_is_made(world: World) -> None:
    server, _, third = nodes(world)
    world.clock.catches["copy rows"] = 1
    world.directory.rules.move(0, third.name)
    world.run_until(lambda: world.clock.caught)
    world.run(0.1)
    server.lose_moments(0.3)
    server.kill(back_s=0.3)


def server_begins_on_an_old_role(world: World) -> None:
    server, copy, third = nodes(world)
    holder(world, copy).is_alive = False
    world.run_until(lambda: server.agent.roles[0].other == third.name)
    world.clock.catches[f"heartbeat {server.name} answered"] = 1000
    world.run_until(lambda: view(world).copy == third.name)
    world.cut(server, world.directory.machine, 6.0)
    for client in world.clients:
        world.cut(client.machine, server, 0.75)
    world.run(0.1)
    world.clock.catches["copy rows"] = 1
    world.server(0).is_alive = False
    world.run(6.0)
    world.clock.catches.clear()


def server_begins_again_and_is_lost(world: World) -> None:
    server, _, _ = nodes(world)
    world.clock.catches["copy rows"] = 1
    world.server(0).is_alive = False
    world.run(1.0)
    server.kill(back_s=10.0)


def power_of_the_server_fails(world: World) -> None:
    server, _, _ = nodes(world)
    server.lose_moments(0.3)
    server.kill(back_s=0.3)


def power_of_the_next_server_fails(world: World) -> None:
    _, copy, _ = nodes(world)
    former = world.server(0)
    world.directory.rules.move(0, copy.name)
    world.run_until(lambda: not former.is_alive)
    copy.lose_moments(0.3)
    copy.kill(back_s=0.3)


def store_of_an_earlier_copy_is_put_back(world: World) -> None:
    server, copy, third = nodes(world)
    backup = dict(world.directory.kept)
    holder(world, copy).is_alive = False
    world.run_until(lambda: view(world).copy == third.name)
    world.run(1.0)
    world.directory.restart_on(backup)
    world.run(0.5)
    server.kill(back_s=4.0)


def node_that_was_lost_is_the_first_to_be_heard(world: World) -> None:
    """On a store of the first term, the first node, which has a recording of that term, is heard before the others."""
    backup, (first, second, third) = dict(world.directory.kept), nodes(world)
    first.kill(back_s=3.0)
    world.run_until(lambda: view(world).server == second.name and view(world).copy)
    world.run_until(lambda: world.directory.rules.table().endpoints[0] and world.server(0).link)
    world.run(4.0)
    world.directory.restart_on(backup)
    client = Client(world, "new", 0)  # which has heard of no term
    world.clients.append(client)
    for other in (second, third):
        world.cut(other, world.directory.machine, 0.9 * DEAD_S)
        world.cut(other, client.machine, 6.0)
    first.kill(back_s=0.05)  # it has forgotten what it has heard
    world.run(6.0)


def row_of_the_shard_is_missing(world: World) -> None:
    world.directory.restart_on({"cluster": world.directory.kept["cluster"]})


SCENARIOS: list[tuple[Callable[[World], None], tuple[Rule, ...]]] = [
    (transactions_do_not_arrive, (Rule.BOTH,)),
    (server_is_cut_off_from_the_directory, (Rule.FENCE,)),
    (server_is_cut_off_from_directory_and_copy, (Rule.ALONE,)),
    (server_is_lost_while_a_copy_is_made, (Rule.WHOLE,)),
    (directory_begins_again, (Rule.STORED,)),
    (client_comes_to_a_former_server, (Rule.BARRIER, Rule.HIGHEST)),  # each covers the other
    (late_word_of_a_former_copy, (Rule.ATTEMPT,)),
    (late_transaction_of_a_former_process, (Rule.RISING,)),
    (power_fails_while_another_copy_is_made, (Rule.OLD_COPY,)),
    (server_begins_on_an_old_role, (Rule.BEGINS,)),
    (server_begins_again_and_is_lost, (Rule.BACK,)),
    (power_of_the_server_fails, (Rule.MORE,)),
    (power_of_the_next_server_fails, (Rule.MORE,)),
    (store_of_an_earlier_copy_is_put_back, (Rule.KNOWN, Rule.PROVED)),  # each covers the other
    (node_that_was_lost_is_the_first_to_be_heard, (Rule.SETTLED,)),
    (row_of_the_shard_is_missing, ()),
]


def play(scenario: Callable[[World], None], *broken: Rule) -> World:
    world = settled(*broken)
    scenario(world)
    world.run(8.0)
    world.check_alive(limit_s=30.0)
    return world


@pytest.mark.parametrize("scenario", [each for each, _ in SCENARIOS])
def test_all_rules_together_lose_nothing(scenario: Callable[[World], None]) -> None:
    play(scenario)


@pytest.mark.parametrize(("scenario", "broken"), [each for each in SCENARIOS if each[1]])
def test_each_rule_is_needed(scenario: Callable[[World], None], broken: tuple[Rule, ...]) -> None:
    with pytest.raises(Broken):
        play(scenario, *broken)


@pytest.mark.parametrize(
    "first", [*range(0, 24, 4), *(pytest.param(k, marks=pytest.mark.long) for k in range(1000, 1300, 4))]
)
def test_random_faults_lose_nothing(first: int) -> None:
    for seed in range(first, first + 4):
        simulate(seed)
