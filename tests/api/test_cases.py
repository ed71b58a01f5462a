"""Cases: stages and who moves them, numbers, class codes, places; commands and what the desk answers."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from api.cases.cases import CASE, FINISHED, STAGES, VERDICTS, classify, judged, mirror, number, parse_stage
from api.cases.places import NOWHERE, Atlas
from citybrain.db.schema import alarms, cases, commands, incidents, timeline
from citybrain.errors import TransitionError
from citybrain.machine import Machine
from citybrain.model import Place, Registry
from streams.alarms import ALARM
from streams.incidents import INCIDENT
from tests.desk_city import CATEGORIES, HYDRANTS, MIN, T0, City, S, make_registry

DOCS = Path(__file__).parents[2] / "docs" / "cases.md"


# --- the table ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", [ALARM, INCIDENT, CASE], ids=lambda machine: machine.name)
def test_docs_hold_the_tables_the_program_runs_on(machine: Machine) -> None:
    text = DOCS.read_text(encoding="utf-8")
    found = re.search(rf"<!-- table {machine.name} -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert found is not None, f"docs/cases.md has no table {machine.name}"
    assert found[1] == machine.table(), f"docs/cases.md: put Machine.table() of {machine.name} there again"


def test_docs_name_every_stage() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert all(f"`{stage}` {zh}" in text for stage, zh in STAGES.items())


def test_every_stage_is_a_state_and_every_open_one_can_end() -> None:
    assert set(CASE.states) == {*STAGES, "new"}
    for stage in set(STAGES) - FINISHED:
        for verdict in VERDICTS:
            moved = judged(stage, "external", verdict, None)
            assert moved is not None
            assert moved.after in FINISHED


@pytest.mark.parametrize(("stage", "event"), [*itertools.product(CASE.states, CASE.events)])
def test_only_the_owner_moves_a_case(stage: str, event: str) -> None:
    external, native = CASE.find(stage, event, "external"), CASE.find(stage, event, "native")
    if event == "report":
        assert (external is None) == (stage != "new")
    elif external is not None and native is not None:
        assert event == "void"
    if native is not None and event not in ("report", "void"):
        assert event in ("order", "recovered", "came_back", "quiet", "take", "done", "not_needed", "reassign")
    if stage in FINISHED:
        assert external is None
        assert native is None


def test_the_platform_may_leave_stages_out_but_not_go_back() -> None:
    way = [stage for stage in STAGES if stage not in ("returned", "void")]
    for early, late in itertools.combinations(way, 2):
        moved = mirror(early, "external", late)
        assert moved is not None
        assert moved.after == late
        if (late, early) not in {("verify_fix", "dispatched"), ("verify_fix", "handled")}:
            with pytest.raises(TransitionError, match="comes too late"):
                mirror(late, "external", early)
    assert mirror("filed", "external", "filed") is None
    rework = mirror("verify_fix", "external", "handled")
    assert rework is not None
    assert rework.reason == "rework"


def test_a_unit_may_return_a_case_and_it_is_dispatched_again() -> None:
    stage = "dispatched"
    for to in ("returned", "dispatched", "taken", "returned", "dispatched", "closed"):
        moved = mirror(stage, "external", to)
        assert moved is not None
        stage = moved.after
    with pytest.raises(TransitionError):
        mirror("filed", "external", "returned")


def test_what_is_not_the_platforms_it_does_not_move() -> None:
    with pytest.raises(TransitionError, match="owner system is native"):
        mirror("dispatched", "native", "closed")
    with pytest.raises(TransitionError, match="owner system is native"):
        judged("dispatched", "native", "false_alarm", None)
    with pytest.raises(TransitionError, match="expected one of confirmed, false_alarm, duplicate"):
        judged("filed", "external", "maybe", None)


@pytest.mark.parametrize("stage", STAGES)
def test_stages_are_read_by_id_and_by_chinese_name(stage: str) -> None:
    assert parse_stage(stage) == parse_stage(STAGES[stage]) == stage
    with pytest.raises(TransitionError, match="expected one of reported, accepted"):
        parse_stage(stage.upper())


# --- number, class, place -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "offset", "text"),
    [(T0, 480, "CB20261125-000007"), (T0 - 1, 480, "CB20261124-000007"), (T0, 0, "CB20261124-000007"),
     (0, 480, "CB19700101-000007")],
)  # fmt: skip
def test_the_number_has_the_local_day(at: int, offset: int, text: str) -> None:
    assert number(7, at, offset) == text


def test_a_code_comes_with_the_edition_it_is_from() -> None:
    editions = ("GB/T 47678.5-2026", "GB/T 30428.2")
    found = {name: classify(category, editions) for name, category in CATEGORIES.items()}
    assert (found["elevator_trapped"].edition, found["elevator_trapped"].code) == (editions[0], "01076")
    assert (found["water_main_burst"].edition, found["water_main_burst"].code) == (editions[1], "05-01")
    assert (found["battery"].edition, found["battery"].code) == ("", "")


def test_a_place_knows_its_grid_street_and_owner() -> None:
    registry = make_registry()
    atlas = Atlas(registry)
    located = atlas.locate("hyd-001")
    assert (located.grid, located.street, located.area_owner) == ("grid-1", "002", "street-002")
    assert located.complete
    assert atlas.locate("gw-1").complete, "a gateway stands somewhere too"
    assert atlas.locate("nobody") == NOWHERE
    elsewhere = Atlas(Registry(registry.gateways, registry.devices)).locate("hyd-001")
    assert elsewhere.place == Place(120.601, 31.3, "320508001001001", "路1号")
    assert not elsewhere.complete
    assert atlas.unit_name("water") == ("供水公司", "Water company")
    assert atlas.unit_name("nobody") == ("nobody", "nobody")


# --- commands -----------------------------------------------------------------------------------------------------


def test_acknowledging_names_who_and_when(city: City) -> None:
    city.raises("hydrant_pressure_low", HYDRANTS[0], at=0)
    assert city.command("c1", "acknowledge", {"alarm": 1}, "看到了", at=5 * S) == "applied: alarm 1 acknowledged"
    alarm = city.one(alarms)
    assert (alarm["state"], alarm["acknowledged_by"], alarm["acknowledged_at"]) == ("acked", "wang", T0 + 5 * S)
    line = city.rows(timeline)[-1]
    assert (line["actor"], line["reason"], line["details"]) == ("wang", "acknowledged", '{"why":"看到了"}')


def test_an_operator_confirms_and_the_case_is_there_at_once(city: City) -> None:
    city.raises("hydrant_pressure_low", HYDRANTS[0], at=0)
    assert city.command("c1", "confirm", {"incident": 1}, at=5 * S) == "applied: incident 1 confirmed"
    assert city.kinds() == {"case": 1}
    incident = city.one(incidents)
    assert (incident["confirmed_by"], incident["confirmed_at"]) == ("wang", T0 + 5 * S)


def test_an_operator_confirms_a_power_cut_nobody_is_trapped_in(city: City) -> None:
    city.raises("elevator_mains_lost", "lift-a1", at=0)
    assert city.command("c1", "confirm", {"incident": 1}, at=S).startswith("applied")
    assert city.one(cases)["category"] == "elevator_power_cut"


def test_a_rejected_incident_is_silent_until_it_clears_and_then_new(city: City) -> None:
    city.raises("hydrant_pressure_low", HYDRANTS[0], at=0)
    assert city.command("c1", "reject", {"incident": 1}, "冲洗管网", at=S) == "applied: incident 1 rejected"
    city.step(60 * MIN)
    assert city.rows(cases) == []
    incident = city.one(incidents)
    assert (incident["state"], incident["reason"], incident["open"]) == ("rejected", "冲洗管网", 0)
    city.clears("hydrant_pressure_low", HYDRANTS[0], at=61 * MIN)
    city.raises("hydrant_pressure_low", HYDRANTS[0], at=62 * MIN)
    assert len(city.rows(incidents)) == 2


def test_rejecting_an_incident_does_not_touch_its_rescue(city: City) -> None:
    city.raises("elevator_mains_lost", "lift-a1", at=0)
    city.raises("elevator_trapped", "lift-a1", at=10 * S)
    city.command("c1", "reject", {"incident": 1}, "误报", at=20 * S)
    city.clears("elevator_trapped", "lift-a1", at=MIN)
    city.raises("elevator_trapped", "lift-a1", at=2 * MIN)
    assert city.kinds() == {"rescue": 1}
    rescue = city.one(cases)
    assert (rescue["stage"], rescue["rescued_at"]) == ("reported", None)


REFUSALS: list[tuple[str, dict[str, Any], str, str]] = [
    ("shout", {}, "", "kind 'shout': expected one of acknowledge, confirm"),
    ("acknowledge", {}, "", "body of 'acknowledge': Object missing required field `alarm`"),
    ("acknowledge", {"alarm": "1"}, "", "Expected `int`, got `str`"),
    ("acknowledge", {"alarm": 99}, "", "alarm 99: no such alarm"),
    ("acknowledge", {"alarm": 1}, "", "alarm 1: wang has acknowledged it already"),
    ("acknowledge", {"alarm": 2}, "", "alarm 2: it is over"),
    ("confirm", {"incident": 99}, "", "incident 99: no such incident"),
    ("confirm", {"incident": 2}, "", "incident 2: it is over (closed: cleared_before_confirmation)"),
    ("confirm", {"incident": 1}, "", "incident 1: confirmed already, by desk"),
    ("confirm", {"incident": 3}, "", "incident 3: its alarms are rescues"),
    ("reject", {"incident": 4}, " ", "incident 4: a rejection needs a reason"),
    ("reject", {"incident": 1}, "x", "case CB20261125-000001 belongs to external, and only its owner ends it"),
    ("rescued", {"case": "CB-none"}, "", "case 'CB-none': no such case"),
    ("rescued", {"case": "CB20261125-000001"}, "", "it is a case; only a rescue can be rescued"),
    (
        "progress",
        {"case": "CB20261125-000001", "stage": "somewhere"},
        "",
        "stage 'somewhere': expected one of reported",
    ),
    ("progress", {"case": "CB20261125-000003", "stage": "closed"}, "", "owner system is native"),
    ("verdict", {"case": "CB20261125-000001", "verdict": "maybe"}, "", "verdict 'maybe': expected one of confirmed"),
]


def test_refusals_say_why_are_recorded_and_change_nothing(city: City) -> None:
    city.raises("hydrant_tilted", HYDRANTS[0], at=0)  # alarm, incident and case 1
    city.command("ok", "acknowledge", {"alarm": 1}, at=S)
    city.raises("hydrant_illegal_use", HYDRANTS[1], at=2 * S)  # alarm and incident 2
    city.clears("hydrant_illegal_use", HYDRANTS[1], at=3 * S)
    city.raises("elevator_trapped", "lift-a1", at=4 * S)  # alarm, incident and case 3
    city.raises("hydrant_pressure_low", HYDRANTS[5], at=5 * S)  # alarm and incident 4
    city.raises("hydrant_offline", HYDRANTS[6], at=6 * S)  # maintenance order 3
    before = {table.name: city.rows(table) for table in (alarms, incidents, cases, timeline)}
    for n, (kind, body, reason, says) in enumerate(REFUSALS):
        answer = city.command(f"c{n}", kind, body, reason, at=10 * S)
        assert answer.startswith("refused: "), (kind, body)
        assert says in answer
    assert {table.name: city.rows(table) for table in (alarms, incidents, cases, timeline)} == before
    assert len(city.rows(commands)) == len(REFUSALS) + 1


def test_a_repeated_command_has_one_effect(city: City) -> None:
    city.raises("hydrant_pressure_low", HYDRANTS[0], at=0)
    for _ in range(2):
        assert city.command("same", "confirm", {"incident": 1}, at=S).startswith("applied")
    assert city.kinds() == {"case": 1}
    assert city.desk.counters.values["commands_repeated_total"] == 1


def test_a_broken_command_is_set_aside_and_the_next_is_done(city: City) -> None:
    city.raises("hydrant_pressure_low", HYDRANTS[0], at=0)
    city.mailbox.folder.mkdir(parents=True, exist_ok=True)
    (city.mailbox.folder / "000000000000000-x.json").write_text("{")
    assert city.command("c1", "confirm", {"incident": 1}, at=S).startswith("applied")
    assert city.desk.counters.values["dropped_total{reason=broken_command}"] == 1
    assert "not a command" in city.desk.counters.warnings[0]


# --- the platform's word ------------------------------------------------------------------------------------------


def test_the_platform_moves_its_case_to_the_end(city: City) -> None:
    city.raises("hydrant_tilted", HYDRANTS[0], at=0)
    name = city.one(cases)["number"]
    for n, stage in enumerate(["accepted", "filed", "派遣", "dispatched", "arrived"]):
        body = {"case": name, "stage": stage, "external_id": "GP-1"}
        assert city.command(f"p{n}", "progress", body, at=(n + 1) * MIN).startswith("applied")
    assert city.command("late", "progress", {"case": name, "stage": "filed"}, at=6 * MIN) == (
        "refused: case: 'filed' comes too late, it is at 'arrived'"
    )
    body = {"case": name, "verdict": "confirmed", "stage": "closed", "external_id": "GP-1"}
    assert city.command("v", "verdict", body, "已扶正", at=9 * MIN) == f"applied: case {name}: confirmed"
    case = city.one(cases)
    assert (case["stage"], case["verdict"], case["verdict_reason"], case["external_id"], case["closed_at"]) == (
        "closed", "confirmed", "已扶正", "GP-1", T0 + 9 * MIN)  # fmt: skip
    assert city.command("v2", "verdict", body, at=10 * MIN) == f"applied: case {name}: confirmed already"
    assert "comes too late" in city.command("v3", "verdict", {**body, "verdict": "false_alarm"}, at=11 * MIN)
    stages = [row["after"] for row in city.rows(timeline) if row["entity"] == "case"]
    assert stages == ["reported", "accepted", "filed", "dispatched", "arrived", "closed"]


def test_a_verdict_after_the_closing_still_counts(city: City) -> None:
    city.raises("hydrant_tilted", HYDRANTS[0], at=0)
    name = city.one(cases)["number"]
    city.command("p", "progress", {"case": name, "stage": "closed"}, at=MIN)
    assert city.command("v", "verdict", {"case": name, "verdict": "confirmed", "stage": "closed"}, "ok", at=2 * MIN)
    case = city.one(cases)
    assert (case["verdict"], case["closed_at"]) == ("confirmed", T0 + MIN)


def test_a_verdict_on_the_way_does_not_close(city: City) -> None:
    city.raises("hydrant_tilted", HYDRANTS[0], at=0)
    name = city.one(cases)["number"]
    city.command("v", "verdict", {"case": name, "verdict": "confirmed", "stage": "filed"}, at=MIN)
    assert (city.one(cases)["stage"], city.one(cases)["closed_at"]) == ("filed", None)
    city.command("w", "verdict", {"case": name, "verdict": "duplicate"}, "与在办案件重复", at=2 * MIN)
    assert (city.one(cases)["stage"], city.one(cases)["verdict"]) == ("void", "duplicate")
    assert city.one(incidents)["state"] == "confirmed", "it is true, and goes on collecting its alarms"


def test_an_operator_says_that_the_passenger_is_out(city: City) -> None:
    city.raises("elevator_trapped", "lift-a1", at=0)
    name = city.one(cases)["number"]
    assert city.command("c1", "rescued", {"case": name}, at=5 * MIN) == f"applied: case {name}: rescued"
    assert city.one(cases)["rescued_at"] == T0 + 5 * MIN
    assert "rescued already" in city.command("c2", "rescued", {"case": name}, at=6 * MIN)
    city.clears("elevator_trapped", "lift-a1", at=7 * MIN)
    assert city.one(cases)["rescued_at"] == T0 + 5 * MIN
    assert [kind for kind, _ in city.told()] == ["rescue.created", "case.recovered"]
