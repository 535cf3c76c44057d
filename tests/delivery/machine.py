"""The state machine: numbers of hypothesis' choosing, read as steps of a world.

A rule-based machine of hypothesis chooses each step by itself, which costs ten times what the step does. Here a whole
example is one list of numbers, each of which is a step with its arguments, so thousands of examples fit into a suite
and each still shrinks: numbers are left out, and made smaller, down to the harmless first steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from hypothesis import note
from hypothesis import strategies as st

from instep.recording.schema import Durability
from tests.delivery.client import NAMES, ModelClient
from tests.delivery.lives import Is, Lane
from tests.delivery.network import Connection
from tests.delivery.node import Sizes
from tests.delivery.world import CLIENTS, World

_BYTES: Final = 3
"""Of a number."""


class Digits:
    """The arguments in a number: its digits, to whatever bases are asked for."""

    def __init__(self, number: int) -> None:
        self._rest = number

    def below(self, base: int) -> int:
        self._rest, digit = divmod(self._rest, base)
        return digit

    @property
    def flag(self) -> bool:
        return self.below(2) == 1


def _client(world: World, digits: Digits) -> ModelClient:
    return world.clients[digits.below(CLIENTS)]


def _lane(client: ModelClient, digits: Digits, *states: Is) -> Lane:
    """One in any of these states, if there is one."""
    lanes = list(client.lanes.values())
    able = [lane for lane in lanes if lane.state in states] or lanes
    return able[digits.below(len(able))]


def _lanes(client: ModelClient, digits: Digits) -> list[Lane]:
    """All, or one that is open."""
    return [_lane(client, digits, Is.OPEN)] if digits.below(3) else list(client.lanes.values())


def _sender(world: World, digits: Digits) -> ModelClient:
    """Any client that can send something, or any."""
    first = digits.below(CLIENTS)
    clients = world.clients[first:] + world.clients[:first]
    able = [client for client in clients if any(lane.state is Is.OPEN for lane in client.lanes.values())]
    return (able or clients)[0]


def _connection(world: World, digits: Digits) -> Connection:
    """Any; one of the newest, mostly, and one that has something to deliver, if there is one."""
    connections = world.network.connections
    busy = [connection for connection in connections if connection.to_server or connection.to_client]
    among = busy or connections
    return among[-1 - min(digits.below(4), len(among) - 1)]


def _arrives(world: World, client: ModelClient, digits: Digits) -> None:
    """What a client has just sent may arrive at once, before anything else moves."""
    if digits.flag:
        world.deliver_to_server(client.connection)


# ── Steps of clients ───────────────────────────────────────────────────────────────────────────────────────────────


def _all_goes_well(world: World, digits: Digits) -> None:
    for _ in range(1 + digits.below(3)):
        world.all_goes_well()


def _open(world: World, digits: Digits) -> None:
    client = _client(world, digits)
    lanes = [client.lanes[name] for name in (NAMES, NAMES[:1], NAMES[1:])[digits.below(3)]]
    lanes = [lane for lane in lanes if lane.state is Is.NOTHING]
    if lanes:
        client.open(lanes)


def _send(world: World, digits: Digits) -> None:
    client = _sender(world, digits)
    lanes, timesteps = _lanes(client, digits), 1 + digits.below(3)
    client.send(lanes, timesteps, anew=digits.flag and digits.flag, politely=digits.flag)
    if digits.flag:
        world.all_goes_well()
    else:
        _arrives(world, client, digits)


def _send_again(world: World, digits: Digits) -> None:
    client = _sender(world, digits)
    client.send(_lanes(client, digits), 1 + digits.below(3), anew=True, politely=True)
    _arrives(world, client, digits)


def _contradict(world: World, digits: Digits) -> None:
    client = _sender(world, digits)
    client.contradict(_lane(client, digits, Is.OPEN))


def _close(world: World, digits: Digits) -> None:
    client = _sender(world, digits)
    client.close(_lane(client, digits, Is.OPEN))
    _arrives(world, client, digits)


def _read_state(world: World, digits: Digits) -> None:
    client = _sender(world, digits)
    client.read_states(_lanes(client, digits))
    _arrives(world, client, digits)


def _reset(world: World, digits: Digits) -> None:
    client = _sender(world, digits)
    client.reset(_lane(client, digits, Is.OPEN), next(world.truth.values) if digits.below(3) else 0)
    _arrives(world, client, digits)


def _fork(world: World, digits: Digits) -> None:
    client = _sender(world, digits)
    client.fork(_lane(client, digits, Is.OPEN))
    _arrives(world, client, digits)


def _reconnect(world: World, digits: Digits) -> None:
    _client(world, digits).reconnect()


def _take_over(world: World, digits: Digits) -> None:
    client = _client(world, digits)
    lane = _lane(client, digits, Is.NOTHING, Is.REFUSED)
    if lane.state in (Is.NOTHING, Is.REFUSED):
        client.take_over(lane)
        _arrives(world, client, digits)


# ── Steps of the network ───────────────────────────────────────────────────────────────────────────────────────────


def _deliver_to_server(world: World, digits: Digits) -> None:
    world.deliver_to_server(_connection(world, digits), 1 + digits.below(3), is_taken=digits.flag or digits.flag)


def _deliver_to_client(world: World, digits: Digits) -> None:
    world.deliver_to_client(_connection(world, digits), 1 + digits.below(3))


def _drop(world: World, digits: Digits) -> None:
    world.drop(_connection(world, digits), of_server=digits.flag)


def _duplicate(world: World, digits: Digits) -> None:
    world.duplicate(_connection(world, digits), of_server=digits.flag)


def _cut(world: World, digits: Digits) -> None:
    world.cut(_connection(world, digits), server_notices=digits.flag)


def _replace(world: World, digits: Digits) -> None:
    """A connection breaks, the server notices when it has to, and the client goes on with another one."""
    client = _client(world, digits)
    world.cut(client.connection, server_notices=digits.flag)
    client.reconnect()
    if digits.flag:
        world.all_goes_well()


def _partition(world: World, digits: Digits) -> None:
    connection = _connection(world, digits)
    connection.is_partitioned = not connection.is_partitioned


# ── Steps of the server and its disk ───────────────────────────────────────────────────────────────────────────────


def _work(world: World, digits: Digits) -> None:
    world.work(1 + digits.below(3))


def _commit(world: World, digits: Digits) -> None:
    world.commit(is_told=digits.flag)


def _fail_step(world: World, digits: Digits) -> None:
    world.fail_step(loses_state=digits.below(3) == 2, after=digits.below(3))


def _tick(world: World, _: Digits) -> None:
    world.tick()


def _checkpoint(world: World, _: Digits) -> None:
    world.checkpoint()


def _expire(world: World, _: Digits) -> None:
    world.expire()


def _hibernate(world: World, _: Digits) -> None:
    world.hibernate()


def _sync(world: World, _: Digits) -> None:
    world.disk.sync()


def _break_disk(world: World, _: Digits) -> None:
    world.disk.broken = True


def _kill(world: World, digits: Digits) -> None:
    world.crash(power_lost=0)
    world.disk.broken = False
    _start(world, digits)


def _lose_power(world: World, digits: Digits) -> None:
    world.crash(power_lost=1 + digits.below(6))
    world.disk.broken = False
    _start(world, digits)


def _start(world: World, digits: Digits) -> None:
    if digits.below(3) == 2:
        world.start_damaged(digits.below(100), digits.below(1000))
    world.start()


Step = Callable[[World, Digits], None]

_ALWAYS: Final[tuple[tuple[int, Step], ...]] = (
    (5, _all_goes_well),
    (14, _send),
    (4, _deliver_to_server),
    (2, _deliver_to_client),
    (4, _work),
    (3, _commit),
    (2, _open),
    (1, _send_again),
    (2, _tick),
)
_CLIENT_FAULTS: Final = (
    (2, _reconnect),
    (2, _take_over),
    (1, _contradict),
    (2, _close),
)
_STATES: Final = ((2, _read_state), (2, _reset), (2, _fork))
_NETWORK_FAULTS: Final = ((1, _drop), (1, _duplicate), (1, _cut), (1, _partition), (2, _reconnect), (2, _replace))
_SERVER_FAULTS: Final = ((1, _checkpoint), (1, _fail_step), (1, _expire), (2, _hibernate))
_CRASHES: Final = ((1, _checkpoint), (2, _kill), (1, _sync), (1, _break_disk))
_POWER: Final = ((2, _lose_power),)


@dataclass(frozen=True)
class Faults:
    """What can go wrong in an example; each example has some of it."""

    durability: Durability
    loses_power: bool = False


def steps_of(faults: Faults, which: int) -> list[Step]:
    """A table of steps, each as often as it is likely: everything that goes well, and some of the faults."""
    chosen = list(_ALWAYS)
    for bit, some in enumerate((_CLIENT_FAULTS, _NETWORK_FAULTS, _SERVER_FAULTS, _CRASHES, _STATES)):
        if which >> bit & 1:
            chosen += some
    if faults.loses_power and which >> 3 & 1:
        chosen += _POWER
    return [step for weight, step in chosen for _ in range(weight)]


def numbers(most: int) -> st.SearchStrategy[list[int]]:
    """An example of at most so many steps, as `run` takes it. Bytes are drawn at once, and evenly."""
    drawn = st.binary(min_size=most // 3 * _BYTES, max_size=most * _BYTES)
    return drawn.map(lambda data: [int.from_bytes(data[at : at + _BYTES], "big") for at in range(0, len(data), _BYTES)])


def run(faults: Faults, example: list[int]) -> World:
    """Live an example, and have everything answered in the end.

    Raises:
        Violation: when a rule of delivery was broken.
    """
    setting = Digits(example[0])
    table = steps_of(faults, 31 - setting.below(32))
    world = World(faults.durability, Sizes(window=1 + setting.below(4), batch=(1, 2, 4)[setting.below(3)]))
    try:
        _live(world, table, example, goes_well=setting.flag)
    except BaseException:
        if world.node is not None:
            world.node.kill()  # tasks that have not begun would be warned of in some later test
        raise
    return world


def _live(world: World, table: list[Step], example: list[int], *, goes_well: bool) -> None:
    world.clients[0].open([world.clients[0].lanes[name] for name in NAMES])
    if goes_well:
        world.all_goes_well()
    for number in example[1:]:
        digits = Digits(number)
        step = table[digits.below(len(table))]
        note(f"{step.__name__.removeprefix('_')} {digits.__dict__['_rest']}")
        step(world, digits)
        world.start()
        world.check()
    world.settle()
