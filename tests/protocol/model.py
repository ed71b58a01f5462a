"""The wire protocol of one lane as a small model: pure values, no disk, no clock, no encoding.

`explore` walks every state that a few messages, crashes and accidents can lead to, through a network that loses,
repeats and reorders (whatever was once sent may arrive at any time, any number of times, or never). The real spool,
uplink and ingest are driven against `Ingest` in test_protocol.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import msgspec

WINDOW = 2
COMPARED = 64  # ingest forgets a checksum once the message so much later is taken


class Sent(msgspec.Struct, frozen=True):
    """A message on the wire. `body` stands for its bytes, and for their checksum. With `seq < floor` it only asks."""

    epoch: int
    seq: int
    floor: int
    body: str


class Answer(msgspec.Struct, frozen=True):
    """Everything of `epoch` up to and including `seq` is in the log."""

    epoch: int
    seq: int


class Logged(msgspec.Struct, frozen=True):
    epoch: int
    seq: int
    body: str


# --- ingest -----------------------------------------------------------------------------------------------------


class Ingest(msgspec.Struct, frozen=True):
    """What ingest knows of a lane: what it expects next by epoch, its log, what it counted, what it refused."""

    expected: tuple[tuple[int, int], ...] = ()
    log: tuple[Logged, ...] = ()
    lost: int = 0
    conflict: bool = False


def take(ingest: Ingest, message: Sent) -> tuple[Ingest, Answer | None]:
    """Return ingest after a message, and what it answers once that is durable; None to a conflict."""
    positions = dict(ingest.expected)
    known = message.epoch in positions
    expected = positions.get(message.epoch, message.floor)
    if message.floor <= message.seq < expected:
        taken = {logged.seq: logged.body for logged in ingest.log if logged.epoch == message.epoch}
        known_as = taken.get(message.seq) if message.seq + COMPARED not in taken else None
        if known_as is not None and known_as != message.body:
            return msgspec.structs.replace(ingest, conflict=True), None
    lost = max(message.floor - expected, 0) if known else 0
    expected = max(expected, message.floor)
    log = ingest.log
    if message.seq == expected:
        log = (*log, Logged(message.epoch, message.seq, message.body))
        expected += 1
    positions[message.epoch] = expected
    after = Ingest(tuple(sorted(positions.items())), log, ingest.lost + lost, ingest.conflict)
    return after, Answer(message.epoch, expected - 1)


def recovered(ingest: Ingest) -> Ingest:
    """Return ingest after a crash: only what the log says is known."""
    last = {logged.epoch: logged.seq + 1 for logged in ingest.log}
    return msgspec.structs.replace(ingest, expected=tuple(sorted(last.items())))


# --- gateway ----------------------------------------------------------------------------------------------------


class Gateway(msgspec.Struct, frozen=True):
    """A gateway's lane: what is on its disk (bodies by seq, floor, epoch) and what its process knows.

    sent: highest seq sent in this epoch, or possibly so by an earlier process. asking: nothing else is sent before
    ingest says where it stands; compare: which message to ask with, because ingest says that it has it; asked: the seq
    that was asked with, -1 none since the last rewind. high: highest seq sent by this process since it last rewound.
    readable: the lowest seq whose message is still on the disk. begins: the floor this epoch began with. draws: what
    the next epoch is more than this one, so that a copy of the card never draws the same.
    """

    epoch: int = 1
    bodies: tuple[str, ...] = ()
    floor: int = 1
    sent: int = 0
    asking: bool = False
    compare: int = 0
    asked: int = -1
    high: int = 0
    readable: int = 1
    begins: int = 1
    draws: int = 10


def commit(gateway: Gateway, body: str) -> Gateway:
    """Spool one more message."""
    return msgspec.structs.replace(gateway, bodies=(*gateway.bodies, body))


def message(gateway: Gateway, seq: int) -> Sent:
    return Sent(gateway.epoch, seq, gateway.floor, gateway.bodies[seq - 1])


def question(gateway: Gateway) -> Sent:
    """Return what asks where ingest stands: an old message that is not acknowledged, or none."""
    if gateway.compare >= gateway.floor:
        return message(gateway, gateway.compare)
    if gateway.floor <= gateway.sent:
        return message(gateway, gateway.floor)
    return Sent(gateway.epoch, gateway.floor - 1, gateway.floor, "")


def sendable(gateway: Gateway) -> Sent | None:
    """Return what may be sent next: the question, or the next message inside the window."""
    if gateway.asking:
        return question(gateway) if gateway.asked < 0 else None
    seq = max(gateway.high + 1, gateway.floor)
    return message(gateway, seq) if seq <= len(gateway.bodies) and seq < gateway.floor + WINDOW else None


def sent(gateway: Gateway, seq: int) -> Gateway:
    known = max(gateway.sent, seq)
    if gateway.asking:
        return msgspec.structs.replace(gateway, asked=seq, sent=known)
    return msgspec.structs.replace(gateway, high=seq, sent=known)


def rewind(gateway: Gateway) -> Gateway:
    """Time out, or connect again."""
    return msgspec.structs.replace(gateway, high=0, asked=-1)


def answered(gateway: Gateway, answer: Answer) -> Gateway:
    """Return the gateway after an acknowledgement."""
    change = msgspec.structs.replace
    if answer.epoch != gateway.epoch:
        return gateway
    if answer.seq > gateway.sent:
        return renumbered(gateway)
    if not gateway.asking:
        return change(gateway, floor=max(gateway.floor, answer.seq + 1))
    if gateway.asked < 0:
        return gateway
    if answer.seq != gateway.asked and answer.seq >= gateway.floor:
        return change(gateway, compare=answer.seq, asked=-1)
    return change(gateway, floor=max(gateway.floor, answer.seq + 1), asking=False, compare=0, asked=-1)


def renumbered(gateway: Gateway) -> Gateway:
    """Begin a new epoch: what is unsent keeps its seqs."""
    return Gateway(
        gateway.epoch + gateway.draws, gateway.bodies, gateway.floor, readable=gateway.readable, begins=gateway.floor,
        draws=gateway.draws,
    )  # fmt: skip


def restarted(gateway: Gateway) -> Gateway:
    """Start a new process on the same disk."""
    change = msgspec.structs.replace
    return change(gateway, sent=len(gateway.bodies), asking=True, compare=0, asked=-1, high=0)


def powerless(gateway: Gateway) -> Gateway:
    """Start after a power loss: the mark of the floor is lost, not what is synced with the epoch."""
    return restarted(msgspec.structs.replace(gateway, floor=max(gateway.begins, gateway.readable)))


def moved(gateway: Gateway) -> Gateway:
    """Start in another board."""
    return renumbered(restarted(gateway))


def evicted(gateway: Gateway) -> Gateway:
    """Lose the oldest message that is not acknowledged, and all before it."""
    floor = min(gateway.floor + 1, len(gateway.bodies) + 1)
    return msgspec.structs.replace(gateway, floor=floor, readable=floor)


# --- every way it can go ----------------------------------------------------------------------------------------


class World(msgspec.Struct, frozen=True):
    """One state of everything; `up` and `down`, what was ever sent, only grow.

    `ingest` is what is durable. What it took and did not commit shows nowhere, and its crash is a message lost.
    """

    gateway: Gateway = Gateway()
    ingest: Ingest = Ingest()
    up: frozenset[Sent] = frozenset()
    down: frozenset[Answer] = frozenset()
    gone: frozenset[str] = frozenset()  # bodies that were evicted, or left the city with the old card
    copy: Gateway | None = None
    accidents: int = 0
    restored: bool = False


def explore(messages: int, accidents: int, visit: Callable[[World], None], start: World | None = None) -> int:
    """Visit every state reachable with so many messages and accidents, once; return how many there are."""
    first = start or World()
    seen, queue = {first}, deque([first])
    while queue:
        world = queue.popleft()
        visit(world)
        for after in _steps(world, messages, accidents):
            if after not in seen:
                seen.add(after)
                queue.append(after)
    return len(seen)


def _steps(world: World, messages: int, accidents: int) -> Iterator[World]:
    change = msgspec.structs.replace
    gateway = world.gateway
    if len(gateway.bodies) < messages:
        body = f"{'b' if world.restored else 'a'}{len(gateway.bodies) + 1}"
        yield change(world, gateway=commit(gateway, body))
    if (out := sendable(gateway)) is not None:
        yield change(world, gateway=sent(gateway, out.seq), up=world.up | {out})
    if gateway.high or gateway.asked >= 0:
        yield change(world, gateway=rewind(gateway))
    for out in world.up:
        ingest, answer = take(world.ingest, out)
        yield change(world, ingest=ingest, down=world.down | ({answer} if answer else frozenset()))
    for answer in world.down:
        yield change(world, gateway=answered(gateway, answer))
    if world.accidents < accidents:
        yield from _accidents(change(world, accidents=world.accidents + 1))


def _accidents(world: World) -> Iterator[World]:
    change = msgspec.structs.replace
    gateway = world.gateway
    yield change(world, ingest=recovered(world.ingest))
    if not (world.restored and gateway.asking):  # docs/wire.md names what a second start before the answer may cost
        yield change(world, gateway=restarted(gateway))
        yield change(world, gateway=powerless(gateway))
    if gateway.epoch == 1:  # once is enough, and each more multiplies the states
        yield change(world, gateway=moved(gateway))
    if gateway.floor <= len(gateway.bodies):
        yield change(world, gateway=evicted(gateway), gone=world.gone | {gateway.bodies[gateway.floor - 1]})
    if world.copy is None:
        yield change(world, copy=gateway)
    elif not world.restored:
        # the card comes back as it was; by then nothing of the old connection is under way
        old = frozenset(gateway.bodies[len(world.copy.bodies) :])
        card = restarted(change(world.copy, draws=1))
        yield change(world, gateway=card, restored=True, gone=world.gone | old, up=frozenset(), down=frozenset())


def drained(world: World) -> World:
    """Return what becomes of a world once nothing is lost any more."""
    gateway, ingest = world.gateway, world.ingest
    for _ in range(3 * len(gateway.bodies) + 3):
        gateway, answers = rewind(gateway), []
        while (out := sendable(gateway)) is not None:
            gateway = sent(gateway, out.seq)
            ingest, answer = take(ingest, out)
            answers += [answer] if answer is not None else []
        for answer in answers:
            gateway = answered(gateway, answer)
    return msgspec.structs.replace(world, gateway=gateway, ingest=ingest)
