"""The fleet at a glance: what the list of gateways says of each box, which want care, and what ends when."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.fleet import Box, certificate_ends, statuses_of, wants
from api.pki import certificates
from api.pki.broker import BrokerFolder
from api.pki.ca import AUTHORITY_MS, CERTIFICATE_MS, LIST_MS, Authority, Setting
from api.pki.endings import endings
from api.pki.journal import Issued
from api.readings import Seen, Value
from citybrain.cli import main
from citybrain.clock import DAY_MS, ManualClock, real_unix_ms
from citybrain.counters import Counters, Heartbeat
from citybrain.model import Gateway, Place
from citybrain.wire import About
from streams.ingest import GatewayStatus
from tests.authority import Box as Enrolled
from tests.authority import made
from tests.conftest import eventually, unused_port
from tests.seeded_site import Seeded, process, seeded

NOW = real_unix_ms()
GATEWAY = Gateway("gw-1", 0, Place(120.0, 31.0, ""))
HEARD = Seen(NOW, NOW)


def box(**values: float) -> Box:
    return Box(GATEWAY, True, HEARD, values={name: Value(value, NOW) for name, value in values.items()})


def status(**about: Any) -> GatewayStatus:
    return GatewayStatus(3, True, NOW, since=NOW - 5000, about=About(**about))


# --- which want care ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "why"),
    [
        (box(), []),
        (box(spooled=900, clock_offset_s=9.0, quality=0), []),
        (Box(GATEWAY, False, HEARD), ["offline"]),
        (box(spooled=1001), ["backlog"]),
        (box(clock_offset_s=-11.0), ["clock"]),
        (box(quality=7), ["clock"]),
        (Box(GATEWAY, True, HEARD, certificate_ends=NOW + 14 * DAY_MS), []),
        (Box(GATEWAY, True, HEARD, certificate_ends=NOW + 13 * DAY_MS), ["certificate"]),
        (Box(GATEWAY, True, HEARD, certificate_ends=NOW - 1), ["certificate"]),
        (Box(GATEWAY, True, HEARD, status()), []),
        (Box(GATEWAY, True, HEARD, status(failing={"bus": "gone"})), ["drivers"]),
    ],
)
def test_which_boxes_want_care(one: Box, why: list[str]) -> None:
    assert wants(one, NOW) == why


def test_since_when_a_box_is_as_it_is() -> None:
    assert Box(GATEWAY, True, HEARD, status()).since == NOW - 5000
    assert Box(GATEWAY, False, Seen(NOW - 9000, None), status()).since == NOW - 9000
    assert Box(GATEWAY, True, HEARD).since is None, "heard, but its birth was not"
    assert Box(GATEWAY, True, HEARD, GatewayStatus(3, True, NOW)).since is None, "a heartbeat of the release before"


def issued(from_ms: int, until_ms: int, revoked_ms: int | None = None) -> Issued:
    return Issued("a1", "gw-1", "gateway", 1, from_ms, until_ms, "key", revoked_ms=revoked_ms)


def test_the_box_itself_knows_best_which_certificate_it_shows() -> None:
    old_end, new_end = NOW + 5 * DAY_MS, NOW + 365 * DAY_MS
    renewed = issued(NOW - DAY_MS, new_end)
    assert certificate_ends(None, None) is None
    assert certificate_ends(None, renewed) == new_end
    assert certificate_ends(Value(5.0, NOW), None) == old_end
    assert certificate_ends(Value(5.0, NOW), renewed) == old_end, "renewed here, and not taken there"
    spoke_before = Value(5.0, NOW - 2 * DAY_MS)
    assert certificate_ends(spoke_before, renewed) == new_end
    assert certificate_ends(Value(5.0, NOW), issued(NOW - DAY_MS, new_end, NOW)) is None, "shut out on purpose"


def test_statuses_come_from_all_ingests_and_one_that_cannot_be_read_costs_nothing() -> None:
    def beat(process: str, at: int, gateways: Any) -> Heartbeat:
        return Heartbeat(process, 1, at, 0, {}, details={"gateways": gateways})

    said = {"connection": 1, "online": True, "at": 1}
    beats = {
        "ingest-0": beat("ingest-0", 1, {"gw-1": said}),
        "ingest-1": beat("ingest-1", 2, {"gw-2": said | {"about": {"version": "0.2.0", "later": 1}}}),
        "ingest-2": beat("ingest-2", 3, {"gw-3": "of another release"}),
        "worker": beat("worker", 4, {"gw-4": said}),
    }
    found = statuses_of(beats)
    assert set(found) == {"gw-1", "gw-2"}
    assert found["gw-2"].about.version == "0.2.0"


# --- what of the authority ends when ------------------------------------------------------------------------------


def left_days(authority: Authority, now_ms: int) -> dict[str, float]:
    return {one.kind: round(one.left_s / 86_400, 2) for one in endings(authority, now_ms)}


def test_what_the_centre_shows_ends_in_its_time_and_tending_moves_it(tmp_path: Path) -> None:
    clock = ManualClock(NOW)
    authority = made(tmp_path / "centre", clock)
    authority.make_service("service-ingest", "li", "x")
    days = {kind: ms / DAY_MS for kind, ms in (("authority", AUTHORITY_MS), ("list", LIST_MS))}
    days |= {"server": CERTIFICATE_MS / DAY_MS, "service": CERTIFICATE_MS / DAY_MS}
    assert left_days(authority, NOW) == pytest.approx(days, abs=0.01)
    clock.set_ms(NOW + 250 * DAY_MS)
    assert left_days(authority, clock.now_ms())["list"] < 0, "nobody tended it"
    authority.tend()
    after = left_days(authority, clock.now_ms())
    assert (round(after["list"]), round(after["server"]), round(after["service"])) == (90, 365, 115)


def test_a_brokers_folder_that_was_left_behind_counts(tmp_path: Path) -> None:
    """The authority is tended, but what the broker reads could not be written: that is what ends."""
    clock = ManualClock(NOW)
    authority = made(tmp_path / "centre", clock)
    folder = tmp_path / "broker"
    authority.serve_broker(BrokerFolder(str(folder), port=unused_port(), bind="127.0.0.1"))
    old = (folder / "crl.pem").read_bytes()
    clock.set_ms(NOW + 70 * DAY_MS)
    authority.tend()
    assert round(left_days(authority, clock.now_ms())["list"]) == 90
    (folder / "crl.pem").write_bytes(old)
    assert round(left_days(authority, clock.now_ms())["list"]) == 20
    (folder / "crl.pem").write_text("damaged")
    assert round(left_days(authority, clock.now_ms())["list"]) == 90, "what cannot be read is said by the authority"


def test_a_list_that_ends_with_its_authority_is_no_reason(tmp_path: Path) -> None:
    clock = ManualClock(NOW)
    authority = made(tmp_path / "centre", clock)
    clock.set_ms(NOW + AUTHORITY_MS - 20 * DAY_MS)
    authority.rotate("li", "planned")
    authority.tend()
    assert round(left_days(authority, clock.now_ms())["list"]) == 90


def test_the_command_line_says_what_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    authority = made(tmp_path / "centre", ManualClock(NOW - 355 * DAY_MS))
    Enrolled(tmp_path, authority, "gw-1")
    Enrolled(tmp_path, authority, "gw-2")
    later = Authority(authority.layout)
    later.sign("gateway", "gw-2", certificates.new_key().public_key(), "li", "renewed")

    def listed(*words: str) -> Any:
        assert main(["ca", "list", *words, "--data", str(authority.layout.root), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    told = listed()
    assert {one["name"]: one["days"] for one in told["certificates"] if one["kind"] == "gateway"} == {
        "gw-1": 10.0, "gw-2": 365.0,
    }  # fmt: skip
    assert {one["kind"] for one in told["ends"]} == {"authority", "list", "server"}
    assert round(next(one["days"] for one in told["ends"] if one["kind"] == "list")) == 90 - 355
    assert [one["name"] for one in listed("--state", "ending")["certificates"] if one["kind"] == "gateway"] == ["gw-1"]
    main(["ca", "list", "--data", str(authority.layout.root)])
    out = capsys.readouterr().out
    assert "days" in out.splitlines()[0]
    assert "list" in out


# --- over HTTP ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seeded]:
    """A live API: gw-01 is well, the certificate of gw-02 ends soon, a driver of gw-03 fails, the others are silent."""
    made_ = seeded(tmp_path_factory.mktemp("site"))
    authority = Authority(made_.layout, ManualClock(NOW - 355 * DAY_MS))
    authority.init(Setting(("127.0.0.1",), listen=""), "li", "test")
    key = certificates.new_key().public_key()
    authority.sign("gateway", "gw-02", key, "li", "x")
    Authority(made_.layout).sign("gateway", "gw-01", key, "li", "x")
    for number, id in enumerate(("gw-01", "gw-02", "gw-03"), 1):
        made_.frame([(id, "spooled", made_.now_ms, 4.0)], number)
    counters = Counters("ingest", made_.layout.run)
    counters.gauges["connected"] = 1
    told = {"gw-01": status(version="0.2.0", config="ab" * 32), "gw-03": status(failing={"bus1": "no such port"})}
    counters.details["gateways"] = told
    counters.publish(force=True)
    with process(made_.layout, "api", ready=made_.url + "/healthz"):
        eventually(lambda: sum(one["online"] for one in gateways(made_)) == 3, what="three heard")
        yield made_


def gateways(site: Seeded, **query: str | int) -> list[dict[str, Any]]:
    answer = httpx.get(f"{site.url}/v1/gateways", params=query, trust_env=False)
    assert answer.status_code == 200, answer.text
    items: list[dict[str, Any]] = answer.json()["items"]
    return items


def test_a_box_in_one_line(site: Seeded) -> None:
    first, second, third, *silent = gateways(site)
    assert (first["online"], first["version"], first["config"]) == (True, "0.2.0", "ab" * 32)
    assert (first["since"], first["spooled"], first["wants"]) == (NOW - 5000, 4, [])
    assert first["certificate_days"] == pytest.approx(365, abs=0.2)
    assert first["commissioned"] is None
    assert second["certificate_days"] == pytest.approx(10, abs=0.2)
    assert third["failing"] == {"bus1": "no such port"}
    assert [one["code"] for one in third["wants"]] == ["drivers"]
    assert third["certificate_ends_at"] is None
    assert all([one["code"] for one in box["wants"]] == ["offline"] for box in silent)
    assert second["wants"] == [
        {"code": "certificate", "zh": "证书即将到期或已到期", "en": "certificate ends or has ended"}
    ]


def test_those_that_want_care_and_pages(site: Seeded) -> None:
    everybody = [one["id"] for one in gateways(site)]
    assert [one["id"] for one in gateways(site, wants="care")] == everybody[1:]
    assert [one["id"] for one in gateways(site, wants="certificate")] == ["gw-02"]
    assert gateways(site, wants="place") == []
    found, cursor = [], None
    while True:
        query = {"limit": "2", "wants": "care"} | ({"cursor": cursor} if cursor else {})
        answer = httpx.get(f"{site.url}/v1/gateways", params=query, trust_env=False).json()
        found += [one["id"] for one in answer["items"]]
        cursor = answer["next_cursor"]
        if cursor is None:
            break
    assert found == everybody[1:]
    for query in ({"wants": "love"}, {"cursor": "?"}, {"limit": "0"}):
        assert httpx.get(f"{site.url}/v1/gateways", params=query, trust_env=False).status_code in (400, 422)


def test_the_health_line_warns_of_what_ends(site: Seeded) -> None:
    reasons = httpx.get(f"{site.url}/v1/status", trust_env=False).json()["health"]["reasons"]
    texts = {one["code"]: one["text"]["en"] for one in reasons}
    assert texts["gateway_ends"] == "certificates not renewed: 1, gw-02 ends in 10 d"
    eventually(lambda: not {"list_ended", "server_ends"} & _codes(site), 20, "the API having tended the authority")


def _codes(site: Seeded) -> set[str]:
    reasons = httpx.get(f"{site.url}/v1/status", trust_env=False).json()["health"]["reasons"]
    return {one["code"] for one in reasons}


def test_what_is_left_is_a_metric(site: Seeded) -> None:
    text = httpx.get(f"{site.url}/metrics", trust_env=False).text
    left = {
        line.split('name="')[1].split('"')[0]: float(line.split()[-1])
        for line in text.splitlines() if line.startswith("citybrain_left_seconds{")
    }  # fmt: skip
    assert left["gw-02"] == pytest.approx(10 * 86_400, abs=10_000)
    assert {"1", "citybrain", "crl.pem"} <= set(left)


def test_an_authority_that_cannot_be_read_leaves_the_rest(site: Seeded) -> None:
    path = site.layout.ca / "ca.json"
    good = path.read_bytes()
    path.write_text("{")
    try:
        answer = httpx.get(f"{site.url}/v1/status", trust_env=False)
        assert answer.status_code == 200
        assert len(gateways(site)) == 5
    finally:
        path.write_bytes(good)


def test_the_fleet_on_the_command_line(site: Seeded, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--data", str(site.layout.root))
    assert main(["devices", "gateways", "--wants", "drivers", *data]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:3] == ["gateway", "online", "since"]
    assert out[1].startswith("gw-03")
    assert "bus1" in out[1]
    assert main(["devices", "gateways", *data, "--json"]) == 0
    assert [one["id"] for one in json.loads(capsys.readouterr().out)["gateways"]] == [
        one["id"] for one in gateways(site)
    ]
