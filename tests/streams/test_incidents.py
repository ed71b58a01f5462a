"""Which alarms belong together, when that is a case, and what the case is about."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from citybrain.config import Duration
from citybrain.errors import TransitionError
from citybrain.machine import Machine
from streams.incidents import (
    CONFIRMING,
    INCIDENT,
    OPEN,
    URGENCIES,
    Candidate,
    Member,
    case_subject,
    correlate,
    decide,
    key_of,
    opening,
    urgency_of,
)
from streams.ruleset import Confirm, Rule
from tests.desk_city import MIN, RULES, S, make_registry

LOW, TILTED = RULES["hydrant_pressure_low"], RULES["hydrant_tilted"]
USE = msgspec.structs.replace(RULES["hydrant_illegal_use"], confirm=Confirm("after", Duration(20 * S)))
TRAPPED, MAINS, DOOR = RULES["elevator_trapped"], RULES["elevator_mains_lost"], RULES["elevator_door_failure"]
OFFLINE, DROP = RULES["hydrant_offline"], RULES["hydrant_pressure_drop"]
DEVICES = {device.id: device for device in make_registry().devices}


def candidate(id: int = 1, **changes: object) -> Candidate:
    usual = Candidate(id, "case", "water", "z1", 0, 0, active=False, shares_device=False)
    return msgspec.structs.replace(usual, **changes)


def member(rule: Rule = LOW, alarm: int = 1, subject: str = "", **changes: object) -> Member:
    usual = Member(alarm, rule, subject or f"d{alarm}", active=True, opened_at=0, raised_at=0, value=0.1, limit=0.14)
    return msgspec.structs.replace(usual, **changes)


def by_policy(policy: str, hold: int = 0, members: int = 1) -> Rule:
    return msgspec.structs.replace(LOW, confirm=Confirm(policy, Duration(hold), members))  # type: ignore[arg-type]


# --- keys and correlation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "subject", "key"),
    [
        (LOW, "hyd-000", ("zone", "z1")),
        (LOW, "hyd-007", ("zone", "z2")),
        (TILTED, "hyd-000", ("device", "hyd-000")),
        (TRAPPED, "lift-a1", ("building", "a")),
        (OFFLINE, "hyd-000", ("device", "hyd-000")),  # by gateway in its file, but a device's trouble is its own
        (LOW, "lift-a1", ("device", "lift-a1")),  # it has no zone
    ],
)
def test_what_alarms_share(rule: Rule, subject: str, key: tuple[str, str]) -> None:
    assert key_of(rule, subject, DEVICES[subject]) == key


def test_a_device_nobody_knows_shares_with_itself() -> None:
    assert key_of(LOW, "x", None) == ("device", "x")


@pytest.mark.parametrize(
    ("rule", "at", "candidates", "incident", "why"),
    [
        (LOW, 0, [], None, "first"),
        (LOW, 30 * MIN, [candidate()], 1, "same_zone"),
        (LOW, 30 * MIN + 1, [candidate()], None, "first"),
        (LOW, 99 * MIN, [candidate(active=True)], 1, "same_zone"),
        (LOW, -30 * MIN, [candidate(active=True)], 1, "same_zone"),
        (LOW, -31 * MIN, [candidate(active=True)], None, "first"),
        (LOW, 0, [candidate(key="z2")], None, "first"),
        (LOW, 0, [candidate(cause="hydrant")], None, "first"),
        (LOW, 99 * MIN, [candidate(cause="hydrant", shares_device=True)], 1, "same_device"),
        (LOW, 0, [candidate(1), candidate(2, cause="x", shares_device=True)], 1, "same_zone"),
        (LOW, 0, [candidate(1), candidate(2)], 2, "same_zone"),
        (LOW, 0, [candidate(kind="maintenance", shares_device=True)], None, "first"),
        (OFFLINE, 0, [candidate(kind="case", shares_device=True)], None, "first"),
        (OFFLINE, 0, [candidate(kind="maintenance", cause="device_care", shares_device=True)], None, "first"),
        (OFFLINE, 0, [candidate(kind="maintenance", cause="link", key="z1", shares_device=True)], 1, "same_zone"),
    ],
)
def test_where_an_alarm_belongs(
    rule: Rule, at: int, candidates: list[Candidate], incident: int | None, why: str
) -> None:
    joined = correlate(rule, "z1", "zone", at, candidates)
    assert (joined.incident, joined.why) == (incident, why)


# --- confirmation -------------------------------------------------------------------------------------------------

HOLD = 3 * MIN


@pytest.mark.parametrize(
    ("members", "now", "quiet_at", "event", "due_at"),
    [
        # at once
        ([member(TILTED)], 0, None, "at_once", None),
        ([member(USE), member(TILTED, 2)], 0, None, "at_once", 20 * S),
        # after a hold, by the desk's clock
        ([member(USE)], 20 * S - 1, None, None, 20 * S),
        ([member(USE)], 20 * S, None, "held", None),
        ([member(USE, opened_at=5 * S)], 20 * S, None, None, 25 * S),
        # … or in event time, where it is over already
        ([member(USE, active=False, cleared_at=20 * S)], 0, 99, "held", 99),
        ([member(USE, active=False, cleared_at=19 * S)], 0, 99, "all_clear", 99),
        # enough members, or the hold after the first of them
        ([member(), member(alarm=2)], 0, None, None, HOLD),
        ([member(), member(alarm=2, subject="d1")], 0, None, None, HOLD),
        ([member(), member(alarm=2), member(alarm=3)], 0, None, "members", HOLD),
        ([member(), member(alarm=2, opened_at=MIN)], HOLD, None, "held", None),
        ([member(active=False, cleared_at=MIN), member(alarm=2, opened_at=MIN)], HOLD, None, "held", None),
        ([member(active=False, cleared_at=MIN)], MIN, 99, "all_clear", 99),
        # a person decides
        ([member(by_policy("operator"))], 9 * MIN, None, None, None),
        ([member(by_policy("operator"), active=False, cleared_at=0)], 5, 9, None, 9),
        ([member(by_policy("operator"), active=False, cleared_at=0)], 9, 9, "quiet", 9),
    ],
)
def test_when_a_pending_incident_becomes_a_case(
    members: list[Member], now: int, quiet_at: int | None, event: str | None, due_at: int | None
) -> None:
    decision = decide("pending", members, quiet_at, now)
    assert (decision.event, decision.due_at) == (event, due_at)


@pytest.mark.parametrize(
    ("members", "quiet_at", "event"),
    [
        ([member(MAINS)], None, None),
        ([member(TRAPPED)], None, None),
        ([member(MAINS), member(DOOR, 2)], None, "wait"),
        ([member(MAINS, active=False, cleared_at=0)], 7, "quiet"),
    ],
)
def test_evidence_and_rescues_alone_confirm_nothing(
    members: list[Member], quiet_at: int | None, event: str | None
) -> None:
    assert decide("watching", members, quiet_at, 10).event == event


def test_a_confirmed_incident_only_waits_for_quiet() -> None:
    assert decide("confirmed", [member(TILTED)], None, 10).event is None
    assert decide("confirmed", [member(TILTED, active=False)], 11, 10) == decide("confirmed", [], 11, 10)
    assert decide("confirmed", [member(TILTED, active=False)], 10, 10).event == "quiet"


def test_a_rescue_keeps_its_incident_until_it_is_quiet() -> None:
    members = [member(USE, active=False, cleared_at=S), member(TRAPPED, 2, active=False, cleared_at=S)]
    assert decide("pending", members, 99, 10).event is None


@given(
    st.lists(
        st.builds(
            member,
            st.sampled_from([LOW, TILTED, USE, TRAPPED, MAINS, by_policy("operator"), by_policy("after", HOLD)]),
            st.integers(1, 9),
            active=st.booleans(),
            opened_at=st.integers(0, 300_000),
            cleared_at=st.integers(0, 300_000),
        ),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from(sorted(OPEN)),
    st.integers(0, 600_000),
)
def test_a_decision_can_be_carried_out_and_time_goes_on(members: list[Member], state: str, now: int) -> None:
    quiet_at = None if any(m.active for m in members) else 400_000
    decision = decide(state, members, quiet_at, now)
    if decision.event is None:
        assert decision.due_at is None or decision.due_at > now, "it would be looked at for ever"
        assert decision.due_at is not None or any(m.active for m in members), "it would never end"
    else:
        moved = INCIDENT.move(state, decision.event)
        if decision.event in CONFIRMING:
            assert moved.after == "confirmed"
            assert case_subject(members) is not None


def test_every_open_state_ends_and_no_ended_one_goes_on() -> None:
    machine: Machine = INCIDENT
    assert set(machine.states) == OPEN | {"new", "closed", "rejected"}
    for state in OPEN:
        assert machine.find(state, "quiet"), state
    for state in ("closed", "rejected"):
        for event in machine.events:
            with pytest.raises(TransitionError):
                machine.move(state, event)


def test_the_first_alarm_says_how_an_incident_opens() -> None:
    assert [opening(rule) for rule in (LOW, TILTED, USE, OFFLINE)] == ["wait"] * 4
    assert [opening(rule) for rule in (TRAPPED, MAINS)] == ["watch"] * 2


# --- what the case is about ---------------------------------------------------------------------------------------


def test_the_highest_rank_among_what_holds_leads() -> None:
    subject = case_subject([member(USE, 1), member(TILTED, 2)])
    assert subject is not None
    assert (subject.category, subject.lead.alarm, subject.reason) == ("hydrant_damaged", 2, "leading_rule")
    over = case_subject([member(USE, 1), member(TILTED, 2, active=False)])
    assert over is not None
    assert over.category == "hydrant_illegal_use"


def test_three_neighbours_are_a_burst_where_it_is_worst() -> None:
    three = [member(alarm=1, value=0.1), member(alarm=2, value=0.02), member(alarm=3, value=0.02)]
    subject = case_subject(three)
    assert subject is not None
    assert (subject.category, subject.lead.alarm, subject.place.alarm) == ("water_main_burst", 1, 2)
    two = case_subject([*three[:2], member(alarm=4, subject="d1")])
    assert two is not None
    assert two.category == "hydrant_no_pressure"


def test_a_hydrant_that_drops_is_a_neighbour_of_one_that_is_low() -> None:
    drops = [member(DROP, alarm, value=0.2, limit=None) for alarm in (1, 2)]
    subject = case_subject([*drops, member(alarm=3, value=0.05)])
    assert subject is not None
    assert (subject.category, subject.lead.alarm, subject.place.alarm) == ("water_main_burst", 3, 3)
    alone = case_subject([*drops, member(DROP, 4, subject="d2", value=0.1, limit=None)])
    assert alone is not None
    assert alone.category == "hydrant_no_pressure"


def test_rescues_make_no_ordinary_case() -> None:
    assert case_subject([member(TRAPPED)]) is None
    subject = case_subject([member(TRAPPED), member(MAINS, 2)])
    assert subject is not None
    assert subject.category == "elevator_power_cut"


@given(st.lists(st.sampled_from(URGENCIES), min_size=1))
def test_the_most_pressing_urgency_wins(urgencies: list[str]) -> None:
    assert URGENCIES.index(urgency_of(urgencies)) == max(URGENCIES.index(one) for one in urgencies)
