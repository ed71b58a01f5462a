"""Questions on a Modbus RTU line that nobody has answered (yet): how a late answer is told from the one that is due.

An RTU answer names its unit, its function and how many bytes it has, and nothing else (MODBUS over Serial Line V1.02,
2.5.1; pymodbus takes whatever comes from the unit). So while an answer may still come, the unit is asked nothing that
would be answered in the same shape: a register more is read along, and the data in front is what is wanted. A unit
answers in the order in which it is asked; once it has answered that, nothing older comes any more.
"""

from __future__ import annotations

import msgspec

from edge.drivers.registers import HIGHEST_ADDRESS, MOST_BITS, MOST_REGISTERS, Block

MOST_MORE = 2  # registers (bytes of bits) that are read along
FORGET = 8  # time-outs after which an answer does not come any more, for each question that waits its turn
PATIENCE, MOST_PATIENCE = 1.5, 2.0  # how much longer a unit is waited for that answers late


class Question(msgspec.Struct, frozen=True):
    """What was asked, since when it can be answered (monotonic), and how many time-outs were waited for it."""

    function: int
    size: int
    since_s: float
    patience: float


class Unanswered:
    """What the units of one line have left unanswered, and how long each is waited for."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._open: dict[int, list[Question]] = {}
        self._patience: dict[int, float] = {}
        self._hopeless: set[int] = set()  # units that answer later than could be waited for

    def __bool__(self) -> bool:
        return bool(self._open)

    def timeout_s(self, unit_id: int) -> float:
        """Return how long to wait for a unit: up to twice the usual for one that answers late, if that is enough."""
        return self._timeout_s * self._patience.get(unit_id, 1.0)

    def late(self, unit_id: int) -> bool:
        """Return whether the unit is one that answers late."""
        return unit_id in self._patience

    def distinct(self, unit_id: int, block: Block, now_s: float) -> Block | None:
        """Return what to ask so that no late answer can be taken for its answer; None where there is nothing now."""
        if unit_id not in self._open:
            return block
        self._forget(unit_id, now_s)
        shapes = {(one.function, one.size) for one in self._open.get(unit_id, ())}
        for more in range(MOST_MORE + 1):
            wider = wider_by(block, more)
            if wider is not None and (wider.function, wider.size) not in shapes:
                return wider
        return None

    def _forget(self, unit_id: int, now_s: float) -> None:
        """Give up what nobody will answer any more; a unit that does not answer at all is not waited for longer.

        Some units keep questions and answer them one after the other: all are given up together.
        """
        there = self._open.get(unit_id)
        if there and now_s - there[-1].since_s >= FORGET * self._timeout_s * len(there):
            self._patience.pop(unit_id, None)
            self._hopeless.discard(unit_id)
            del self._open[unit_id]

    def _keep(self, unit_id: int, left: list[Question]) -> None:
        if left:
            self._open[unit_id] = left
        else:
            self._open.pop(unit_id, None)

    def timed_out(self, unit_id: int, block: Block, at_s: float) -> None:
        """A question got no answer that is known to be its own."""
        question = Question(block.function, block.size, at_s, self._patience.get(unit_id, 1.0))
        self._open.setdefault(unit_id, []).append(question)

    def answered(self, unit_id: int) -> None:
        """The unit has answered what was asked last."""
        self._open.pop(unit_id, None)

    def refused(self, unit_id: int, block: Block, at_s: float) -> bool:
        """The unit has refused what was asked last, or what has been open for longest: a refusal does not say which.

        So that one is open no more, and this one is. Return whether there was any.
        """
        were_open = self._open.get(unit_id, [])
        if were_open:
            self._keep(unit_id, were_open[1:])
            self.timed_out(unit_id, block, at_s)
        return bool(were_open)

    def take(self, unit_id: int, function: int, size: int | None, now_s: float) -> bool:
        """Return whether a frame can be the late answer of an open question, which is open no more then.

        size: None for a refusal. The unit is waited for longer from now on, unless twice as long was too short.
        """
        there = self._open.get(unit_id, [])
        found = next((one for one in there if one.function == function and size in (None, one.size)), None)
        if found is None:
            return False
        behind = there[there.index(found) + 1 :]  # it answers in order, and has begun with the next one now
        self._keep(unit_id, [msgspec.structs.replace(one, since_s=max(one.since_s, now_s)) for one in behind])
        hopeless = found.patience >= MOST_PATIENCE
        self._patience[unit_id] = 1.0 if hopeless else self._longer(unit_id, found)
        if hopeless:
            self._hopeless.add(unit_id)
        return True

    def _longer(self, unit_id: int, found: Question) -> float:
        now = self._patience.get(unit_id, 1.0)
        return now if unit_id in self._hopeless else max(now, min(found.patience * PATIENCE, MOST_PATIENCE))


def wider_by(block: Block, more: int) -> Block | None:
    """Return a read of so many more registers, or bytes of bits; None where the protocol allows no such.

    >>> wider_by(Block(3, 100, 10, ()), 1), wider_by(Block(1, 0, 5, ()), 1).size, wider_by(Block(3, 0, 125, ()), 1)
    (Block(function=3, address=100, count=11, registers=()), 2, None)
    """
    bits = block.function in (1, 2)
    count = block.count + more * (8 if bits else 1)
    if count > (MOST_BITS if bits else MOST_REGISTERS) or block.address + count > HIGHEST_ADDRESS + 1:
        return None
    return Block(block.function, block.address, count, block.registers) if more else block
