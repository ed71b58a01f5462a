"""One small state machine for every life cycle: alarm, incident, case, gateway, delivery.

A life cycle is a table of `Step`s. Its docs (`table`), audit (`Moved`) and exhaustive tests come from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from citybrain.errors import TransitionError

Guard = Callable[[Any], bool]


class Step(msgspec.Struct, frozen=True):
    """In `state`, on `event`, if `guard` (given the caller's facts) holds, go to `next` because of `reason`."""

    state: str
    event: str
    next: str
    reason: str
    guard: Guard | None = None


class Moved(msgspec.Struct, frozen=True):
    """A step that was taken; what an audit line is made of."""

    before: str
    event: str
    after: str
    reason: str


class Machine:
    """The life cycle `name`. Steps are tried in the order of the table; the first whose guard holds is taken.

    >>> door = Machine("door", "shut", [Step("shut", "open", "ajar", "push"), Step("ajar", "close", "shut", "pull")])
    >>> door.move("shut", "open").after
    'ajar'
    """

    def __init__(self, name: str, initial: str, steps: Iterable[Step]) -> None:
        self.name = name
        self.initial = initial
        self.steps = tuple(steps)
        self.states = tuple(dict.fromkeys([initial, *(s for step in self.steps for s in (step.state, step.next))]))
        self.events = tuple(dict.fromkeys(step.event for step in self.steps))

    def find(self, state: str, event: str, facts: Any = None) -> Moved | None:
        """Return the step from `state` on `event`, or None where the table has none."""
        for step in self.steps:
            if step.state == state and step.event == event and (step.guard is None or step.guard(facts)):
                return Moved(state, event, step.next, step.reason)
        return None

    def move(self, state: str, event: str, facts: Any = None) -> Moved:
        """Return the step from `state` on `event`; raises TransitionError, naming what is possible."""
        moved = self.find(state, event, facts)
        if moved is None:
            possible = sorted({step.event for step in self.steps if step.state == state})
            raise TransitionError(
                f"{self.name}: no step {event!r} from {state!r}; possible: {', '.join(possible) or 'none'}"
            )
        return moved

    def table(self) -> str:
        """Return the life cycle as a Markdown table, for docs/."""
        rows = [f"| {s.state} | {s.event} | {s.next} | {s.reason} |" for s in self.steps]
        return "\n".join(["| state | event | next | reason |", "|---|---|---|---|", *rows])
