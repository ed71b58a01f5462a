"""Maintenance orders: what the contractor does, what only the device says, and the list for a round trip."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.cases.cases import CASE, FINISHED, WITH_CONTRACTOR
from api.cases.places import Atlas
from citybrain.clock import DAY_MS
from citybrain.db.schema import alarms, cases, incidents, timeline
from citybrain.model import Device, Registry, Unit
from tests.desk_city import HYDRANTS, MIN, City, everything, make_registry
from tests.seeded_site import Seeded, process, seeded

H0, H1 = HYDRANTS[:2]
HELD = 11 * MIN  # battery_low is held for 10 min before it becomes an order
QUIET = 31 * MIN


def flat(city: City, subject: str = H0, at: int = 0) -> str:
    """A battery goes flat; return the number of the order that makes."""
    city.raises("hydrant_battery_low", subject, at=at, value=3.0)
    city.step(at + HELD)
    return str(next(row["number"] for row in city.rows(cases) if row["subject"] == subject and not row["closed_at"]))


def stage(city: City, number: str) -> str:
    return str(next(row["stage"] for row in city.rows(cases) if row["number"] == number))


def ask(city: City, kind: str, number: str, reason: str = "", at: int = HELD, **body: Any) -> str:
    return city.command(f"{kind}-{at}-{number}", kind, {"case": number, **body}, reason, at)


def told(city: City, event: str) -> dict[str, Any]:
    row = next(row for row in city.rows(timeline) if row["entity"] == "case" and row["event"] == event)
    return {**row, "details": json.loads(row["details"])}


# --- the contractor and the device ------------------------------------------------------------------------------


def test_taken_done_and_closed_once_the_device_is_well(city: City) -> None:
    number = flat(city)
    assert stage(city, number) == "dispatched"
    assert ask(city, "take", number) == f"applied: case {number}: taken"
    assert ask(city, "done", number, work="battery replaced") == (
        f"applied: case {number}: done; it closes when its device is well"
    )
    assert stage(city, number) == "handled"
    city.clears("hydrant_battery_low", H0, at=HELD + MIN)
    assert stage(city, number) == "feedback"
    city.step(HELD + MIN + QUIET)
    assert stage(city, number) == "closed"
    assert told(city, "take")["actor"] == "wang"
    assert told(city, "done")["details"] == {"work": "battery replaced"}
    assert not city.told()  # nothing of it ever goes to the grid platform


def test_it_closes_by_itself_when_nobody_says_a_word(city: City) -> None:
    number = flat(city)
    city.clears("hydrant_battery_low", H0, at=HELD)
    city.step(HELD + QUIET)
    assert stage(city, number) == "closed"


def test_done_at_a_device_that_is_well_closes_at_once(city: City) -> None:
    number = flat(city)
    city.clears("hydrant_battery_low", H0, at=HELD)
    assert "its device is well: closed" in ask(city, "done", number, work="contact cleaned", at=HELD + MIN)
    assert city.one(incidents)["open"] == 0
    assert city.one(alarms)["open"] == 0


def test_done_is_not_well(city: City) -> None:
    """What a contractor says does not end what the device says; one that comes back soon is the same order."""
    number = flat(city)
    ask(city, "done", number, work="battery replaced")
    city.step(HELD + 10 * QUIET)
    assert stage(city, number) == "handled"
    city.clears("hydrant_battery_low", H0, at=DAY_MS)
    city.raises("hydrant_battery_low", H0, at=DAY_MS + MIN)
    assert stage(city, number) == "dispatched"
    assert city.kinds() == {"maintenance": 1}


def test_not_needed_makes_no_second_order_until_the_device_was_well(city: City) -> None:
    number = flat(city)
    assert ask(city, "not_needed", number).startswith("refused: case")
    assert ask(city, "not_needed", number, "hydrant is removed tomorrow", at=HELD + 1).startswith("applied")
    assert stage(city, number) == "void"
    city.raises("hydrant_battery_low", H0, at=HELD + MIN)
    city.step(HELD + 10 * QUIET)
    assert city.kinds() == {"maintenance": 1}
    assert city.one(cases)["verdict_reason"] == "hydrant is removed tomorrow"
    city.clears("hydrant_battery_low", H0, at=DAY_MS)
    city.step(DAY_MS + QUIET)
    assert flat(city, at=2 * DAY_MS) != number


def test_given_to_another_its_clock_runs_on(city: City) -> None:
    number = flat(city)
    before = city.one(cases)
    assert ask(city, "take", number).startswith("applied")
    assert ask(city, "reassign", number, unit="water").endswith("needs a reason")
    assert "not in the registry" in ask(city, "reassign", number, "theirs", at=HELD + 1, unit="nobody")
    assert (
        ask(city, "reassign", number, "theirs", at=HELD + 2, unit="water") == f"applied: case {number}: given to water"
    )
    after = city.one(cases)
    assert (after["unit"], after["stage"], after["deadline"]) == ("water", "dispatched", before["deadline"])
    assert told(city, "reassign")["details"] == {"unit": ["sensor-ops", "water"], "why": "theirs"}
    assert "has it already" in ask(city, "reassign", number, "again", at=HELD + 3, unit="water")


def test_what_is_refused_says_why_and_changes_nothing(city: City) -> None:
    number = flat(city)
    assert "no such case" in ask(city, "take", "CB-nothing")
    assert ask(city, "done", number, work="  ", at=HELD + 1) == f"refused: case {number}: say what was done"
    assert "body of 'done'" in ask(city, "done", number, at=HELD + 2)
    ask(city, "take", number, at=HELD + 3)
    assert "no step 'take' from 'taken'" in ask(city, "take", number, at=HELD + 4)
    assert stage(city, number) == "taken"
    city.raises("hydrant_tilted", H1, at=DAY_MS)
    other = next(row["number"] for row in city.rows(cases) if row["kind"] == "case")
    assert "it is a case, and belongs to external" in ask(city, "take", other, at=DAY_MS)
    assert "the platform does not move it" in ask(city, "progress", number, at=DAY_MS, stage="closed")
    assert stage(city, number) == "taken"


def test_a_replay_of_the_journal_gives_the_same_orders(city: City, tmp_path: Path) -> None:
    from api.desk import replay
    from citybrain.db.store import open_store

    number = flat(city)
    ask(city, "take", number)
    ask(city, "done", number, work="battery replaced", at=HELD + 1)
    city.clears("hydrant_battery_low", H0, at=HELD + MIN)
    store = open_store(tmp_path / "again.db")
    desk = city.make_desk(store)
    desk.start()
    replay(city.store, desk)
    assert everything(store)["cases"] == everything(city.store)["cases"]
    assert everything(store)["timeline"] == everything(city.store)["timeline"]
    store.dispose()


def test_the_contractor_is_the_assets_own_where_that_is_its_work() -> None:
    place = make_registry().devices[0].place
    devices = tuple(
        Device(id, "elevator", "gw-0", place, (), maintainer=maintainer)
        for id, maintainer in (("own", "firm-a"), ("other_work", "firm-b"), ("none", ""))
    )
    units = (
        Unit("firm-a", "甲", "A", department="sensor-ops"),
        Unit("firm-b", "乙", "B", department="lift-maintenance"),
    )
    atlas = Atlas(Registry((), devices, units=units))
    assert [atlas.handler("sensor-ops", id) for id in ("own", "other_work", "none")] == [
        "firm-a",
        "sensor-ops",
        "sensor-ops",
    ]


EVENTS = ("take", "done", "not_needed", "reassign", "recovered", "came_back", "quiet")


@given(st.lists(st.sampled_from(EVENTS), max_size=12))
@settings(max_examples=200)
def test_whatever_happens_an_order_stays_with_its_contractor_or_ends(events: list[str]) -> None:
    at = "dispatched"
    for event in events:
        moved = CASE.find(at, event, "native")
        at = moved.after if moved is not None else at
        assert at in (*WITH_CONTRACTOR, *FINISHED)
        assert CASE.find(at, event, "external") is None or event in CASE.states
    if at not in FINISHED:
        assert CASE.find(at, "not_needed", "native") is not None
        assert any(CASE.find(at, event, "native") for event in ("recovered", "quiet"))


# --- the list, over HTTP and on the command line ----------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seeded]:
    made = seeded(tmp_path_factory.mktemp("site"))
    made.seed_night()
    gateways = sorted({device.gateway for device in made.district.registry.devices if device.kind == "hydrant"})
    near, far = ([d.id for d in made.district.registry.devices if d.gateway == g][:3] for g in gateways[:2])
    order = {"category": "battery", "title_zh": "设备电池电量低", "title_en": "Device battery low", "edition": "",
             "code": "", "unit": "sensor-ops", "urgency": "watch", "owner_system": "native"}  # fmt: skip
    now = made.now_ms
    for id, subject in enumerate((far[0], near[0], far[1], near[1]), 10):
        at = {"observed_at": now - 3 * DAY_MS, "opened_at": now - 3 * DAY_MS}
        deadline = now + (id - 11) * DAY_MS + 3_600_000  # 10 is overdue by 23 h, 11 due in an hour, 12 in 25 h …
        made.rows(incidents, made.incident(id, "device_care", "device", subject, kind="maintenance", urgency="watch"))
        made.rows(alarms, made.alarm(id, "hydrant_battery_low", subject, incident=id, why="first", urgency="watch"))
        made.rows(cases, made.case(id, "maintenance", id, id, subject, **order, **at, deadline=deadline))
    made.rows(cases, made.case(20, "maintenance", 3, 7, near[2], **{**order, "unit": "camera-ops"}, stage="closed",
                               closed_at=now, number="CB-closed"))  # fmt: skip
    made.beat()
    with process(made.layout, "api", ready=made.url + "/healthz"), process_desk(made):
        yield made


def process_desk(made: Seeded) -> Any:
    return process(made.layout, "desk", ready=made.url + "/healthz")


def listed(site: Seeded, **asked: str) -> dict[str, Any]:
    answer = httpx.get(f"{site.url}/v1/maintenance", params=asked, trust_env=False)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def numbers(found: dict[str, Any]) -> list[list[int]]:
    """The last digits of the orders' numbers, by round."""
    return [
        [int(order["number"][-6:]) for order in round_["orders"]]
        for contractor in found["contractors"]
        for round_ in contractor["rounds"]
    ]


def test_the_list_is_grouped_for_a_round_trip(site: Seeded) -> None:
    found = listed(site)
    (contractor,) = found["contractors"]
    assert contractor["unit"]["code"] == "sensor-ops"
    assert (contractor["orders"], contractor["overdue"], found["total"]) == (5, 1, 5)
    assert numbers(found)[0] == [10, 12]  # the overdue one leads, and what stands beside it comes along
    assert contractor["rounds"][0]["overdue"] == 1
    assert sorted(number for round_ in numbers(found) for number in round_) == [4, 10, 11, 12, 13]
    for round_ in contractor["rounds"]:
        assert {order["gateway"] for order in round_["orders"]} == {round_["gateway"]}
        assert {order["place"]["street"] for order in round_["orders"]} == {round_["street"]}


def test_the_list_can_be_narrowed(site: Seeded) -> None:
    assert numbers(listed(site, due="overdue")) == [[10]]
    assert sorted(n for round_ in numbers(listed(site, due="day")) for n in round_) == [10, 11]
    assert listed(site, contractor="camera-ops")["contractors"] == []
    closed = listed(site, contractor="camera-ops", state="closed")["contractors"]
    assert [order["number"] for order in closed[0]["rounds"][0]["orders"]] == ["CB-closed"]
    few = listed(site, limit="2")
    assert (few["total"], few["left_off"], numbers(few)) == (5, 3, [[10], [11]])
    assert httpx.get(f"{site.url}/v1/maintenance?due=tomorrow", trust_env=False).status_code == 422


def test_status_counts_what_is_overdue(site: Seeded) -> None:
    status = httpx.get(f"{site.url}/v1/status", trust_env=False).json()
    assert (status["maintenance"], status["maintenance_open"], status["maintenance_overdue"]) == (6, 5, 1)


def run(site: Seeded, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "citybrain", "maintenance", *words, "--data", str(site.layout.root)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("LANG", "LC_"))}
    return subprocess.run(argv, capture_output=True, text=True, env={**clean, **environment}, check=False, timeout=30)


def test_the_command_line_lists_in_both_languages(site: Seeded) -> None:
    en = run(site, "list").stdout
    assert "orders: 5, overdue: 1" in en
    assert any(line.startswith("    ! ") and "23 h overdue" in line for line in en.splitlines())
    zh = run(site, "list", LANG="zh_CN.UTF-8", PYTHONUTF8="1").stdout
    assert "超时 23 小时" in zh
    found = json.loads(run(site, "list", "--json", "--due", "overdue").stdout)
    assert found["total"] == 1


def test_an_order_is_taken_and_done_from_the_command_line(site: Seeded) -> None:
    number = "CB20261124-000013"
    taken = run(site, "take", number, "--actor", "李工", "--json")
    assert taken.returncode == 0, taken.stderr
    assert json.loads(taken.stdout)["state"] == "applied"
    again = run(site, "take", number, "--actor", "李工")
    assert again.returncode == 1
    assert "no step 'take' from 'taken'" in again.stderr
    assert run(site, "done", number, "--actor", "李工", "--work", "换电池").returncode == 0
    detail = httpx.get(f"{site.url}/v1/cases/{number}", trust_env=False).json()
    assert detail["stage"] == "handled"
    assert [(step["event"], step["actor"]) for step in detail["timeline"]] == [("take", "李工"), ("done", "李工")]
    assert detail["timeline"][1]["details"] == {"work": "换电池"}


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        (["take", "CB20261124-000010"], 2, "--actor is missing"),
        (["take", "--actor", "li"], 2, "NUMBER is missing"),
        (["done", "CB20261124-000010", "--actor", "li"], 2, "--work is missing"),
        (["not-needed", "CB20261124-000010", "--actor", "li"], 2, "--reason is missing"),
        (["take", "CB-none", "--actor", "li"], 1, "there is no case CB-none"),
        (["take", "CB20261124-000001", "--actor", "li"], 1, "it is a case, which its grid platform moves"),
        (["take", "CB-closed", "--actor", "li"], 1, "nothing is left to do"),
        (["reassign", "CB20261124-000010", "--actor", "li", "--reason", "x", "--unit", "no"], 1, "there is no unit no"),
    ],
)
def test_what_cannot_be_done_is_said(site: Seeded, words: list[str], code: int, error: str) -> None:
    done = run(site, *words)
    assert (done.returncode, done.stdout) == (code, "")
    assert error in done.stderr


def test_a_run_that_is_not_live_is_named(tmp_path: Path) -> None:
    made = seeded(tmp_path)
    done = run(made, "list")
    assert done.returncode == 4
    assert "citybrain run" in done.stderr


def test_rest_needs_a_name_and_a_reason(site: Seeded) -> None:
    url = f"{site.url}/v1/maintenance/CB20261124-000011"
    assert httpx.post(f"{url}/take", json={}, trust_env=False).json()["error"] == "no_actor"
    assert httpx.post(f"{url}/not-needed", json={"actor": "li"}, trust_env=False).status_code == 422
    assert httpx.post(f"{url}/done", json={"actor": "li"}, trust_env=False).status_code == 422
    accepted = httpx.post(f"{url}/not-needed", json={"actor": "li", "reason": "gone"}, trust_env=False)
    assert accepted.status_code == 202
