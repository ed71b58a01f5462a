"""The ledger at the desk: sensors change hands, registers silence rules, ingest is told, nothing is half done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from api.assets.book import ASSET, REGISTER, Shape, registry_of
from api.assets.changes import Changes, encode_changes
from api.assets.store import read_book
from api.desk import replay
from citybrain.db.schema import alarms, asked, assets, cases, incidents, journal, registers, sensors, timeline
from citybrain.db.store import open_store
from citybrain.mailbox import Mailbox
from citybrain.model import Place, Registry
from streams.registry import Index, decode_registry
from tests.desk_city import HYDRANTS, LIFTS, MIN, T0, City, S, everything, invariants, make_registry


@pytest.fixture
def city(tmp_path: Path, database: str) -> Iterator[City]:
    made = City(tmp_path, database=database)
    made.step(0)
    yield made
    invariants(made)
    made.close()


def in_force(city: City) -> Index:
    """The registry in force after ingest has done what it was asked for, and the desk has seen it."""
    city.to_ingest()
    city.step(0)
    active = city.layout.read_active()
    assert active is not None
    return Index(decode_registry(city.layout.get_blob(active.registry)), active.registry)


NEW = {"sensor": "s", "asset": "n", "kind": "hydrant", "place": {"lon": 120.6, "lat": 31.3, "cell": ""}}
PLACED = {"lon": 120.6, "lat": 31.3, "cell": "320508001001000", "address": "新路1号"}


def adopt(city: City, sensor: str, asset: str, **more: Any) -> str:
    body = {
        "sensor": sensor,
        "asset": asset,
        "gateway": "gw-0",
        "kind": "hydrant",
        "place": PLACED,
        "zone": "z1",
        **more,
    }
    return city.command(f"adopt-{sensor}-{asset}", "asset_adopt", body, "found in the street")


# --- assets and sensors -------------------------------------------------------------------------------------------


def test_an_adopted_sensor_is_a_device_under_its_assets_name(city: City) -> None:
    assert adopt(city, "867700000000001", "hyd-100").startswith("applied")
    index = in_force(city)
    device = index.device("hyd-100")
    assert (device.sensor, device.gateway, device.zone) == ("867700000000001", "gw-0", "z1")
    assert index.wire_index["867700000000001"] == index.device_index["hyd-100"]
    assert "water_present" in device.metrics
    assert len(index.devices) == len(make_registry().devices) + 1
    city.raises("hydrant_tilted", "hyd-100", at=MIN)
    assert city.one(cases)["address"] == "新路1号"


def test_a_replaced_sensor_leaves_the_history_with_its_asset(city: City) -> None:
    assert city.command("r1", "asset_replace", {"asset": HYDRANTS[0], "sensor": "imei-2"}, "broken").startswith(
        "applied"
    )
    before = {device.id: device for device in make_registry().devices}[HYDRANTS[0]]
    assert in_force(city).device(HYDRANTS[0]) == msgspec.structs.replace(before, sensor="imei-2")
    rows = [row for row in city.rows(sensors) if row["asset"] == HYDRANTS[0]]
    assert [(row["sensor"], row["removed_at"], row["reason"]) for row in rows] == [
        (HYDRANTS[0], T0, "broken"), ("imei-2", None, "broken")]  # fmt: skip
    told = [row for row in city.rows(timeline) if row["entity"] == "asset"]
    assert [(row["event"], row["reason"], row["actor"]) for row in told] == [("replace", "another_sensor", "wang")]


def test_a_retired_asset_leaves_the_registry_and_stays_in_the_ledger(city: City) -> None:
    assert city.command("x", "asset_retire", {"asset": HYDRANTS[7]}, "road works").startswith("applied")
    assert HYDRANTS[7] not in in_force(city).device_index
    row = next(row for row in city.rows(assets) if row["code"] == HYDRANTS[7])
    assert (row["state"], row["until"], row["sensor"]) == ("retired", T0, "")
    assert "no step" in city.command("y", "asset_retire", {"asset": HYDRANTS[7]})


def test_an_elevator_with_somebody_trapped_is_not_retired(city: City) -> None:
    city.raises("elevator_trapped", LIFTS[0], at=0)
    assert "life-safety alarm" in city.command("x", "asset_retire", {"asset": LIFTS[0]}, at=MIN)
    city.clears("elevator_trapped", LIFTS[0], at=2 * MIN)
    assert city.command("y", "asset_retire", {"asset": LIFTS[0]}, at=3 * MIN).startswith("applied")


@pytest.mark.parametrize(
    ("kind", "body", "what"),
    [
        ("asset_adopt", {"sensor": "s", "asset": "new"}, "needs --kind"),
        ("asset_adopt", {"sensor": "s", "asset": HYDRANTS[0]}, "devices replace"),
        ("asset_adopt", {**NEW, "sensor": HYDRANTS[1], "gateway": "gw-0"}, "is already on asset hyd-001"),
        ("asset_adopt", {**NEW, "gateway": "gw-9"}, "there are gw-0, gw-1"),
        ("asset_adopt", {**NEW, "kind": "toaster", "gateway": "gw-0"}, "toaster"),
        ("asset_adopt", {**NEW, "gateway": "gw-1", "zone": "z1"}, "z1"),
        ("asset_adopt", {**NEW, "maintainer": "nobody", "gateway": "gw-0"}, "nobody"),
        ("asset_adopt", {"sensor": "s"}, "asset"),
        ("asset_replace", {"asset": "nobody", "sensor": "s"}, "not in the ledger"),
        ("asset_replace", {"asset": HYDRANTS[0], "sensor": HYDRANTS[1]}, HYDRANTS[1]),
        ("asset_replace", {"asset": HYDRANTS[0], "sensor": HYDRANTS[0]}, "already"),
        ("asset_activate", {"asset": HYDRANTS[0]}, "no step 'activate' from 'active'"),
        ("ledger_import", {"content": "0" * 64}, "no such content"),
    ],
)  # fmt: skip
def test_a_wish_that_makes_no_sense_is_refused_whole(city: City, kind: str, body: dict[str, Any], what: str) -> None:
    said = city.command("bad", kind, body, "why")
    assert said.startswith("refused")
    assert what in said
    assert [city.rows(table) for table in (assets, sensors, asked)] == [[], [], []]
    assert city.to_ingest() == []


# --- change sets --------------------------------------------------------------------------------------------------


def send(city: City, id: str, changes: Changes) -> str:
    content = city.layout.put_blob(encode_changes(changes))
    return city.command(id, "ledger_import", {"content": content}, "the survey of May")


def test_two_clerks_cannot_half_undo_each_other(city: City) -> None:
    book = read_book_of(city)
    one, other = (msgspec.structs.replace(book.assets[code], name="north gate") for code in (HYDRANTS[0], HYDRANTS[1]))
    assert send(city, "one", Changes(book.version, (one,))).startswith("applied")
    said = send(city, "two", Changes(book.version, (other,)))
    assert said.startswith("refused")
    assert "version 1" in said
    names = {row["code"]: row["name"] for row in city.rows(assets)}
    assert (names[HYDRANTS[0]], names[HYDRANTS[1]]) == ("north gate", "")


def test_the_first_change_takes_over_the_registry_and_changes_nothing_else(city: City) -> None:
    book = read_book_of(city)
    assert send(city, "one", Changes(0)).startswith("applied")
    after = in_force(city).registry
    plain = make_registry()
    assert sorted(after.devices, key=lambda d: d.id) == sorted(plain.devices, key=lambda d: d.id)
    assert registry_of(read_book_of(city)) == registry_of(msgspec.structs.replace(book, version=1))


def read_book_of(city: City) -> Any:
    with city.store.connect() as connection:
        return read_book(connection, make_registry, T0)


def test_a_gateway_keeps_its_shard_and_a_zone_stays_in_one(city: City) -> None:
    gateway = make_registry().gateways[0]
    assert "shard" in send(city, "a", Changes(0, gateways=(msgspec.structs.replace(gateway, shard=1),)))
    assert "shard 7" in send(city, "b", Changes(0, gateways=(msgspec.structs.replace(gateway, id="gw-7", shard=7),)))
    assert city.rows(assets) == []


def test_the_journal_tells_all_of_it_again(city: City) -> None:
    adopt(city, "imei-1", "hyd-100")
    book = read_book_of(city)
    asset = msgspec.structs.replace(book.assets[HYDRANTS[1]], name="north gate", state="commissioning")
    send(city, "one", Changes(book.version, (asset,), shapes=(Shape("zone", "z1", "{}"),)))
    in_force(city)
    city.raises("hydrant_tilted", HYDRANTS[1], "hyd-100", at=MIN)
    enter(city, "u1", "zone:z1")
    city.command("c1", "register_cancel", {"register": 1}, "done", at=2 * MIN)
    city.command("a1", "asset_activate", {"asset": HYDRANTS[1]}, "fine", at=3 * MIN)
    in_force(city)
    assert city.kinds() == {"case": 2}
    again = open_store(city.layout.root / "again.db")
    desk = city.make_desk(again)
    desk.start()
    assert replay(city.store, desk) == len(city.rows(journal))
    assert everything(again) == everything(city.store)
    again.dispose()


# --- asking ingest ------------------------------------------------------------------------------------------------


def test_a_change_reaches_ingest_also_when_the_desk_dies_in_between(city: City) -> None:
    adopt(city, "imei-1", "hyd-100")
    first = Mailbox(city.layout.mailbox("ingest")).take()[0]
    assert [command.id for _, command in first] == ["ledger-000000001"]
    with city.store.begin() as connection:  # it had put it there, and died before it could say so
        connection.execute(asked.update().values(done=0))
    city.restart()
    city.step(S)
    assert Mailbox(city.layout.mailbox("ingest")).take()[0] == first
    for name, _ in first:
        Mailbox(city.layout.mailbox("ingest")).done(name)
    city.restart()
    city.step(2 * S)
    assert Mailbox(city.layout.mailbox("ingest")).take()[0] == []
    assert [row["done"] for row in city.rows(asked)] == [1]


def test_without_any_registry_the_ledger_can_still_begin(tmp_path: Path) -> None:
    city = City(tmp_path)
    (city.layout.run / "active.json").unlink()
    registry = make_registry()
    everything = Changes(0, gateways=registry.gateways, units=registry.units, cells=registry.cells)
    assert send(city, "first", everything).startswith("applied")
    assert [control.what for control in city.to_ingest()] == ["registry"]
    city.close()


# --- commissioning ------------------------------------------------------------------------------------------------


def commission(city: City, asset: str) -> None:
    assert city.command(f"c-{asset}", "asset_commission", {"asset": asset}, "new board").startswith("applied")
    in_force(city)


def test_on_trial_alarms_show_and_nothing_is_ordered(city: City) -> None:
    for asset in (HYDRANTS[0], LIFTS[0]):
        commission(city, asset)
    city.raises("hydrant_tilted", HYDRANTS[0], at=MIN)
    city.raises("elevator_trapped", LIFTS[0], at=MIN)
    assert {(row["subject"], row["why"], row["active"]) for row in city.rows(alarms)} == {
        (HYDRANTS[0], "on_trial", 1), (LIFTS[0], "on_trial", 1)}  # fmt: skip
    city.clears("elevator_trapped", LIFTS[0], at=2 * MIN)
    city.step(60 * MIN)
    assert (city.rows(cases), city.rows(incidents), city.told()) == ([], [], [])
    assert {row["state"] for row in city.rows(alarms)} == {"unack", "closed"}


def test_what_still_holds_when_the_trial_is_passed_becomes_what_it_is(city: City) -> None:
    commission(city, LIFTS[0])
    city.raises("elevator_trapped", LIFTS[0], at=MIN)
    city.raises("elevator_mains_lost", LIFTS[0], at=MIN)
    assert city.command("a", "asset_activate", {"asset": LIFTS[0]}, "accepted", at=2 * MIN).startswith("applied")
    assert city.rows(cases) == []
    in_force(city)
    assert city.kinds() == {"rescue": 1}
    assert all(row["incident"] for row in city.rows(alarms))


def test_others_in_the_zone_do_not_count_a_device_on_trial(city: City) -> None:
    commission(city, HYDRANTS[0])
    city.raises("hydrant_pressure_low", *HYDRANTS[:3], at=MIN)
    assert [row["subject"] for row in city.rows(alarms) if row["incident"]] == list(HYDRANTS[1:3])


# --- registers ----------------------------------------------------------------------------------------------------


def enter(city: City, id: str, subject: str, kind: str = "use", **more: Any) -> str:
    body = {"kind": kind, "subject": subject, "from_ms": T0, "until_ms": T0 + 60 * MIN, "ruleset": city.ruleset, **more}
    return city.command(id, "register_enter", body, "fire drill")


def test_an_authorised_use_is_an_override_of_its_rule(city: City) -> None:
    for n, subject in enumerate((HYDRANTS[0], "zone:z1", "grid:grid-1", "street:001", "building:a")):
        assert enter(city, f"u{n}", subject).startswith("applied"), subject
    told = city.to_ingest()
    assert [(one.what, one.subject, one.rule) for one in told] == [
        ("override", subject, "hydrant_illegal_use")
        for subject in (HYDRANTS[0], "zone:z1", "grid:grid-1", "street:001", "building:a")]  # fmt: skip
    assert {(one.from_ms, one.until_ms, one.actor, one.reason) for one in told} == {
        (T0, T0 + 60 * MIN, "wang", "fire drill")}  # fmt: skip


def test_maintenance_leaves_life_safety_alone_unless_said_so(city: City) -> None:
    assert enter(city, "m1", LIFTS[0], "maintenance").startswith("applied")
    rules = {one.rule for one in city.to_ingest()}
    assert "elevator_door_failure" in rules
    assert not {rule for rule in rules if "trapped" in rule or rule.startswith("hydrant") or rule == "*"}
    assert enter(city, "m2", LIFTS[0], "maintenance", also_life=True).startswith("applied")
    assert [one.rule for one in city.to_ingest()] == ["*"]


def test_two_entries_of_one_beginning_would_end_together(city: City) -> None:
    enter(city, "u1", HYDRANTS[0])
    assert "register 1 begins at the same time" in enter(city, "u2", HYDRANTS[0])
    assert enter(city, "u3", HYDRANTS[0], from_ms=T0 + 1).startswith("applied")
    city.command("c1", "register_cancel", {"register": 1}, "done")
    assert enter(city, "u4", HYDRANTS[0]).startswith("applied")


def test_a_cancelled_entry_ends_now_or_never_was(city: City) -> None:
    enter(city, "now", HYDRANTS[0])
    enter(city, "later", HYDRANTS[1], from_ms=T0 + 30 * MIN)
    city.to_ingest()
    assert city.command("c1", "register_cancel", {"register": 1}, "done early", at=10 * MIN).startswith("applied")
    assert city.command("c2", "register_cancel", {"register": 2}, "not at all", at=10 * MIN).startswith("applied")
    assert [(one.subject, one.from_ms, one.until_ms) for one in city.to_ingest()] == [
        (HYDRANTS[0], T0, T0 + 10 * MIN), (HYDRANTS[1], T0 + 30 * MIN, T0 + 30 * MIN)]  # fmt: skip
    assert [row["state"] for row in city.rows(registers)] == ["cancelled", "cancelled"]
    assert "no step" in city.command("c3", "register_cancel", {"register": 2}, "again", at=10 * MIN)


@pytest.mark.parametrize(
    ("subject", "more", "what"),
    [
        ("nobody", {}, "not in the ledger"),
        ("zone:z9", {}, "z9"),
        ("town:x", {}, "grid:CODE"),
        (LIFTS[0], {}, "hydrant"),
        (HYDRANTS[0], {"until_ms": T0}, "after the beginning"),
        (HYDRANTS[0], {"from_ms": 1, "until_ms": 2}, "long past"),
        (LIFTS[0], {"kind": "maintenance", "ruleset": ""}, "rule set"),
    ],
)
def test_an_entry_that_makes_no_sense_is_refused(city: City, subject: str, more: dict[str, Any], what: str) -> None:
    said = enter(city, "bad", subject, **more)
    assert said.startswith("refused")
    assert what in said
    assert city.rows(registers) == []
    assert city.to_ingest() == []


# --- the page -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", [ASSET, REGISTER], ids=lambda machine: machine.name)
def test_the_page_holds_the_life_cycles(machine: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "ledger.md").read_text(encoding="utf-8")
    assert f"<!-- table {machine.name} -->\n{machine.table()}\n<!-- end -->" in page


def test_an_empty_registry_is_an_empty_ledger() -> None:
    assert registry_of(msgspec.structs.replace(read_empty(), version=1)) == Registry((), ())


def read_empty() -> Any:
    from api.assets.book import Book

    return Book(gateways={}, assets={"x": make_asset()})


def make_asset() -> Any:
    from api.assets.book import Asset

    return Asset("x", "hydrant", "planned", Place(120.0, 31.0, ""))


# --- beside the rest ----------------------------------------------------------------------------------------------


def test_a_later_start_of_the_simulation_does_not_undo_what_was_entered(city: City) -> None:
    from simulators.district import build
    from simulators.simulate import provision

    district = build(7)
    assert provision(city.layout, district, T0)["changed"] == ["registry"]
    assert send(city, "one", Changes(0)).startswith("applied")
    assert provision(city.layout, district, T0)["changed"] == []


def test_an_older_database_keeps_its_rows(tmp_path: Path) -> None:
    """One of revision 0001, with a case and what belongs to it, is brought up to this version's schema."""
    from alembic import command
    from alembic.config import Config

    from citybrain.db import migrations
    from citybrain.db.store import open_store, writing

    store = open_store(tmp_path / "old.db")
    config = Config()
    config.set_main_option("script_location", str(migrations.FOLDER))
    with writing(store) as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    with store.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO incidents (id, state, open, cause, by, key, urgency, opened_at, last_at) "
            "VALUES (1, 'confirmed', 1, 'c', 'device', 'd', 'urgent', 1, 1)"
        )
        connection.exec_driver_sql(
            "INSERT INTO alarms (id, rule, ruleset, subject, state, open, active, urgency, raised_at, received_at, "
            "opened_at, last_at, count, shard, source, evidence, incident) "
            "VALUES (1, 'r', 's', 'd', 'unack', 1, 1, 'urgent', 1, 1, 1, 1, 1, 0, 0, '{}', 1)"
        )
        texts = "number kind subject category edition code title_zh title_en urgency cell grid street address unit"
        names = [*texts.split(), "area_owner", "stage", "owner_system", "evidence"]
        connection.exec_driver_sql(
            f"INSERT INTO cases (id, incident, alarm, lon, lat, observed_at, opened_at, deadline, {', '.join(names)}) "
            f"VALUES (1, 1, 1, 0, 0, 1, 1, 1, {', '.join(repr(name) for name in names)})"
        )
    assert migrations.upgrade(store) == "0001"
    with store.connect() as connection:
        row = connection.exec_driver_sql("SELECT number, workstation, road_chief FROM cases").one()
    assert tuple(row) == ("number", "", "")
    store.dispose()
