"""The API as a real process on a seeded data folder: what it answers, what it stores, how it starts and stops."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest

from api.readings import Latest, Value
from citybrain.counters import Counters
from citybrain.mailbox import Command, Mailbox
from citybrain.model import Registry
from streams.log import Control
from streams.registry import Index, encode_registry
from tests.conftest import eventually
from tests.seeded_site import SHARDS, Seeded, process, seeded, stops_within


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, shared_database: str) -> Iterator[Seeded]:
    made = seeded(tmp_path_factory.mktemp("site"), shared_database)
    made.seed_night()
    made.frame([("hyd-000001", "pressure_mpa", made.now_ms, 0.31), ("gw-01", "uptime_s", made.now_ms, 12.0)])
    made.beat()
    with process(made.layout, "api", ready=made.url + "/healthz"):
        yield made


@pytest.fixture
def api(site: Seeded) -> Iterator[httpx.Client]:
    site.beat()
    with httpx.Client(base_url=site.url, trust_env=False, timeout=5) as client:
        yield client


def refusal(answer: httpx.Response, status: int, error: str) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == status
    assert body["error"] == error
    assert body["where"]
    assert body["what"] == body["detail"] != ""
    return str(body["what"])


# --- health -----------------------------------------------------------------------------------------------------


def test_status_counts_what_is_there(api: httpx.Client) -> None:
    eventually(lambda: api.get("/v1/status").json()["gateways"]["total"] == 5)
    status = api.get("/v1/status").json()
    assert status["live"] is True
    assert status["missing"] == []
    expected: dict[str, float] = {
        "readings": 4200,
        "alarms_open": 6,
        "incidents_open": 4,
        "cases": 5,
        "rescues": 2,
        "rescues_open": 2,
    }
    expected |= {"maintenance": 1, "cases_open": 4, "closed": 1, "delivered": 1, "undelivered": 1, "lag_s": 0.25}
    assert {key: status[key] for key in expected} == expected
    assert status["dropped"]["unknown_gateway"] == 3
    assert status["dropped"]["late"] == 2
    eventually(lambda: api.get("/v1/status").json()["gateways"]["online"] == 1)
    assert "gw-02" in api.get("/v1/status").json()["gateways"]["offline"]


def test_healthz_says_which_process_is_missing(api: httpx.Client, site: Seeded) -> None:
    assert api.get("/healthz").status_code == 200
    desk = site.layout.run / "desk.heartbeat.json"
    desk.unlink()
    answer = api.get("/healthz")
    assert answer.status_code == 503
    assert answer.json()["missing"] == ["desk has not started"]


@pytest.mark.parametrize("connected", [0.0, None])
def test_ingest_without_its_broker_is_not_ready(api: httpx.Client, site: Seeded, connected: float | None) -> None:
    counters = Counters("ingest", site.layout.run)
    if connected is not None:
        counters.gauges["connected"] = connected
    counters.publish(force=True)
    answer = api.get("/healthz")
    assert answer.status_code == 503
    assert "not connected to the broker" in answer.json()["missing"][0]


@pytest.mark.parametrize("name", ["worker", "desk"])
def test_a_process_that_has_only_started_is_not_ready(api: httpx.Client, site: Seeded, name: str) -> None:
    Counters(name, site.layout.run).publish(force=True)
    answer = api.get("/healthz")
    assert answer.status_code == 503
    assert answer.json()["missing"] == [f"{name} is not ready (starting)"]


def test_metrics_are_prometheus_text_by_component(api: httpx.Client) -> None:
    text = api.get("/metrics").text
    assert 'citybrain_dropped_total{component="ingest",reason="unknown_gateway"} 3.0' in text
    assert 'citybrain_received_total{component="worker"} 70.0' in text
    assert 'citybrain_rows{what="cases"} 5.0' in text
    assert 'citybrain_up{component="desk"} 1.0' in text
    assert 'citybrain_lag_s{component="worker"} 0.25' in text
    assert re.search(r"^citybrain_health [012]\.0$", text, re.MULTILINE)
    assert all(re.match(r"#|[a-z_]+(\{.*\})? [0-9.e+-]+$", line) for line in text.splitlines())


# --- reading ----------------------------------------------------------------------------------------------------


def test_devices_have_latest_values_and_pages_are_complete(api: httpx.Client, site: Seeded) -> None:
    eventually(lambda: api.get("/v1/devices/hyd-000001").json().get("values"))
    device = api.get("/v1/devices/hyd-000001").json()
    assert device["values"]["pressure_mpa"] == {
        "value": 0.31, "unit": "MPa", "at": site.now_ms, "name": {"zh": "水压", "en": "pressure"},
    }  # fmt: skip
    seen: list[str] = []
    cursor: str | None = None
    while True:
        asked: dict[str, str | int] = {"kind": "hydrant", "zone": "zone-01", "limit": 7}
        page = api.get("/v1/devices", params=asked | ({"cursor": cursor} if cursor else {})).json()
        seen += [item["id"] for item in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == sorted(site.district.zones["zone-01"])


def test_gateways_say_when_they_were_heard(api: httpx.Client, site: Seeded) -> None:
    eventually(lambda: any(gateway["online"] for gateway in api.get("/v1/gateways").json()))
    gateways = {gateway["id"]: gateway for gateway in api.get("/v1/gateways").json()}
    assert gateways["gw-01"]["received_at"] == site.now_ms
    assert gateways["gw-05"]["received_at"] is None
    assert gateways["gw-05"]["online"] is False


def test_alarms_explain_themselves(api: httpx.Client) -> None:
    alarm = api.get("/v1/alarms/1").json()
    assert alarm["title"] == {"zh": "消火栓静水压力不足", "en": "Hydrant pressure too low"}
    assert "0.052 MPa" in alarm["explanation"]["zh"]
    assert "0.14 MPa" in alarm["explanation"]["en"]
    assert alarm["name"] == "消火栓001"
    gone = api.get("/v1/alarms/7").json()
    assert gone["title"]["zh"] == "a_rule_long_gone", "a rule set that is gone leaves the bare id"
    assert "0.052 MPa" in gone["explanation"]["en"]


def test_alarm_filters_and_pages(api: httpx.Client) -> None:
    def ids(**asked: str | int) -> list[int]:
        return [alarm["id"] for alarm in api.get("/v1/alarms", params=asked).json()["items"]]

    assert ids() == [6, 5, 4, 3, 2, 1]
    assert ids(state="all") == [7, 6, 5, 4, 3, 2, 1]
    assert ids(urgency="life") == [5, 4]
    first = api.get("/v1/alarms", params={"limit": 4}).json()
    assert [alarm["id"] for alarm in first["items"]] == [6, 5, 4, 3]
    assert ids(limit=4, cursor=first["next_cursor"]) == [2, 1]


def test_an_incident_says_why_each_member_belongs(api: httpx.Client) -> None:
    incident = api.get("/v1/incidents/1").json()
    assert [(a["subject"], a["why"]) for a in incident["alarms"]] == [
        ("hyd-000001", "first"),
        ("hyd-000002", "same_zone"),
        ("hyd-000003", "same_zone"),
    ]
    assert incident["alarms"][1]["why_text"]["zh"] == "同一供水分区"
    assert incident["cases"] == ["CB20261124-000001"]
    assert incident["timeline"][0]["after"] == "confirmed"
    assert [item["id"] for item in api.get("/v1/incidents").json()["items"]] == [4, 3, 2, 1]


def test_a_case_has_timeline_evidence_and_deliveries(api: httpx.Client) -> None:
    case = api.get("/v1/cases/CB20261124-000001").json()
    assert [step["after"] for step in case["timeline"]] == ["reported", "filed"]
    assert case["timeline"][0]["details"] == {"category": "water_main_burst"}
    assert case["evidence"] == [{"alarm": 1, "why": "first"}]
    assert case["deliveries"][0]["state"] == "delivered"
    assert case["unit"] == {"code": "water", "zh": "供水公司", "en": "Water company"}
    assert case["area_owner"]["zh"] == "甲浦街道"
    assert case["place"]["grid"]
    kinds = {kind: [c["number"][-1] for c in api.get("/v1/cases", params={"kind": kind}).json()["items"]]
             for kind in ("case", "rescue", "maintenance")}  # fmt: skip
    assert kinds == {"case": ["5", "1"], "rescue": ["3", "2"], "maintenance": ["4"]}
    assert [c["number"][-1] for c in api.get("/v1/cases", params={"state": "closed"}).json()["items"]] == ["5"]
    assert [c["number"][-1] for c in api.get("/v1/cases", params={"stage": "closed"}).json()["items"]] == ["5"]


@pytest.mark.parametrize(
    ("path", "status", "error"),
    [
        ("/v1/alarms/99", 404, "not_found"),
        ("/v1/incidents/99", 404, "not_found"),
        ("/v1/cases/none", 404, "not_found"),
        ("/v1/devices/none", 404, "not_found"),
        ("/v1/commands/none", 404, "not_found"),
        ("/v1/commands/in-0123456789abcdef00000000", 404, "not_found"),
        ("/console/../app.py", 404, "http"),
        ("/console/nothing.js", 404, "notfound"),
        ("/v1/alarms?cursor=!!", 400, "bad_cursor"),
        ("/v1/alarms?cursor=YWJj", 400, "bad_cursor"),
        ("/v1/alarms?limit=0", 422, "invalid"),
        ("/v1/alarms?limit=201", 422, "invalid"),
        ("/v1/alarms?state=odd", 422, "invalid"),
        ("/v1/alarms/x", 422, "invalid"),
    ],
)
def test_refusals_say_what_and_where(api: httpx.Client, path: str, status: int, error: str) -> None:
    refusal(api.get(path), status, error)


def test_openapi_describes_everything(api: httpx.Client) -> None:
    schema = api.get("/openapi.json").json()
    assert "Unix milliseconds" in schema["info"]["description"]
    operations = [(path, one) for path, methods in schema["paths"].items() for one in methods.values()]
    assert len(operations) >= 19
    for path, operation in operations:
        assert operation.get("description"), path
    assert set(schema["paths"]["/v1/platforms/grid/events"]["post"]["responses"]) >= {"200", "202", "400", "401", "413"}
    event = schema["paths"]["/v1/platforms/grid/events"]["post"]["requestBody"]["content"]
    assert "verdict" in event["application/cloudevents+json"]["schema"]["properties"]["data"]["properties"]
    named = re.findall(r'"#/components/schemas/(\w+)"', msgspec.json.encode(schema).decode())
    assert set(named) <= set(schema["components"]["schemas"])


# --- commands ---------------------------------------------------------------------------------------------------


def taken(site: Seeded, box: str, id: str) -> Command:
    return next(item for _, item in Mailbox(site.layout.mailbox(box)).take()[0] if item.id == id)


@pytest.mark.parametrize(
    ("path", "body", "kind", "expected"),
    [
        ("/v1/alarms/1/acknowledge", {}, "acknowledge", {"alarm": 1}),
        ("/v1/incidents/3/confirm", {}, "confirm", {"incident": 3}),
        ("/v1/incidents/3/reject", {"reason": "演练"}, "reject", {"incident": 3}),
        ("/v1/cases/CB20261124-000002/rescued", {}, "rescued", {"case": "CB20261124-000002"}),
    ],
)
def test_a_command_is_stored_before_it_is_answered(
    api: httpx.Client, site: Seeded, path: str, body: dict[str, str], kind: str, expected: dict[str, object]
) -> None:
    answer = api.post(path, json={"actor": "王值班", **body})
    assert answer.status_code == 202
    id = answer.json()["command"]
    item = taken(site, "desk", id)
    assert (item.kind, item.actor, item.body, item.reason) == (kind, "王值班", expected, body.get("reason", ""))
    assert api.get(f"/v1/commands/{id}").json()["state"] == "pending"


def test_who_asks_may_stand_in_the_header(api: httpx.Client, site: Seeded) -> None:
    answer = api.post("/v1/alarms/1/acknowledge", headers={"X-Actor": "%E6%9D%8E"})
    assert answer.status_code == 202
    assert taken(site, "desk", answer.json()["command"]).actor == "李"


def test_nobody_changes_anything_without_a_name(api: httpx.Client, site: Seeded) -> None:
    before = sorted(site.layout.mailbox("desk").glob("*.json"))
    for path in ("/v1/alarms/1/acknowledge", "/v1/incidents/1/confirm", "/v1/cases/CB20261124-000002/rescued"):
        assert "who asks" in refusal(api.post(path), 400, "no_actor")
    refusal(api.post("/v1/incidents/1/reject", json={"reason": "x"}), 400, "no_actor")
    refusal(api.post("/v1/incidents/1/reject", json={"actor": "li"}), 422, "invalid")
    refusal(api.post("/v1/alarms/99/acknowledge", json={"actor": "li"}), 404, "not_found")
    refusal(api.post("/v1/cases/CB20261124-000001/rescued", json={"actor": "li"}), 409, "not_a_rescue")
    assert sorted(site.layout.mailbox("desk").glob("*.json")) == before


def test_what_became_of_a_command(api: httpx.Client) -> None:
    known = api.get("/v1/commands/known").json()
    assert (known["state"], known["message"]) == ("refused", "alarm 7: closed")


def test_an_override_goes_to_ingest_and_is_followed_to_its_end(api: httpx.Client, site: Seeded) -> None:
    asked = {"device": "hyd-000001", "rule": "hydrant_illegal_use", "from": 10, "until": 20, "reason": "消防演练"}
    eventually(lambda: api.get("/v1/devices/hyd-000001").status_code == 200)
    refusal(api.post("/v1/overrides", json=asked), 400, "no_actor")
    refusal(api.post("/v1/overrides", json={**asked, "until": 10, "actor": "li"}), 400, "empty_time")
    refusal(api.post("/v1/overrides", json={**asked, "device": "none", "actor": "li"}), 404, "not_found")
    refusal(api.post("/v1/overrides", json={**asked, "rule": "none", "actor": "li"}), 404, "not_found")
    refusal(api.post("/v1/overrides", json={**asked, "device": "zone:none", "actor": "li"}), 404, "not_found")
    zone = next(device.zone for device in site.district.registry.devices if device.id == "hyd-000001")
    assert api.post("/v1/overrides", json={**asked, "device": f"zone:{zone}", "actor": "li"}).status_code == 202
    answer = api.post("/v1/overrides", json={**asked, "actor": "li"})
    assert answer.status_code == 202
    id = answer.json()["command"]
    item = taken(site, "ingest", id)
    assert item.kind == "override"
    assert item.body == {"subject": "hyd-000001", "rule": "hydrant_illegal_use", "from_ms": 10, "until_ms": 20,
                         "reason": "消防演练", "actor": "li"}  # fmt: skip
    assert api.get(f"/v1/commands/{id}").json()["state"] == "pending"
    path = next(site.layout.mailbox("ingest").glob(f"*-{id}.json"))
    path.rename(path.with_suffix(".refused"))  # as ingest does
    assert api.get(f"/v1/commands/{id}").json()["state"] == "refused"
    path.with_suffix(".refused").unlink()
    assert api.get(f"/v1/commands/{id}").json()["state"] == "applied"


# --- the process ------------------------------------------------------------------------------------------------


def test_without_a_database_it_answers_and_says_so(tmp_path: Path) -> None:
    made = seeded(tmp_path)
    made.layout.database.unlink()
    with process(made.layout, "api", ready=made.url + "/healthz"):
        refusal(httpx.get(made.url + "/v1/alarms", trust_env=False), 503, "no_database")
        status = httpx.get(made.url + "/v1/status", trust_env=False).json()
        assert (status["cases"], status["live"]) == (0, False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_within_two_seconds_with_a_client_connected(tmp_path: Path, number: int) -> None:
    made = seeded(tmp_path)
    with (
        process(made.layout, "api", ready=made.url + "/healthz") as running,
        httpx.Client(base_url=made.url, trust_env=False) as client,
    ):
        client.get("/healthz")
        assert stops_within(running, number, 2.0) == 0


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    from citybrain.cli import main

    made = seeded(tmp_path)
    with socket.create_server(("127.0.0.1", made.run.api_port)):
        from contextlib import redirect_stderr
        from io import StringIO

        said = StringIO()
        with redirect_stderr(said):
            code = main(["api", "--data", str(tmp_path)])
    assert code == 4
    assert f"port {made.run.api_port}" in said.getvalue()
    assert "--api-port" in said.getvalue()


def test_migrate_may_be_repeated(tmp_path: Path) -> None:
    from citybrain.cli import main

    assert main(["migrate", "--data", str(tmp_path)]) == 0
    assert main(["migrate", "--data", str(tmp_path)]) == 0
    assert (tmp_path / "city.db").exists()


# --- latest values ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Seeded:
    return seeded(tmp_path)


def latest_of(made: Seeded) -> Latest:
    latest = Latest(made.layout, SHARDS, Counters("api"))
    latest.start()
    while latest.follow():
        pass
    return latest


def pressure(latest: Latest, device: str = "hyd-000001") -> Value | None:
    return latest.values(latest.device(device)).get("pressure_mpa")


def test_the_newest_value_stays_whatever_the_order(folder: Seeded) -> None:
    now = folder.now_ms
    folder.frame([("hyd-000001", "pressure_mpa", now - 5, 0.5), ("hyd-000001", "pressure_mpa", now - 9, 0.9)])
    folder.frame([("hyd-000001", "pressure_mpa", now - 7, 0.7)])
    assert pressure(latest_of(folder)) == Value(0.5, now - 5)


def test_a_clock_that_runs_ahead_is_held_back(folder: Seeded) -> None:
    folder.frame([("hyd-000001", "pressure_mpa", folder.now_ms + 3_600_000, 0.5)])
    assert pressure(latest_of(folder)) == Value(0.5, folder.now_ms + 2000)
    folder.now_ms += 10_000
    folder.frame([("hyd-000001", "pressure_mpa", folder.now_ms, 0.4)])
    assert pressure(latest_of(folder)) == Value(0.4, folder.now_ms)


def test_a_new_registry_keeps_the_values_of_what_both_know(folder: Seeded) -> None:
    folder.frame([("hyd-000002", "pressure_mpa", folder.now_ms, 0.22)])
    latest = latest_of(folder)
    registry = folder.district.registry
    fewer = Registry(
        registry.gateways, tuple(d for d in registry.devices if d.id != "hyd-000001"), registry.cells, registry.units
    )
    folder.control(Control("registry", folder.now_ms, "test", folder.layout.put_blob(encode_registry(fewer))))
    folder.index = Index(fewer, "")
    folder.frame([("hyd-000003", "pressure_mpa", folder.now_ms, 0.33)], seq=2)
    while latest.follow():
        pass
    assert latest.find("hyd-000001") is None
    assert pressure(latest, "hyd-000002") == Value(0.22, folder.now_ms)
    assert pressure(latest, "hyd-000003") == Value(0.33, folder.now_ms)


def test_it_starts_from_a_snapshot_and_a_damaged_one_is_passed_over(folder: Seeded) -> None:
    from citybrain.segments import Reader
    from streams.engine import Engine

    folder.control(Control("ruleset", folder.now_ms, "test", folder.ruleset))
    folder.frame([("hyd-000001", "pressure_mpa", folder.now_ms, 0.5)])
    engine = Engine(0, folder.layout)
    reader = Reader(folder.layout.log(0))
    engine.process(reader.read())
    snapshots = folder.layout.engine(0)
    snapshots.mkdir(parents=True)
    (snapshots / "00000000000000000003.snapshot").write_bytes(engine.snapshot())
    (snapshots / "00000000000000000009.snapshot").write_bytes(b"half a zip")
    latest = Latest(folder.layout, SHARDS, Counters("api"))
    latest.start()
    assert pressure(latest) == Value(0.5, folder.now_ms), "without reading the log"
    folder.frame([("hyd-000001", "pressure_mpa", folder.now_ms + 1, 0.6)], seq=2)
    while latest.follow():
        pass
    assert pressure(latest) == Value(0.6, folder.now_ms + 1)


def test_a_record_that_cannot_be_used_is_counted_and_passed_over(folder: Seeded) -> None:
    folder.writers[0].append(1, folder.now_ms, b"short")
    folder.frame([("hyd-000001", "pressure_mpa", folder.now_ms, 0.5)])
    counters = Counters("api")
    latest = Latest(folder.layout, SHARDS, counters)
    latest.start()
    latest.follow()
    assert pressure(latest) == Value(0.5, folder.now_ms)
    assert counters.values["errors_total{stage=readings}"] == 1
