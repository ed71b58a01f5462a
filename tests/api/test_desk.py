"""The desk: readings' transitions become alarms, incidents, cases, rescues; nothing twice, nothing forgotten."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import inspect
from sqlalchemy import text as sql

from api.desk import Desk, DeskConfig, replay
from citybrain.clock import DAY_MS, system_clock
from citybrain.counters import read_heartbeats
from citybrain.db.migrations import HEAD, revision, upgrade
from citybrain.db.schema import alarms, cases, consumed, incidents, journal, metadata, outbox
from citybrain.db.store import open_store, refusals
from citybrain.errors import NotFound, StorageError, Unavailable
from citybrain.layout import Run
from citybrain.mailbox import Command
from citybrain.model import Edge
from streams.log import Kind
from tests.conftest import end, eventually
from tests.desk_city import HYDRANTS, LIFTS, MIN, T0, City, S, everything, invariants

# Per group of alarms (rule, subject, time of its last raise), and what it became: how many such groups.
Groups = Counter[tuple[frozenset[tuple[str, str, int]], tuple[tuple[str, str], ...]]]


# --- incidents and cases ------------------------------------------------------------------------------------------


def test_one_hydrant_waits_for_its_hold_then_becomes_one_case(city: City) -> None:
    city.raises("hydrant_pressure_low", HYDRANTS[0], at=0)
    city.step(3 * MIN)  # opened at 1 s, so its hold is not over
    assert city.one(incidents)["state"] == "pending"
    assert city.rows(cases) == []
    city.step(3 * MIN + 2 * S)
    case = city.one(cases)
    assert (case["category"], case["unit"], case["stage"]) == ("hydrant_no_pressure", "water", "reported")
    assert case["number"] == "CB20261125-000001"
    assert (case["cell"], case["grid"], case["street"], case["area_owner"]) == (
        "320508001001000", "grid-1", "001", "street-001")  # fmt: skip
    assert case["deadline"] - case["opened_at"] == 120 * MIN
    assert [kind for kind, _ in city.told()] == ["case.created"]


def test_a_burst_is_one_case_at_its_worst_place(city: City) -> None:
    for n, value in ((0, 0.09), (1, 0.03), (2, 0.11)):
        city.raises("hydrant_pressure_low", HYDRANTS[n], at=n * 20 * S, value=value)
    case = city.one(cases)
    assert case["category"] == "water_main_burst"
    assert (case["edition"], case["code"]) == ("GB/T 30428.2", "05-01")  # the 2026 edition has none
    assert (case["lon"], case["address"]) == (120.601, "路1号")
    evidence = msgspec.json.decode(case["evidence"])
    assert [(line["device"], line["why"]) for line in evidence] == [
        ("hyd-000", "first"), ("hyd-001", "same_zone"), ("hyd-002", "same_zone")]  # fmt: skip
    city.raises("hydrant_pressure_low", HYDRANTS[3], at=2 * MIN, value=0.01)
    assert city.one(cases)["address"] == "路3号"  # nobody is there yet: it may still move to where it is worse
    assert [kind for kind, _ in city.told()] == ["case.created", "case.updated"]
    assert city.command("p1", "progress", {"case": case["number"], "stage": "arrived"}, at=3 * MIN).startswith(
        "applied"
    )
    city.raises("hydrant_pressure_low", HYDRANTS[4], at=4 * MIN, value=0.0)
    assert city.one(cases)["address"] == "路3号"


def test_a_case_that_spreads_is_upgraded_in_place(city: City) -> None:
    city.raises("hydrant_pressure_low", HYDRANTS[0], at=0)
    city.step(5 * MIN)
    assert city.one(cases)["category"] == "hydrant_no_pressure"
    city.raises("hydrant_pressure_low", HYDRANTS[1], HYDRANTS[2], at=10 * MIN, value=0.02)
    case = city.one(cases)
    assert (case["category"], case["title_en"], case["number"]) == (
        "water_main_burst", "Water main burst", "CB20261125-000001")  # fmt: skip
    assert case["deadline"] == T0 + 10 * MIN + S + 60 * MIN  # one hour from now is earlier than two from then
    assert [(kind, data["category"]) for kind, data in city.told()] == [
        ("case.created", "hydrant_no_pressure"), ("case.updated", "water_main_burst")]  # fmt: skip


def test_zones_do_not_mix(city: City) -> None:
    city.raises("hydrant_pressure_low", HYDRANTS[0], HYDRANTS[1], HYDRANTS[5], HYDRANTS[6], at=0)
    city.step(10 * MIN)
    assert [row["key"] for row in city.rows(incidents)] == ["z1", "z2"]
    assert city.kinds() == {"case": 2}


def test_a_knocked_over_hydrant_that_flows_is_damaged_once(city: City) -> None:
    city.raises("hydrant_illegal_use", HYDRANTS[0], at=0)
    city.raises("hydrant_tilted", HYDRANTS[0], at=5 * S)
    city.step(5 * MIN)
    assert city.one(cases)["category"] == "hydrant_damaged"


def test_what_clears_before_its_hold_becomes_no_case(city: City) -> None:
    city.raises("hydrant_illegal_use", HYDRANTS[0], at=0)
    city.clears("hydrant_illegal_use", HYDRANTS[0], at=10 * S)
    incident, alarm = city.one(incidents), city.one(alarms)
    assert (incident["state"], incident["reason"]) == ("closed", "cleared_before_confirmation")
    assert alarm["state"] == "closed"
    city.step(DAY_MS)
    assert city.rows(cases) == []


def test_what_a_gateway_delivers_late_is_a_case_even_though_it_is_over(city: City) -> None:
    city.put(city.transition("hydrant_illegal_use", HYDRANTS[0], Edge.RAISE, 0),
             city.transition("hydrant_illegal_use", HYDRANTS[0], Edge.CLEAR, 10 * MIN))  # fmt: skip
    city.step(60 * MIN)
    assert city.one(cases)["category"] == "hydrant_illegal_use"
    assert city.one(incidents)["reason"] == "held_long_enough"


def test_chatter_is_one_alarm_and_one_case(city: City) -> None:
    for n in range(6):
        city.raises("hydrant_tilted", HYDRANTS[0], at=n * 10 * MIN)
        city.clears("hydrant_tilted", HYDRANTS[0], at=n * 10 * MIN + 5 * MIN)
    assert city.one(alarms)["count"] == 6
    assert city.kinds() == {"case": 1}
    city.step(3 * 60 * MIN)
    assert city.one(alarms)["state"] == "closed"
    assert city.one(incidents)["state"] == "closed"
    city.raises("hydrant_tilted", HYDRANTS[0], at=4 * 60 * MIN)
    assert city.kinds() == {"case": 2}, "what comes back after a quiet time is new"


def test_a_case_that_is_closed_too_early_collects_its_alarms_and_makes_no_second(city: City) -> None:
    city.raises("hydrant_pressure_low", *HYDRANTS[:3], at=0)
    number = city.one(cases)["number"]
    verdict = {"case": number, "verdict": "confirmed", "stage": "closed"}
    assert city.command("v1", "verdict", verdict, "修好了", at=5 * MIN).startswith("applied")
    assert city.one(incidents)["state"] == "confirmed", "the hydrants are still without pressure"
    city.clears("hydrant_pressure_low", HYDRANTS[0], at=60 * MIN)
    city.raises("hydrant_pressure_low", HYDRANTS[0], HYDRANTS[3], at=70 * MIN)
    city.step(90 * MIN)
    assert city.kinds() == {"case": 1}
    city.clears("hydrant_pressure_low", *HYDRANTS[:4], at=100 * MIN)
    city.step(131 * MIN)
    assert city.one(incidents)["state"] == "closed"
    assert {row["state"] for row in city.rows(alarms)} == {"closed"}


def test_a_case_closed_when_all_is_quiet_ends_its_incident(city: City) -> None:
    city.raises("hydrant_tilted", HYDRANTS[0], at=0)
    city.clears("hydrant_tilted", HYDRANTS[0], at=MIN)
    assert [kind for kind, _ in city.told()] == ["case.created", "case.recovered"]
    city.command("v1", "verdict", {"case": city.one(cases)["number"], "verdict": "confirmed"}, at=2 * MIN)
    assert (city.one(incidents)["state"], city.one(alarms)["state"]) == ("closed", "closed")
    city.raises("hydrant_tilted", HYDRANTS[0], at=3 * MIN)
    assert city.kinds() == {"case": 2}


def test_a_false_alarm_ends_the_incident_and_silences_what_still_holds(city: City) -> None:
    city.raises("hydrant_tilted", HYDRANTS[0], at=0)
    number = city.one(cases)["number"]
    city.command("v1", "verdict", {"case": number, "verdict": "false_alarm", "stage": ""}, "现场正常", at=MIN)
    case = city.one(cases)
    assert (case["stage"], case["verdict"], case["verdict_reason"]) == ("void", "false_alarm", "现场正常")
    assert case["closed_at"] == T0 + MIN
    assert (city.one(incidents)["state"], city.one(alarms)["state"]) == ("rejected", "unack")
    city.clears("hydrant_tilted", HYDRANTS[0], at=2 * MIN)
    assert city.one(alarms)["state"] == "closed"


# --- life safety --------------------------------------------------------------------------------------------------


def test_a_power_cut_with_trapped_passengers_is_one_incident_and_a_rescue_each(city: City) -> None:
    city.raises("elevator_mains_lost", "lift-a1", "lift-a2", at=0)
    city.raises("elevator_trapped", "lift-a1", "lift-a2", at=15 * S)
    assert city.kinds() == {"rescue": 2}
    assert len(city.rows(incidents)) == 1
    assert {row["why"] for row in city.rows(alarms)} == {"first", "same_building"}
    assert all(row["deadline"] - row["opened_at"] == 30 * MIN for row in city.rows(cases))
    assert [(kind, data["urgency"], data["device"]) for kind, data in city.told()] == [
        ("rescue.created", "life", "lift-a1"), ("rescue.created", "life", "lift-a2")]  # fmt: skip
    city.raises("elevator_trapped", "lift-b1", at=20 * S)
    assert len(city.rows(incidents)) == 2


def test_a_power_cut_with_empty_cars_orders_nothing(city: City) -> None:
    city.raises("elevator_mains_lost", "lift-a1", "lift-a2", at=0)
    city.step(60 * MIN)
    city.clears("elevator_mains_lost", "lift-a1", "lift-a2", at=61 * MIN)
    city.step(100 * MIN)
    assert city.rows(cases) == []
    assert city.one(incidents)["state"] == "closed"


def test_a_rescue_is_not_merged_into_a_case_of_the_same_elevator(city: City) -> None:
    city.raises("elevator_door_failure", "lift-a1", at=0)
    city.raises("elevator_trapped", "lift-a1", at=MIN)
    assert city.kinds() == {"case": 1, "rescue": 1}
    assert len(city.rows(incidents)) == 1


def test_rescued_and_closed_are_two_clocks_and_a_second_trapping_runs_on(city: City) -> None:
    city.raises("elevator_trapped", "lift-a1", at=0)
    city.clears("elevator_trapped", "lift-a1", at=5 * MIN)
    rescue = city.one(cases)
    assert (rescue["rescued_at"], rescue["closed_at"], rescue["stage"]) == (T0 + 5 * MIN, None, "reported")
    city.raises("elevator_trapped", "lift-a1", at=6 * MIN)
    assert city.one(cases)["rescued_at"] is None
    assert [(kind, data["active"]) for kind, data in city.told()] == [
        ("rescue.created", True), ("case.recovered", False), ("case.updated", True)]  # fmt: skip
    assert all(row["urgent"] for row in city.rows(outbox))


def test_an_acknowledged_rescue_that_chatters_stays_one(city: City) -> None:
    city.raises("elevator_trapped", "lift-a1", at=0)
    city.command("a1", "acknowledge", {"alarm": 1}, at=10 * S)
    city.clears("elevator_trapped", "lift-a1", at=MIN)
    city.raises("elevator_trapped", "lift-a1", at=2 * MIN)
    assert city.kinds() == {"rescue": 1}
    assert city.one(alarms)["count"] == 2


def test_after_a_finished_rescue_the_next_trapping_is_a_new_one(city: City) -> None:
    city.raises("elevator_trapped", "lift-a1", at=0)
    city.command("v1", "verdict", {"case": city.one(cases)["number"], "verdict": "confirmed"}, at=3 * MIN)
    assert city.one(cases)["rescued_at"] is None  # its owner is done, the sensors are not: it stays in sight
    city.clears("elevator_trapped", "lift-a1", at=5 * MIN)
    assert city.one(cases)["rescued_at"] == T0 + 5 * MIN
    assert city.one(alarms)["state"] == "closed"
    city.raises("elevator_trapped", "lift-a1", at=6 * MIN)
    assert city.kinds() == {"rescue": 2}


def test_a_car_that_two_rules_notice_is_one_rescue_until_neither_does(city: City) -> None:
    city.raises("elevator_trapped_inferred", "lift-a1", at=0)
    city.raises("elevator_trapped", "lift-a1", at=MIN)
    assert city.kinds() == {"rescue": 1}
    assert len(city.rows(alarms)) == 2
    city.clears("elevator_trapped_inferred", "lift-a1", at=2 * MIN)
    assert city.one(cases)["rescued_at"] is None, "the other rule says that somebody is in there"
    city.clears("elevator_trapped", "lift-a1", at=5 * MIN)
    assert city.one(cases)["rescued_at"] == T0 + 5 * MIN
    city.raises("elevator_trapped", "lift-a1", at=6 * MIN)
    assert (city.kinds(), city.one(cases)["rescued_at"]) == ({"rescue": 1}, None), "again within the quiet time"
    city.clears("elevator_trapped", "lift-a1", at=7 * MIN)
    city.command("v1", "verdict", {"case": city.one(cases)["number"], "verdict": "confirmed"}, at=8 * MIN)
    assert {row["state"] for row in city.rows(alarms)} == {"closed"}, "both are let go with their rescue"
    assert [kind for kind, _ in city.told()] == [
        "rescue.created", "case.recovered", "case.updated", "case.recovered"]  # fmt: skip


def test_an_old_rescue_that_nobody_closed_takes_no_new_passenger(city: City) -> None:
    city.raises("elevator_trapped_inferred", "lift-a1", at=0)
    city.clears("elevator_trapped_inferred", "lift-a1", at=MIN)
    city.raises("elevator_trapped", "lift-a1", at=2 * 60 * MIN)
    assert city.kinds() == {"rescue": 2}


def test_what_the_box_and_the_platform_see_of_one_hydrant_is_one_case(city: City) -> None:
    city.raises("hydrant_local_pressure", HYDRANTS[0], at=0)
    assert city.kinds() == {"case": 1}, "the box has judged already: nothing is waited for"
    city.raises("hydrant_pressure_low", HYDRANTS[0], at=2 * MIN)
    city.raises("hydrant_local_pressure", HYDRANTS[1], HYDRANTS[2], at=3 * MIN)
    assert city.kinds() == {"case": 1}
    assert city.one(cases)["category"] == "water_main_burst", "three of a zone, told by their boxes"


def test_silence_told_by_the_box_and_noticed_by_the_platform_is_one_order(city: City) -> None:
    city.raises("hydrant_offline", HYDRANTS[0], at=0)
    city.raises("hydrant_silent", HYDRANTS[0], at=4 * MIN)
    city.clears("hydrant_offline", HYDRANTS[0], at=4 * MIN)  # the box's word is a value of the device too
    city.raises("hydrant_offline", HYDRANTS[0], at=11 * MIN)
    city.raises("hydrant_wiring", HYDRANTS[0], at=20 * MIN)
    assert city.kinds() == {"maintenance": 1}


# --- maintenance --------------------------------------------------------------------------------------------------


def test_maintenance_stays_ours_and_closes_itself(city: City) -> None:
    city.raises("hydrant_offline", HYDRANTS[0], HYDRANTS[1], at=0)
    assert city.kinds() == {"maintenance": 2}, "two devices offline are two devices' troubles"
    assert {(row["owner_system"], row["stage"]) for row in city.rows(cases)} == {("native", "dispatched")}
    city.clears("hydrant_offline", HYDRANTS[0], at=10 * MIN)
    city.raises("hydrant_offline", HYDRANTS[0], at=15 * MIN)
    city.clears("hydrant_offline", HYDRANTS[0], HYDRANTS[1], at=20 * MIN)
    assert {row["stage"] for row in city.rows(cases)} == {"feedback"}
    city.step(51 * MIN)
    assert {row["stage"] for row in city.rows(cases)} == {"closed"}
    assert city.kinds() == {"maintenance": 2}
    assert city.rows(outbox) == []


def test_maintenance_never_joins_what_concerns_the_city(city: City) -> None:
    city.raises("hydrant_tilted", HYDRANTS[0], at=0)
    city.raises("hydrant_offline", HYDRANTS[0], at=MIN)
    assert city.kinds() == {"case": 1, "maintenance": 1}
    assert [row["kind"] for row in city.rows(incidents)] == ["case", "maintenance"]


# --- bad input ----------------------------------------------------------------------------------------------------


def test_bad_transitions_are_counted_and_the_rest_goes_on(city: City) -> None:
    writer = city.writers[0]
    writer.append(Kind.TRANSITION, T0, b"{not json")
    writer.append(Kind.TICK, T0, b"{}")
    strange = msgspec.structs.replace(city.transition("hydrant_tilted", "hyd-000", Edge.RAISE, 0), rule="nobody's")
    again = city.transition("hydrant_tilted", HYDRANTS[0], Edge.RAISE, 0)
    city.put(strange, again, again, city.transition("hydrant_tilted", HYDRANTS[1], Edge.CLEAR, 0))
    city.step(S)
    assert {key: value for key, value in city.desk.counters.values.items() if key.startswith("dropped")} == {
        "dropped_total{reason=malformed_transition}": 2,
        "dropped_total{reason=unknown_rule}": 1,
        "dropped_total{reason=repeated}": 1,
        "dropped_total{reason=no_open_alarm}": 1,
    }
    assert "offset 0" in city.desk.counters.warnings[0]
    assert city.kinds() == {"case": 1}


def test_a_device_nobody_knows_still_gets_its_case_for_a_person_to_place(city: City) -> None:
    city.raises("hydrant_tilted", "hyd-999", at=0)
    case = city.one(cases)
    assert (case["subject"], case["cell"], case["area_owner"]) == ("hyd-999", "", "")
    assert any("hyd-999" in warning for warning in city.desk.counters.warnings)


def test_without_a_registry_the_desk_waits(tmp_path: Path) -> None:
    city = City(tmp_path)
    (city.layout.run / "active.json").unlink()
    city.raises("hydrant_tilted", HYDRANTS[0], at=0)
    assert city.rows(alarms) == []
    city = City(tmp_path)
    city.step(S)
    assert len(city.rows(alarms)) == 1


def test_a_missing_rule_set_stops_the_desk_before_it_drops_an_alarm(city: City) -> None:
    lost = msgspec.structs.replace(city.transition("hydrant_tilted", "hyd-000", Edge.RAISE, 0), ruleset="0" * 64)
    city.put(lost)
    for _ in range(2):
        with pytest.raises(NotFound, match="0000"):
            city.step(S)
    assert city.rows(consumed) == []


def test_a_newer_database_is_refused_clearly(city: City) -> None:
    with city.store.begin() as connection:
        connection.execute(sql("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StorageError, match="schema 9999 is newer than this program's"):
        upgrade(city.store)
    with city.store.begin() as connection:
        connection.execute(sql(f"UPDATE alembic_version SET version_num = '{HEAD}'"))


def test_migrations_make_the_schema_that_the_code_has(city: City) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    assert revision(city.store) == HEAD
    with city.store.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        for table in metadata.tables.values():
            made = {index["name"]: index for index in inspect(connection).get_indexes(table.name)}
            for index in table.indexes:
                found = made[index.name]
                assert bool(found["unique"]) == bool(index.unique)
                partial = {k.rpartition("_")[2] for k, v in found.get("dialect_options", {}).items() if v is not None}
                wanted = index.dialect_options[connection.dialect.name]["where"] is not None
                assert ("where" in partial) == wanted, index.name


def test_readers_cannot_write_and_a_missing_database_is_said(city: City, tmp_path: Path) -> None:
    reader = open_store(city.layout.place, readonly=True)
    with (
        pytest.raises((StorageError, Unavailable), match=r"read-?only"),
        refusals(reader),
        reader.begin() as connection,
    ):
        connection.execute(alarms.delete())
    reader.dispose()
    with pytest.raises(NotFound, match="no database yet"):
        open_store(tmp_path / "nowhere.db", readonly=True)


@pytest.mark.parametrize("database", [""])
def test_a_full_disk_writes_nothing_and_loses_nothing(city: City) -> None:
    city.step(0)
    with city.store.connect() as connection:
        pages = connection.execute(sql("PRAGMA page_count")).scalar_one()
        connection.execute(sql(f"PRAGMA max_page_count = {pages}"))
    city.put(*(city.transition("hydrant_tilted", f"hyd-{n:03d}", Edge.RAISE, n) for n in range(300)))
    with pytest.raises(StorageError, match="full"):
        city.step(S)
    assert city.rows(alarms) == []
    with city.store.connect() as connection:
        connection.execute(sql("PRAGMA max_page_count = 1000000"))
    city.step(S)
    assert len(city.rows(alarms)) == 300


# --- nothing twice, nothing forgotten -----------------------------------------------------------------------------

ON_HYDRANTS = ("hydrant_pressure_low", "hydrant_tilted", "hydrant_offline")
ON_LIFTS = ("elevator_trapped", "elevator_mains_lost", "elevator_door_failure")
RULE_SUBJECTS = [*itertools.product(ON_HYDRANTS, HYDRANTS[:4]), *itertools.product(ON_LIFTS, LIFTS)]
VERDICTS = ["confirmed", "false_alarm", "duplicate"]
LEDGER = ["asset_commission", "asset_activate", "asset_retire", "asset_replace", "register_enter"]
EVENT = st.one_of(
    st.tuples(st.sampled_from(["raise", "clear"]), st.sampled_from(RULE_SUBJECTS)),
    st.tuples(st.sampled_from(["acknowledge", "confirm", "reject"]), st.integers(1, 8)),
    st.tuples(st.just("verdict"), st.tuples(st.integers(1, 5), st.sampled_from(VERDICTS))),
    st.tuples(st.just("restart"), st.none()),
    st.tuples(st.sampled_from(LEDGER), st.sampled_from([*HYDRANTS[:2], *LIFTS[:1]])),
)
HISTORY = st.lists(st.tuples(st.sampled_from([S, 20 * S, 4 * MIN, 31 * MIN]), EVENT), max_size=25)


def play(city: City, history: list[tuple[int, tuple[str, object]]]) -> None:
    at = 0
    for n, (later, (what, about)) in enumerate(history):
        at += later
        match what, about:
            case "raise" | "clear", (str() as rule, str() as subject):
                city.put(city.transition(rule, subject, Edge(what), at))
            case "verdict", (int() as number, verdict):
                cases_there = [row["number"] for row in city.rows(cases) if row["id"] == number]
                body = {"case": cases_there[0] if cases_there else "CB-none", "verdict": verdict}
                city.command(f"c{n:03d}", "verdict", body, "why", at=at)
            case "restart", _:
                city.restart()
            case _, str() as asset:
                window = {"kind": "maintenance", "from_ms": T0 + at, "until_ms": T0 + at + MIN, "ruleset": city.ruleset}
                body = {"asset": asset, "sensor": f"imei-{n}"} if what in LEDGER[:4] else {"subject": asset, **window}
                city.command(f"c{n:03d}", what, body, "why", at=at)
                city.to_ingest()
            case _:
                city.command(f"c{n:03d}", what, {"alarm" if what == "acknowledge" else "incident": about}, "why", at=at)
        city.step(at)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(history=HISTORY)
def test_any_history_keeps_the_invariants_and_its_journal_tells_it_again(
    history: list[tuple[int, tuple[str, object]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    city = City(tmp_path_factory.mktemp("city"))
    play(city, history)
    invariants(city)
    again = open_store(city.layout.root / "again.db")
    desk = city.make_desk(again)
    desk.start()
    assert replay(city.store, desk) == len(city.rows(journal))
    told, retold = everything(city.store), everything(again)
    for name in told:
        assert told[name] == retold[name], name
    again.dispose()
    city.close()


TRANSITIONS = st.lists(
    st.tuples(
        st.sampled_from([0, S, MIN, 40 * MIN]), st.sampled_from(["raise", "clear"]), st.sampled_from(RULE_SUBJECTS)
    ),
    max_size=30,
)

History = list[tuple[int, str, tuple[str, str]]]


def groups_of(root: Path, shards: tuple[int, int], batch: int, history: History) -> Groups:
    """Which alarms belong together, and what each group became, after a desk has read the same logs in some order."""
    city = City(root, DeskConfig(batch=batch))
    at = 0
    for later, edge, (rule, subject) in history:
        at += later
        city.put(city.transition(rule, subject, Edge(edge), at))
    city.desk = Desk(city.store, city.layout, shards, city.desk.categories, city.config)
    city.desk.start()
    city.step(at)  # one moment: what is compared is the order of reading, not the time of it
    orders = city.rows(cases)
    found: Groups = Counter()
    for row in city.rows(incidents):
        members = [alarm for alarm in city.rows(alarms) if alarm["incident"] == row["id"]]
        became = sorted((one["kind"], one["category"]) for one in orders if one["incident"] == row["id"])
        found[frozenset((one["rule"], one["subject"], one["raised_at"]) for one in members), tuple(became)] += 1
    invariants(city)
    city.close()
    return found


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(history=TRANSITIONS, batch=st.sampled_from([1, 3, 500]))
def test_whatever_shard_is_read_first_the_same_alarms_belong_together(
    history: History, batch: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("city")
    first = groups_of(root / "first", (0, 1), 500, history)
    assert groups_of(root / "other", (1, 0), batch, history) == first


REFUSING = {
    "sqlite": ["CREATE TRIGGER stop BEFORE INSERT ON timeline WHEN FULL BEGIN SELECT RAISE(ABORT, 'stopped'); END"],
    "postgresql": [
        "CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ "  # noqa: ISC004
        "BEGIN IF FULL THEN RAISE 'stopped'; END IF; RETURN NEW; END $$",
        "CREATE TRIGGER stop BEFORE INSERT ON timeline FOR EACH ROW EXECUTE FUNCTION refuse()",
    ],
}


def test_an_aborted_transaction_leaves_nothing_and_the_next_does_it_all(city: City, database: str) -> None:
    city.raises("hydrant_tilted", HYDRANTS[0], at=0)
    city.command("a1", "acknowledge", {"alarm": 1}, at=S)
    before = everything(city.store)
    with city.store.begin() as connection:  # the timeline refuses the third line of the next transaction
        full = f"(SELECT count(*) FROM timeline) > {len(before['timeline']) + 2}"
        for statement in REFUSING[connection.dialect.name]:
            connection.exec_driver_sql(statement.replace("FULL", full))
    city.mailbox.put(Command("a2", "acknowledge", "li", T0, {"alarm": 2}))
    city.put(city.transition("hydrant_tilted", HYDRANTS[1], Edge.RAISE, MIN),
             city.transition("elevator_trapped", LIFTS[0], Edge.RAISE, MIN))  # fmt: skip
    for _ in range(2):
        with pytest.raises(StorageError, match="stopped"):
            city.step(MIN)
        assert everything(city.store) == before
    with city.store.begin() as connection:
        connection.exec_driver_sql(f"DROP TRIGGER stop{' ON timeline' if database else ''}")
    assert city.step(MIN) == 3
    assert city.kinds() == {"case": 2, "rescue": 1}
    assert city.step(MIN) == 0
    assert city.mailbox.take() == ([], [])


# --- the process --------------------------------------------------------------------------------------------------


def process(city: City) -> subprocess.Popen[bytes]:
    program = "import sys; from citybrain.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["desk", "--data", str(city.layout.root)]
    return subprocess.Popen([sys.executable, "-c", program, *arguments])


def test_killed_again_and_again_the_process_doubles_and_forgets_nothing(tmp_path: Path) -> None:
    city = City(tmp_path)
    city.layout.write_run(Run(clock=system_clock(), shards=2))
    total, seen = 0, 0
    for round_ in range(3):
        with process(city) as running:
            try:
                for n in range(20):
                    city.put(city.transition("hydrant_tilted", f"hyd-{round_}{n:03d}", Edge.RAISE, n))
                    city.put(city.transition("elevator_trapped", f"lift-{round_}{n:03d}", Edge.RAISE, n))
                total, seen = total + 40, seen + 15
                eventually(lambda least=seen: len(city.rows(alarms)) >= least, 30, "alarms")  # type: ignore[misc]
            finally:
                running.kill()  # somewhere in the middle of its work
    with process(city) as running:
        try:
            eventually(lambda: _open_alarms(city, running.pid) == total, 30, "a heartbeat that knows every alarm")
        finally:
            end(running)
    assert running.returncode == 0
    assert city.kinds() == {"case": total // 2, "rescue": total // 2}
    assert len(city.rows(journal)) == total + 1  # and the registry
    assert len({row["subject"] for row in city.rows(cases)}) == total
    assert [row["n"] for row in city.rows(outbox)] == list(range(1, total + 1))
    invariants(city)
    city.close()


def _open_alarms(city: City, pid: int) -> float:
    beats = [beat for beat in read_heartbeats(city.layout.run) if beat.process == "desk" and beat.pid == pid]
    return beats[0].gauges.get("alarms_open", -1.0) if beats else -1.0
