"""The life of an alarm, after ISA-18.2: pure decisions, each with its reason code.

    unack      未确认  the condition holds, nobody has acknowledged it
    acked      处理中  it holds, somebody has
    rtn_unack  已恢复  it has ended, nobody has acknowledged it
    latched    已恢复  life safety only: it has ended and is acknowledged, and is held a while in case it comes back
    closed             over; the next raise is a new alarm

One alarm is open per (rule, subject). A raise while it is open counts and makes it active again, so a chattering
signal is one alarm. What has ended is let go when somebody acknowledged it, when its incident ends, or when it did not
come back for a while (`latch_over`): a recurrence after that is a new alarm.
"""

from __future__ import annotations

import msgspec

from citybrain.machine import Machine, Moved, Step
from citybrain.model import Edge


class Facts(msgspec.Struct, frozen=True):
    """What the table asks about an alarm. `life`: its rule is of life safety. `settled`: what it led to is finished."""

    life: bool = False
    settled: bool = False


def _life(facts: Facts) -> bool:
    return facts.life


def _settled(facts: Facts) -> bool:
    return facts.settled


ALARM = Machine(
    "alarm",
    "new",
    (
        Step("new", "raise", "unack", "raised"),
        Step("unack", "raise", "unack", "raised_again"),
        Step("unack", "acknowledge", "acked", "acknowledged"),
        Step("unack", "clear", "closed", "ended_after_its_case", _settled),
        Step("unack", "clear", "rtn_unack", "ended"),
        Step("acked", "raise", "acked", "raised_again"),
        Step("acked", "clear", "closed", "ended_after_its_case", _settled),
        Step("acked", "clear", "latched", "ended_and_held", _life),
        Step("acked", "clear", "closed", "ended_and_acknowledged"),
        Step("rtn_unack", "raise", "unack", "came_back"),
        Step("rtn_unack", "clear", "rtn_unack", "ended_already"),
        Step("rtn_unack", "acknowledge", "latched", "acknowledged_and_held", _life),
        Step("rtn_unack", "acknowledge", "closed", "acknowledged_after_its_end"),
        Step("rtn_unack", "settle", "closed", "its_incident_or_case_ended"),
        Step("rtn_unack", "latch_over", "closed", "did_not_come_back"),
        Step("latched", "raise", "unack", "came_back"),
        Step("latched", "clear", "latched", "ended_already"),
        Step("latched", "settle", "closed", "its_incident_or_case_ended"),
        Step("latched", "latch_over", "closed", "did_not_come_back"),
    ),
)

ACTIVE = frozenset({"unack", "acked"})
HELD = frozenset({"rtn_unack", "latched"})  # ended, but open
CLOSED = "closed"


class Change(msgspec.Struct, frozen=True):
    """What becomes of an alarm: the step, and the columns that follow from it. `due_at`: when it is let go."""

    moved: Moved
    active: bool
    open: bool
    due_at: int | None


def decide(state: str, event: str, facts: Facts, now_ms: int, latch_ms: int, *, due_at: int | None = None) -> Change:
    """Return what `event` (raise, clear, acknowledge, settle, latch_over) does to an alarm in `state`.

    A clear of an active alarm starts the latch of `latch_ms`; later events leave it running (`due_at`).
    Raises TransitionError where the life cycle has no such step.
    """
    moved = ALARM.move(state, event, facts)
    held = moved.after in HELD
    if held and moved.before not in HELD:
        due_at = now_ms + latch_ms
    return Change(moved, moved.after in ACTIVE, moved.after != CLOSED, due_at if held else None)


def event_of(edge: Edge) -> str:
    """Return the alarm's event for a transition's edge."""
    return "raise" if edge is Edge.RAISE else "clear"
