"""The ledger through its doors: `citybrain devices` and the HTTP API, with a real desk and ingest behind them."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from citybrain import wire
from citybrain.cli import main
from citybrain.counters import Counters
from citybrain.layout import Layout
from citybrain.mailbox import Mailbox
from citybrain.model import Reading
from streams.ingest import Ingest
from streams.log import Control
from streams.runtimes.ingest import control_of
from tests.conftest import end, eventually
from tests.seeded_site import Seeded, process, seeded
from tests.streams.test_ingest import Platform

SENSOR = "867700000000001"
WHO = {"X-Actor": quote("王工")}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seeded]:
    """A seeded site with a live desk and API, and a sensor in quarantine."""
    made = seeded(tmp_path_factory.mktemp("site"))
    quarantine(made)
    argv = [sys.executable, "-m", "citybrain", "desk", "--data", str(made.layout.root)]
    with (made.layout.root / "desk.log").open("ab") as log, subprocess.Popen(argv, stdout=log, stderr=log) as desk:
        try:
            with process(made.layout, "api", ready=made.url + "/healthz"):
                eventually((made.layout.run / "desk.heartbeat.json").exists, 20)
                yield made
        finally:
            end(desk)


def quarantine(made: Seeded) -> None:
    """A message of gw-02 with a device that nobody knows, through a real ingest."""
    for writer in made.writers:
        writer.close()
    ingest = Ingest(made.layout, (0, 1), Counters("ingest"))
    ingest.start()
    body = wire.columns_body([Reading(SENSOR, made.now_ms, {"pressure_mpa": 0.31, "battery_v": 3.6})])
    ingest.message(
        wire.topic(1, "gw-02", "telemetry"), wire.columns_message(wire.Header(5, 1, 1, made.now_ms), body), made.now_ms
    )
    assert ingest.commit()
    ingest.close()


@pytest.fixture
def api(site: Seeded) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=site.url, trust_env=False, timeout=20) as client:
        yield client


def decided(api: httpx.Client, answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 202, answer.text
    id = answer.json()["command"]
    eventually(lambda: api.get(f"/v1/commands/{id}").json()["state"] != "pending", 20, "a decision")
    found: dict[str, Any] = api.get(f"/v1/commands/{id}").json()
    return found


def cli(site: Seeded, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code = main(["devices", *words, "--data", str(site.layout.root), "--json"])
    return code, json.loads(capsys.readouterr().out)


# --- HTTP ---------------------------------------------------------------------------------------------------------


def test_assets_are_listed_by_page_and_shown_whole(api: httpx.Client) -> None:
    first = api.get("/v1/assets", params={"kind": "elevator", "limit": 15}).json()
    second = api.get("/v1/assets", params={"kind": "elevator", "limit": 15, "cursor": first["next_cursor"]}).json()
    codes = [one["code"] for one in (*first["items"], *second["items"])]
    assert codes == [f"lift-{n:04d}" for n in range(1, 21)]
    assert second["next_cursor"] is None
    one = api.get("/v1/assets/hyd-000001").json()
    assert (one["state"], one["place"]["street"], one["place"]["grid"]) == ("active", "001", "990101001-G01")
    assert [sensor["id"] for sensor in one["sensors"]] == ["hyd-000001"]
    assert api.get("/v1/assets/nobody").status_code == 404


def test_steps_of_an_asset_are_commands_with_a_name(api: httpx.Client) -> None:
    done = decided(
        api, api.post("/v1/assets/hyd-000002/replace", json={"sensor": "imei-2", "reason": "坏了"}, headers=WHO)
    )
    assert (done["state"], done["kind"], done["actor"]) == ("applied", "asset_replace", "王工")
    assert decided(api, api.post("/v1/assets/hyd-000003/commission", headers=WHO))["state"] == "applied"
    refused = decided(api, api.post("/v1/assets/hyd-000003/commission", headers=WHO))
    assert (refused["state"], "no step" in refused["message"]) == ("refused", True)
    told = api.get("/v1/assets/hyd-000002").json()
    assert (told["sensor"], told["steps"][-1]["actor"]) == ("imei-2", "王工")
    assert api.post("/v1/assets/hyd-000002/retire").status_code == 400, "nobody says who asks"
    assert api.post("/v1/assets/nobody/retire", headers=WHO).status_code == 404
    assert api.post("/v1/assets/hyd-000002/explode", headers=WHO).status_code == 422


def test_registers_over_http(api: httpx.Client, site: Seeded) -> None:
    window = {"from": site.now_ms, "until": site.now_ms + 3_600_000, "reason": "消防演练"}
    body = {"kind": "use", "subject": "zone:zone-01", **window}
    assert decided(api, api.post("/v1/registers", json=body, headers=WHO))["state"] == "applied"
    entry = api.get("/v1/registers").json()[0]
    assert (entry["subject"], entry["phase"], entry["rules"]) == ("zone:zone-01", "now", ["hydrant_illegal_use"])
    n = entry["n"]
    assert api.post(f"/v1/registers/{n}/cancel", json={"reason": ""}, headers=WHO).status_code == 422
    assert decided(api, api.post(f"/v1/registers/{n}/cancel", json={"reason": "完"}, headers=WHO))["state"] == "applied"
    assert [one["phase"] for one in api.get("/v1/registers", params={"over": True}).json() if one["n"] == n] == [
        "cancelled"
    ]
    assert api.post("/v1/registers/999/cancel", json={"reason": "x"}, headers=WHO).status_code == 404


GOOD = "编号,类型,名称,网关,经度,纬度,标签\nhyd-900001,消火栓,新栓,gw-01,120.1506,31.199,battery\n"


def test_an_import_over_http_is_checked_first_then_the_desk_does_it(api: httpx.Client) -> None:
    params = {"name": "assets.csv", "reason": "survey"}
    bad = api.post("/v1/imports", params=params, content=GOOD.replace("gw-01", "gw-77").encode("gbk"), headers=WHO)
    assert (bad.status_code, bad.json()["error"]) == (422, "not_importable")
    assert bad.json()["findings"][0]["where"] == "assets.csv!D2"
    dry = api.post("/v1/imports", params={**params, "dry_run": True}, content=GOOD.encode(), headers=WHO)
    assert (dry.json()["command"], dry.json()["counts"]["assets"]) == (None, {"read": 1, "changed": 1})
    assert api.get("/v1/assets/hyd-900001").status_code == 404
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as files:
        files.writestr("lists/assets.csv", GOOD.encode())
        files.writestr("readme.txt", "x")
    answer = api.post("/v1/imports", params={"name": "all.zip"}, content=packed.getvalue(), headers=WHO)
    assert decided(api, answer)["kind"] == "ledger_import"
    assert api.get("/v1/assets/hyd-900001").json()["name"] == "新栓"
    again = api.post("/v1/imports", params={"name": "all.zip"}, content=packed.getvalue(), headers=WHO)
    assert again.json()["command"] is None


@pytest.mark.parametrize(
    ("name", "content", "status"),
    [
        ("assets.doc", b"x", 400),
        ("layer.shp", b"x", 400),
        ("all.zip", b"not a zip", 400),
        ("assets.xlsx", b"not a workbook", 422),
        ("assets.csv", b"", 422),
    ],
)
def test_an_upload_that_is_nothing_is_refused(api: httpx.Client, name: str, content: bytes, status: int) -> None:
    answer = api.post("/v1/imports", params={"name": name}, content=content, headers=WHO)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"


# --- command line -------------------------------------------------------------------------------------------------


def test_a_sensor_in_quarantine_is_seen_adopted_and_its_readings_processed(
    site: Seeded, api: httpx.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    code, seen = cli(site, capsys, "quarantine")
    assert code == 0
    assert [(one["sensor"], one["gateway"], one["readings"]) for one in seen["sensors"]] == [(SENSOR, "gw-02", 1)]
    assert api.get("/v1/quarantine").json() == seen["sensors"]
    words = ("--asset", "hyd-800001", "--kind", "hydrant", "--lon", "120.1506", "--lat", "31.199", "--reason", "found")
    code, done = cli(site, capsys, "adopt", SENSOR, *words, "--actor", "li")
    assert (code, done["state"]) == (0, "applied"), done
    platform = Platform(site.layout.root)
    eventually(lambda: Mailbox(site.layout.mailbox("ingest")).take()[0], 10)
    for _, command in Mailbox(site.layout.mailbox("ingest")).take()[0]:
        platform.ingest.control(control_of(command, site.now_ms), site.now_ms)
    platform.ingest.control(Control("ruleset", site.now_ms, "test", site.ruleset), site.now_ms)
    platform.ingest.commit()
    told = [[control.content for control in platform.controls("registry", shard)] for shard in (0, 1)]
    assert told[0] == told[1], "a change reaches every shard"
    assert len(told[0]) >= 2
    values = [row for _, _, rows in platform.frames(1) for row in rows if row[0] == "hyd-800001"]
    assert sorted(row[1:] for row in values) == [("battery_v", site.now_ms, 3.6), ("pressure_mpa", site.now_ms, 0.31)]
    assert cli(site, capsys, "quarantine")[1]["sensors"] == []
    platform.ingest.close()


def test_the_command_line_says_what_was_done_and_what_was_not(
    site: Seeded, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, told = cli(site, capsys, "retire", "hyd-000200", "--reason", "gone", "--actor", "li")
    assert (code, told["state"]) == (0, "applied")
    code, told = cli(site, capsys, "retire", "hyd-000200", "--reason", "gone", "--actor", "li")
    assert (code, told["state"]) == (1, "refused")
    assert cli(site, capsys, "show", "hyd-000200")[1]["state"] == "retired"
    assert [step["event"] for step in cli(site, capsys, "history", "hyd-000200")[1]["steps"]] == ["retire"]
    listed = cli(site, capsys, "list", "--state", "retired")[1]["assets"]
    assert [one["code"] for one in listed] == ["hyd-000200"]
    words = ("maintenance", "lift-0001", "--until", "+2h", "--reason", "yearly check")
    assert cli(site, capsys, *words)[1]["state"] == "applied"
    n = cli(site, capsys, "registers")[1]["registers"][0]["n"]
    assert cli(site, capsys, "cancel", str(n), "--reason", "done")[1]["state"] == "applied"
    sheet, found = tmp_path / "assets.csv", tmp_path / "found.csv"
    sheet.write_text(GOOD.replace("120.1506", "31.2"), encoding="utf-8")
    code, told = cli(site, capsys, "import", str(sheet), "--report", str(found))
    assert (code, told["state"], told["errors"]) == (3, "refused", 1)
    assert "assets.csv!E2" in found.read_text(encoding="utf-8")


def test_tables_for_people_and_mistakes_on_the_command_line(
    site: Seeded, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = ("--data", str(site.layout.root))
    for words in (("list", "--kind", "gateway"), ("registers", "--all"), ("quarantine",), ("history", "gw-01")):
        assert main(["devices", *words, *data]) == 0
    assert "gw-01" in capsys.readouterr().out
    assert main(["devices", "permit", "hyd-000001", "--until", "soon", "--reason", "x", *data]) == 2
    assert "expected" in capsys.readouterr().err
    assert main(["devices", "show", "nobody", *data]) == 1
    empty = Layout(tmp_path / "empty")
    empty.make()
    assert main(["devices", "retire", "x", "--data", str(empty.root)]) == 0
    assert "pending" in capsys.readouterr().out, "no desk is running: it is stored"
