"""Orders: asked at the centre, done once by the box, answered once, whoever is killed and whatever is lost."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from api.desk import replay
from citybrain.clock import real_unix_ms
from citybrain.counters import Counters
from citybrain.db.schema import orders
from citybrain.db.store import open_store
from citybrain.errors import DiskFull, WireError
from citybrain.layout import Layout
from citybrain.mailbox import Command, Mailbox
from citybrain.orders import MOST_BYTES, Answer, Order, decode_answer, decode_order
from citybrain.storage import OsFiles
from citybrain.wire import topic
from edge.drivers import DRIVERS
from gateway.orders import INTERRUPTED, Orders
from gateway.run import GatewayProcess
from gateway.trial import Store, Trial
from streams.orders import Orders as Under
from tests.conftest import end, eventually
from tests.desk_city import T0, City, rows_of
from tests.gateway_box import GATEWAY, SHARD, Process, config_text
from tests.seeded_site import Seeded, process, seeded

LATER = real_unix_ms() + 3_600_000


class Filling(OsFiles):
    """A disk that is full while `full` says so."""

    full = False

    def replace(self, path: Path, data: bytes) -> None:
        if self.full:
            raise DiskFull(f"{path}: no space left on the device")
        super().replace(path, data)


class Centre:
    """A plain MQTT client at the centre's place: publishes orders, keeps what is answered."""

    def __init__(self, port: int) -> None:
        self.answers: list[Answer] = []
        self.online: list[bool] = []
        self._there = threading.Event()
        self._client = paho.Client(CallbackAPIVersion.VERSION2, "centre")
        self._client.on_connect = lambda client, *_: client.subscribe([("cb/v1/+/+/reply", 1), ("cb/v1/+/+/status", 1)])
        self._client.on_subscribe = lambda *_: self._there.set()
        self._client.on_message = lambda _client, _data, message: self._take(message.topic, bytes(message.payload))
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        assert self._there.wait(10)

    def _take(self, where: str, payload: bytes) -> None:
        if where.endswith("/reply"):
            self.answers.append(decode_answer(payload))
        else:
            self.online.append(json.loads(payload)["online"])

    def order(self, id: str, what: str, body: dict[str, Any] | None = None, until: int = LATER) -> None:
        payload = msgspec.json.encode(Order(id, what, body or {}, until))
        self._client.publish(topic(SHARD, GATEWAY, "command"), payload, qos=1).wait_for_publish(5)

    def rubbish(self, payload: bytes) -> None:
        self._client.publish(topic(SHARD, GATEWAY, "command"), payload, qos=1).wait_for_publish(5)

    def answered(self, id: str, within_s: float = 10.0) -> Answer:
        eventually(lambda: any(one.id == id for one in self.answers), within_s, f"an answer to {id}")
        return next(one for one in self.answers if one.id == id)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
def centre(mosquitto: int) -> Iterator[Centre]:
    made = Centre(mosquitto)
    yield made
    made.close()


@pytest.fixture
def folder(tmp_path: Path, mosquitto: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(DRIVERS, "scripted", "tests.driver_of_orders")
    made = tmp_path / "box"
    made.mkdir()
    (made / "gateway.yaml").write_text(config_text(mosquitto, driver("hyd-1", "ask")))
    return made


def driver(device: str, behaviour: str, name: str = "bus-0") -> str:
    return f"drivers:\n  {name}: {{driver: scripted, device: {device}, behaviour: {behaviour}}}\n"


@contextmanager
def running(folder: Path) -> Iterator[GatewayProcess]:
    """A gateway in a thread of this process, so that it knows the tests' driver."""
    box = GatewayProcess(Layout(folder))
    failures: list[BaseException] = []

    def serve() -> None:
        try:
            box.run()
        except BaseException as error:  # noqa: BLE001  the test is to see it
            failures.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        eventually(lambda: failures or box.counters.gauges.get("online"), 10, "the gateway being online")
        assert not failures
        yield box
    finally:
        box.stop()
        thread.join(15)
    assert not thread.is_alive()
    assert not failures


def order_of(text: str, **more: Any) -> dict[str, Any]:
    return {"config": text, "sha256": hashlib.sha256(text.encode()).hexdigest(), "trial_s": 1.0, **more}


# --- at the box ---------------------------------------------------------------------------------------------------


def test_a_repeated_order_is_done_once_and_answered_every_time(folder: Path, centre: Centre) -> None:
    with running(folder) as box:
        for _ in range(3):
            before = len(centre.answers)
            centre.order("a1", "log_level", {"level": "debug"})
            eventually(lambda before=before: len(centre.answers) > before, what="an answer")  # type: ignore[misc]
        assert {(one.id, one.ok, one.text) for one in centre.answers} == {
            ("a1", True, "log level debug until the next restart")
        }
        assert box.counters.values["commands_total"] == 1
        assert box.counters.level == "debug"
    with running(folder) as box:
        before = len(centre.answers)
        centre.order("a1", "log_level", {"level": "debug"})
        eventually(lambda: len(centre.answers) > before, what="the remembered answer")
        assert box.counters.level == "info", "it is not done again after a restart"


def test_sample_and_restart_reach_the_driver(folder: Path, centre: Centre) -> None:
    with running(folder) as box:
        centre.order("s1", "sample", {"device": "hyd-1"})
        assert centre.answered("s1") == msgspec.structs.replace(centre.answered("s1"), ok=True, text="hyd-1")
        centre.order("f1", "frame")
        assert centre.answered("f1").ok
        centre.order("r1", "restart_driver", {"driver": "bus-0"})
        assert centre.answered("r1").ok
        eventually(lambda: box.counters.values["restarts_total{driver=bus-0}"] == 1)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("dance", {}, "expected one of configure, sample, frame, restart_driver, log_level"),
    ("log_level", {"level": "loud"}, "expected one of error, warning, info, debug"),
    ("log_level", {}, "missing required field `level`"),
    ("restart_driver", {"driver": "bus-9"}, "expected one of bus-0"),
    ("sample", {"device": "hyd-9"}, "not in gateway.yaml"),
    ("configure", {"config": "gateway: x", "sha256": "00"}, "the order says 00"),
]


def test_what_cannot_be_done_is_answered_with_the_reason(folder: Path, centre: Centre) -> None:
    with running(folder):
        for number, (what, body, says) in enumerate(REFUSED):
            centre.order(f"x{number}", what, body)
            answer = centre.answered(f"x{number}")
            assert not answer.ok
            assert says in answer.text


def test_what_comes_too_late_or_is_no_order_is_not_done(folder: Path, centre: Centre) -> None:
    with running(folder) as box:
        centre.order("late", "log_level", {"level": "debug"}, until=1_700_000_000_000)
        assert "expired" in centre.answered("late").text
        for payload in (b"", b"{", b'{"id":"","what":"x"}', b'{"id":"a/b","what":"x"}', b"x" * (MOST_BYTES + 1)):
            centre.rubbish(payload)
        eventually(lambda: box.counters.values["dropped_total{reason=command_malformed}"] == 5)
        assert box.counters.level == "info"
        centre.order("a2", "log_level", {"level": "error"})
        assert centre.answered("a2").ok, "the next order is taken"


def test_a_good_configuration_is_kept_and_the_one_before_stays_beside(folder: Path, centre: Centre) -> None:
    before = (folder / "gateway.yaml").read_text()
    text = before.replace("hyd-1", "hyd-2")
    with running(folder) as box:
        centre.order("c1", "configure", order_of(text))
        answer = centre.answered("c1", 15)
        assert answer.ok, answer.text
        assert hashlib.sha256(text.encode()).hexdigest() in answer.text
        eventually(lambda: box.counters.details["gateway"]["drivers"] == ["bus-0"])
    assert (folder / "gateway.yaml").read_text() == text
    assert (folder / "gateway.yaml.previous").read_text() == before
    assert not (folder / "trial.json").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("behaviour: ask", "behaviour: crash"), "driver bus-0: /dev/ttyUSB9 is not there"),
        (("port: ", "port: 1 # "), "no connection"),
    ],
)
def test_a_configuration_that_does_not_work_is_rolled_back(
    folder: Path, centre: Centre, change: tuple[str, str], says: str
) -> None:
    before = (folder / "gateway.yaml").read_text()
    with running(folder):
        centre.order("c1", "configure", order_of(before.replace(*change)))
        answer = centre.answered("c1", 20)
        assert not answer.ok
        assert "rolled back" in answer.text
        assert says in answer.text
        assert (folder / "gateway.yaml").read_text() == before
        centre.order("a1", "log_level", {"level": "error"})
        assert centre.answered("a1").ok


WRONG = [
    (("behaviour: ask", "behavior: ask"), "gateway.yaml:8 drivers.bus-0.behavior: unknown field 'behavior'"),
    (("driver: scripted", "driver: modbus_rtv"), "did you mean 'modbus_rtu'?"),
    (("shard: 1", "shard: 2"), "only enrolment changes"),
    (("127.0.0.1", "mqtt.example.city"), "`tls` must be given"),
]


def test_a_wrong_configuration_changes_nothing(folder: Path, centre: Centre) -> None:
    before = (folder / "gateway.yaml").read_text()
    with running(folder) as box:
        for number, (change, says) in enumerate(WRONG):
            centre.order(f"c{number}", "configure", order_of(before.replace(*change)))
            answer = centre.answered(f"c{number}")
            assert not answer.ok
            assert says in answer.text
        assert box.counters.values["connections_total"] == 1, "nothing was restarted"
    assert (folder / "gateway.yaml").read_text() == before
    assert not (folder / "gateway.yaml.previous").exists()


@pytest.mark.parametrize("reached", ["trial", "current", "answered", "crashes"])
def test_a_power_cut_during_a_trial_ends_in_one_state(
    folder: Path, centre: Centre, mosquitto: int, reached: str
) -> None:
    """What is on disk at each moment of a configure, made as it would lie there, then a start."""
    before = (folder / "gateway.yaml").read_text()
    text = before.replace("hyd-1", "hyd-2")
    known = Orders(folder / "orders.json", Counters("gateway"))
    known.start()
    assert known.take(msgspec.json.encode(Order("c1", "configure", order_of(text), LATER)), 1) is not None
    store = Store(folder)
    trial = Trial("c1", hashlib.sha256(text.encode()).hexdigest(), 0.5, starts=3 if reached == "crashes" else 0)
    (folder / "gateway.yaml.previous").write_text(before)
    (folder / "trial.json").write_bytes(msgspec.json.encode(trial))
    if reached != "trial":
        (folder / "gateway.yaml").write_text(text)
    if reached == "answered":
        known.answered("c1", False, "rolled back: it did not work", 1)
    with running(folder):
        centre.order("c1", "configure", order_of(text))
        answer = centre.answered("c1", 15)
    assert answer.ok == (reached == "current")
    assert (folder / "gateway.yaml").read_text() == (text if reached == "current" else before)
    assert store.trial() is None


def test_what_was_interrupted_is_answered_and_not_done_again(tmp_path: Path) -> None:
    payload = msgspec.json.encode(Order("r1", "restart_driver", {"driver": "bus-0"}, LATER))
    first = Orders(tmp_path / "orders.json", Counters("gateway"))
    first.start()
    assert first.take(payload, 1) is not None
    again = Orders(tmp_path / "orders.json", Counters("gateway"))
    again.start()
    assert [(one.id, one.ok, one.text) for one in again.replies()] == [("r1", False, INTERRUPTED)]
    assert again.take(payload, 1) is None


def test_an_order_that_cannot_be_remembered_is_not_done(tmp_path: Path) -> None:
    files = Filling()
    known = Orders(tmp_path / "orders.json", Counters("gateway"), files)
    known.start()
    files.full = True
    payload = msgspec.json.encode(Order("r1", "restart_driver", {"driver": "bus-0"}, LATER))
    assert known.take(payload, 1) is None
    assert "not done" in known.replies()[0].text
    files.full = False
    assert known.take(payload, 1) is not None, "the disk has room again, and nothing had been done"


def test_many_orders_are_remembered_within_bounds(tmp_path: Path) -> None:
    known = Orders(tmp_path / "orders.json", Counters("gateway"))
    known.start()
    for number in range(300):
        known.take(msgspec.json.encode(Order(f"n{number}", "log_level", {}, LATER)), 1)
        known.answered(f"n{number}", True, "", 1)
        known.sent(f"n{number}")
    assert known.answer_of("n299") is not None
    assert known.answer_of("n0") is None


@pytest.mark.parametrize("payload", [b"", b"[]", b'{"id":"x"}', b'{"id":"","ok":true}', b'{"id":"x y","ok":true}'])
def test_a_malformed_reply_is_refused(payload: bytes) -> None:
    with pytest.raises(WireError):
        decode_answer(payload)
    with pytest.raises(WireError):
        decode_order(payload)


# --- at the centre ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seeded]:
    made = seeded(tmp_path_factory.mktemp("site"))
    for writer in made.writers:
        writer.close()
    with service(made, "desk"), process(made.layout, "api", ready=made.url + "/healthz"):
        eventually((made.layout.run / "desk.heartbeat.json").exists, 20)
        yield made


@contextmanager
def service(site: Seeded, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    argv = [sys.executable, "-m", "citybrain", *words, "--data", str(site.layout.root)]
    with (site.layout.root / f"{words[0]}.log").open("ab") as log:
        started = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        yield started
    finally:
        end(started)


@pytest.fixture
def api(site: Seeded) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=site.url, trust_env=False, timeout=20, headers={"X-Actor": "wang"}) as client:
        yield client


def ask(api: httpx.Client, gateway: str, what: str, body: dict[str, Any], **more: Any) -> str:
    wanted = {"what": what, "body": body, "reason": "a test", **more}
    answer = api.post(f"/v1/gateways/{gateway}/commands", json=wanted)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["command"])


def state_of(api: httpx.Client, gateway: str, order: str) -> dict[str, Any]:
    items = api.get(f"/v1/gateways/{gateway}/commands").json()["items"]
    return next((item for item in items if item["command"] == order), {"state": "pending"})


def test_an_order_comes_back_answered_though_everybody_is_killed_in_between(
    site: Seeded, api: httpx.Client, mosquitto: int, tmp_path: Path
) -> None:
    gateway = next(one for one in site.district.registry.gateways if one.id == "gw-02")
    box_folder = tmp_path / "box"
    box_folder.mkdir()
    (box_folder / "gateway.yaml").write_text(config_text(mosquitto, gateway=gateway.id, shard=gateway.shard))
    order = ask(api, gateway.id, "log_level", {"level": "debug"})
    eventually(lambda: state_of(api, gateway.id, order)["state"] == "asked", what="the desk's row")
    box = Process(box_folder)
    try:
        box.wait_online()
        with service(site, "ingest", "--port", str(mosquitto)) as ingest:
            eventually(lambda: "order " + order in box.said(), 20, "the order at the box")
            ingest.send_signal(signal.SIGKILL)
        box.process.kill()
        box.process.wait(10)
        box = Process(box_folder)
        with service(site, "ingest", "--port", str(mosquitto)):
            eventually(lambda: state_of(api, gateway.id, order)["state"] == "done", 30, "the answer in the row")
        found = state_of(api, gateway.id, order)
        assert (found["actor"], found["reason"], found["what"]) == ("wang", "a test", "log_level")
        assert found["answer"] == "log level debug until the next restart"
        assert box.said().count(f"order {order}: log_level") == 1, "done once"
        assert not list(Mailbox(site.layout.mailbox("orders")).folder.glob("*.json")), "nobody is asked any more"
    finally:
        box.stop()


def test_the_command_line_waits_for_the_answer(site: Seeded, api: httpx.Client) -> None:
    argv = ["devices", "order", "gw-02", "restart_driver", "--reason", "noise", "--wait", "1", "--json"]
    ran = subprocess.run(
        [sys.executable, "-m", "citybrain", *argv, "--data", str(site.layout.root)], capture_output=True, check=False
    )
    told = json.loads(ran.stdout)
    assert (told["state"], ran.returncode) == ("asked", 0)
    assert state_of(api, "gw-02", told["command"])["state"] == "asked"


@pytest.mark.parametrize(
    ("gateway", "wanted", "status"),
    [
        ("gw-99", {"what": "sample", "reason": "x"}, 404),
        ("gw-02", {"what": "dance", "reason": "x"}, 422),
        ("gw-02", {"what": "sample", "reason": ""}, 422),
        ("gw-02", {"what": "sample", "reason": "x", "within_s": 1e9}, 422),
    ],
)
def test_what_is_no_order_is_refused(api: httpx.Client, gateway: str, wanted: dict[str, Any], status: int) -> None:
    assert api.post(f"/v1/gateways/{gateway}/commands", json=wanted).status_code == status


# --- at the desk --------------------------------------------------------------------------------------------------


@pytest.fixture
def city(tmp_path: Path) -> Iterator[City]:
    made = City(tmp_path)
    made.step(0)
    yield made
    made.close()


def wanted(**changed: Any) -> dict[str, Any]:
    return {"gateway": "gw-0", "what": "sample", "until": T0 + 60_000, "body": {"device": "hyd-0"}, **changed}


def test_an_order_is_journalled_sent_and_answered_once(city: City) -> None:
    assert city.command("o1", "gateway_order", wanted(), "what does it say").startswith("applied")
    city.step(1000)
    ((_, sent),) = Mailbox(city.layout.mailbox("orders")).take()[0]
    assert (sent.kind, sent.body["order"], sent.body["gateway"], sent.body["what"]) == ("order", "o1", "gw-0", "sample")
    answer = {"order": "o1", "gateway": "gw-0", "ok": True, "text": "0.31", "at": T0}
    assert city.command("reply-o1", "order_answered", answer, at=2000).startswith("applied")
    assert city.command("reply-again", "order_answered", {**answer, "ok": False}, at=3000).startswith("applied")
    row = city.one(orders)
    assert (row["state"], row["answer"], row["answered_at"]) == ("done", "0.31", T0 + 2000)
    assert (row["actor"], row["reason"]) == ("wang", "what does it say")
    again = open_store(city.layout.root / "again.db")
    fresh = city.make_desk(again)
    fresh.start()
    replay(city.store, fresh)
    assert rows_of(again, orders) == city.rows(orders)
    again.dispose()


@pytest.mark.parametrize(
    ("changed", "reason", "says"),
    [
        ({"gateway": "gw-99"}, "x", "not in the registry"),
        ({"what": "dance"}, "x", "expected one of configure"),
        ({}, " ", "it needs a reason"),
        ({"until": T0 - 1}, "x", "within the next 7 days"),
        ({"until": T0 + 8 * 86_400_000}, "x", "within the next 7 days"),
        ({"body": {"config": "x" * 200_000}}, "x", "at most 102400 are taken"),
        ({"until": "soon"}, "x", "body of 'gateway_order'"),
    ],
)
def test_the_desk_refuses_what_is_no_order(city: City, changed: dict[str, Any], reason: str, says: str) -> None:
    said = city.command("o1", "gateway_order", wanted(**changed), reason)
    assert said.startswith("refused")
    assert says in said
    assert city.rows(orders) == []


def test_an_answer_of_another_gateway_is_refused(city: City) -> None:
    city.command("o1", "gateway_order", wanted(), "x")
    answer = {"order": "o1", "gateway": "gw-1", "ok": True, "text": "", "at": T0}
    assert "no such order" in city.command("reply-o1", "order_answered", answer)
    assert city.one(orders)["state"] == "asked"


# --- at ingest ----------------------------------------------------------------------------------------------------


def under(layout: Layout, order: str = "o1", until: int = LATER, shard: int = 1) -> Under:
    body = {"order": order, "gateway": "gw-02", "shard": shard, "what": "sample", "body": {}, "until": until}
    Mailbox(layout.mailbox("orders")).put(Command(f"ledger-{order}", "order", "wang", 1, body))
    return Under(layout, (1,), Counters("ingest"))


def test_an_order_is_published_when_it_appears_and_at_each_birth(tmp_path: Path) -> None:
    made = under(Layout(tmp_path))
    assert [where for where, _ in made.due(LATER - 1)] == ["cb/v1/1/gw-02/command"]
    assert made.due(LATER - 1) == []
    made.born("gw-01")
    assert made.due(LATER - 1) == []
    made.born("gw-02")
    assert len(made.due(LATER - 1)) == 1
    made.born("gw-02")
    assert len(made.due(LATER + 1000)) == 1, "it may have been done in time: whoever is born is asked"
    made.born("gw-02")
    assert made.due(LATER + 2 * 86_400_000) == []
    assert not list(Mailbox(Layout(tmp_path).mailbox("orders")).folder.glob("*.json")), "given up, and counted"


def test_orders_of_other_shards_stay_for_their_ingest(tmp_path: Path) -> None:
    assert under(Layout(tmp_path), shard=0).due(1) == []


def test_only_the_gateway_that_was_asked_may_answer_and_once(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    counters = Counters("ingest")
    under(layout)
    made = Under(layout, (1,), counters)
    made.due(1)
    answer = msgspec.json.encode(Answer("o1", True, "well", 5))
    made.reply("cb/v1/1/gw-03/reply", answer, 1)
    made.reply("cb/v1/1/gw-02/reply", b"{", 1)
    assert not Mailbox(layout.mailbox("desk")).take()[0]
    made.reply("cb/v1/1/gw-02/reply", answer, 1)
    made.reply("cb/v1/1/gw-02/reply", answer, 2)
    assert [one.body["text"] for _, one in Mailbox(layout.mailbox("desk")).take()[0]] == ["well"]
    assert counters.values["dropped_total{reason=reply_unasked}"] == 2
    assert counters.values["dropped_total{reason=reply_malformed}"] == 1
    assert counters.values["replies_total"] == 1
