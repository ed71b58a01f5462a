"""The life of an alarm: every state with every event, from the table itself."""

from __future__ import annotations

import itertools

import pytest

from citybrain.errors import TransitionError
from streams.alarms import ACTIVE, ALARM, CLOSED, HELD, Facts, decide

FACTS = [Facts(life, settled) for life, settled in itertools.product((False, True), repeat=2)]
EVERY = [(state, event, facts) for state in ALARM.states for event in ALARM.events for facts in FACTS]
REFUSED = {
    ("new", "clear"), ("new", "acknowledge"), ("new", "settle"), ("new", "latch_over"),
    ("unack", "settle"), ("unack", "latch_over"), ("acked", "settle"), ("acked", "latch_over"),
    ("acked", "acknowledge"), ("latched", "acknowledge"),
    *(("closed", event) for event in ALARM.events),
}  # fmt: skip


@pytest.mark.parametrize(("state", "event", "facts"), EVERY)
def test_every_state_takes_every_event_or_refuses_it(state: str, event: str, facts: Facts) -> None:
    if (state, event) in REFUSED:
        with pytest.raises(TransitionError, match=f"no step {event!r} from {state!r}"):
            decide(state, event, facts, 1000, 60, due_at=1040)
        return
    change = decide(state, event, facts, 1000, 60, due_at=1040)
    after = change.moved.after
    assert change.moved.reason
    assert change.active == (after in ACTIVE)
    assert change.open == (after != CLOSED)
    assert change.due_at == (None if after not in HELD else 1040 if state in HELD else 1060)
    if event == "raise":
        assert change.active, "a raise always makes it active"
    if event == "clear":
        assert not change.active, "a clear always ends it"
    if event in ("settle", "latch_over"):
        assert after == CLOSED


@pytest.mark.parametrize(
    ("events", "facts", "state"),
    [
        (["raise"], Facts(), "unack"),
        (["raise", "clear"], Facts(), "rtn_unack"),
        (["raise", "clear", "raise"], Facts(), "unack"),
        (["raise", "acknowledge", "raise"], Facts(), "acked"),
        (["raise", "acknowledge", "clear"], Facts(), "closed"),
        (["raise", "clear", "acknowledge"], Facts(), "closed"),
        (["raise", "clear", "latch_over"], Facts(), "closed"),
        (["raise", "clear"], Facts(settled=True), "closed"),
        (["raise", "acknowledge", "clear"], Facts(life=True), "latched"),
        (["raise", "clear", "acknowledge"], Facts(life=True), "latched"),
        (["raise", "clear", "acknowledge", "raise"], Facts(life=True), "unack"),
        (["raise", "acknowledge", "clear"], Facts(life=True, settled=True), "closed"),
    ],
)
def test_the_usual_ways_end_where_the_standard_says(events: list[str], facts: Facts, state: str) -> None:
    at = "new"
    for event in events:
        at = decide(at, event, facts, 0, 60).moved.after
    assert at == state


def test_every_open_state_can_end() -> None:
    ends = {step.state for step in ALARM.steps if step.next == CLOSED}
    assert ends == {"unack", "acked", "rtn_unack", "latched"}
