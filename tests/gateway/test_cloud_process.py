"""The real `citybrain cloud` between a real client, a real broker and real ingest, also when it is killed."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import yaml

from citybrain.clock import wait_s
from citybrain.counters import Counters
from citybrain.model import Reading
from gateway.clouds.config import read_keys
from gateway.clouds.operators import Peer
from simulators.cloud import NAME, Client, Habits, Operator, PullServer, contract, message_of
from simulators.cloud_book import Book
from tests.cloud_site import DEVICES, CloudSite, imei, message, registry
from tests.conftest import eventually, unused_port

SPEED = 60.0  # a pull a second
FAST_SPEED = 90.0
CALM_SPEED = 30.0  # 90 s are three heartbeats
ROUNDS, ROUND_DEVICES, KILLS = 150, 12, 5


@pytest.fixture
def site(tmp_path: Path) -> Iterator[CloudSite]:
    """A broker, ingest with the registry in force, and the intake; half an hour passes in a minute."""
    yield from running(CloudSite(tmp_path, speed=CALM_SPEED))


def running(made: CloudSite) -> Iterator[CloudSite]:
    try:
        made.start_broker()
        made.provision()
        made.start("ingest")
        eventually(lambda: made.layout.read_active() is not None, 60, "the registry in force")
        made.start("cloud")
        yield made
    finally:
        made.stop()


def test_what_is_pushed_is_in_the_log_once(site: CloudSite) -> None:
    client, now_ms = site.client(), site.run.clock.now_ms()
    batch = [message(imei(0), now_ms - 1000, water_pressure=310, battery={"voltage": 3.6}, tilt=1.5)]
    status, body, _ = client.post(batch)
    assert (status, body["accepted"], body["repeated"]) == (200, 1, 0)
    for _ in range(3):
        assert client.post(batch)[1]["repeated"] == 1
    eventually(lambda: len(site.logged()) == 3, what="three values in the log")
    at_ms = now_ms - 1000
    wanted = {
        (imei(0), "pressure_mpa", at_ms, 0.31),
        (imei(0), "battery_v", at_ms, 3.6),
        (imei(0), "tilt_deg", at_ms, 1.5),
    }
    eventually(site.drained, what="everything acknowledged")
    assert site.logged() == dict.fromkeys(wanted, 1)
    client.close()


def test_ingest_has_its_rules_for_odd_readings(site: CloudSite) -> None:
    """A clock in the future is set back there, an unknown device waits in quarantine there."""
    client, now_ms = site.client(), site.run.clock.now_ms()
    assert client.post([message(imei(0), now_ms + 24 * 3_600_000, water_pressure=310)])[1]["accepted"] == 1
    assert client.post([message("nobody-knows", now_ms, water_pressure=310)])[1]["accepted"] == 1
    eventually(lambda: len(site.logged()) == 1)
    ((device, _, at_ms, _),) = site.logged()
    assert device == imei(0)
    assert at_ms <= site.run.clock.now_ms() + 60_000
    eventually(lambda: site.counted("quarantined_total", "ingest") == 1)
    client.close()


def test_a_dead_cloud_has_no_time(site: CloudSite) -> None:
    """Vitals go up while the operator pushes, 90 s longer, and not for one who never did."""
    client = site.client()
    assert client.post([])[0] == 200
    pushed_ms = site.run.clock.now_ms()
    eventually(lambda: site.gauge("alive{operator=ctwing}") == 1)
    eventually(lambda: site.gauge("alive{operator=ctwing}") == 0, what="90 s without a sign of life")
    eventually(site.drained)
    vitals = site.vitals()
    assert set(vitals) == {"cloud-0"}
    assert pushed_ms < max(vitals["cloud-0"]) <= pushed_ms + 90_000
    until_ms = site.run.clock.now_ms() + 60_000
    eventually(lambda: site.run.clock.now_ms() > until_ms)
    assert site.vitals() == vitals, "its time stands still"
    assert client.post([])[0] == 200
    eventually(lambda: len(site.vitals()["cloud-0"]) > len(vitals["cloud-0"]), what="time goes on")
    client.close()


def test_the_death_of_a_cloud_is_told_once_and_nothing_else(tmp_path: Path) -> None:
    """The devices behind it would be silent after five minutes of their time, and have none."""
    site = CloudSite(tmp_path, speed=FAST_SPEED)
    try:
        site.start_broker()
        site.provision()
        site.start("ingest")
        eventually(lambda: site.layout.read_active() is not None, 60)
        site.start("worker")
        site.start("cloud")
        client = site.client()
        own = range(0, DEVICES - 1, 2)
        until_ms = site.run.clock.now_ms() + 4 * 60_000
        while (now_ms := site.run.clock.now_ms()) < until_ms:
            assert client.post([message(imei(n), now_ms, water_pressure=310) for n in own])[0] == 200
            wait_s(0.05)
        client.close()
        offline, died_ms = ("gateway_offline", "cloud-0"), now_ms
        eventually(lambda: site.raised(died_ms)[offline], 30, "the cloud's death told")
        until_ms = site.run.clock.now_ms() + 10 * 60_000
        eventually(lambda: site.run.clock.now_ms() > until_ms, 30, "ten more minutes")
        eventually(lambda: site.gauge("lag_s", "worker") < 1, 30)
        assert site.raised(died_ms)[offline] == 1
        assert {rule for rule, _ in site.raised(0)} == {"gateway_offline"}
    finally:
        site.stop()


# --- with an operator that loses, repeats and delays ---


class Lossy:
    """The simulated operator, with readings of the test's own; it serves the pull and pushes in this process."""

    def __init__(self, site: CloudSite, seed: int) -> None:
        habits = Habits(lost=0.2, repeated=0.2, delayed=0.1, reordered=0.2, delay_ms=60_000, outages=0.0)
        self.book = Book(site.folder / "operator")
        self.book.start()
        self.operator = Operator(self.book, seed, habits, Counters("operator"))
        configured = site.clouds.operators[NAME]
        self.client = Client(site.run.host, site.run.cloud_port, read_keys(site.layout.secrets, configured))
        self.server = PullServer(site.run, self.operator, Peer(NAME, configured, site.layout.secrets))
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.told: set[tuple[str, int, str, float]] = set()
        self._clock = site.run.clock
        self._random = random.Random(seed)

    def tell(self) -> None:
        """Devices report, some of them an older value."""
        now_ms = self._clock.now_ms()
        readings = []
        for number in range(ROUND_DEVICES):
            at_ms = now_ms - self._random.choice((0, 0, 0, 5_000, 3_600_000)) - number
            reading = Reading(imei(number), at_ms, {"pressure_mpa": round(self._random.uniform(0.2, 0.4), 4)})
            if self._random.random() < 0.1:
                reading = Reading(imei(number), at_ms, {"tilt_deg": 1.0})
            readings.append(reading)
            self.told.update((reading.device, at_ms, name, value) for name, value in reading.values.items())
        self.operator.told([message_of(reading) for reading in readings], now_ms)
        self.push()

    def push(self) -> bool:
        """Push what is due; return whether nothing is left."""
        now_ms = self._clock.now_ms()
        while (batch := self.operator.due(now_ms)) is not None:
            self.operator.pushed(batch, self.client.push(batch), now_ms)
        return not self.operator.queued

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.client.close()
        self.book.close()


@pytest.fixture
def agreed(tmp_path: Path) -> Iterator[CloudSite]:
    """The same, with the simulated operator's contract."""
    port = unused_port()
    run = msgspec.structs.replace(CloudSite(tmp_path / "unused").run, operator_port=port)
    made = CloudSite(tmp_path, yaml.safe_dump(contract(registry(), run)), SPEED, operator_port=port)
    yield from running(made)


def test_what_a_lossy_operator_tells_is_logged_once_although_the_intake_is_killed(agreed: CloudSite) -> None:
    """A fifth of the pushes is lost, a fifth repeated, and kill -9 hits the intake five times while it is pushed to."""
    lossy = Lossy(agreed, 11)
    done = threading.Event()

    def tell() -> None:
        for _ in range(ROUNDS):
            lossy.tell()
            wait_s(0.02)
        done.set()

    telling = threading.Thread(target=tell)
    telling.start()
    moments = random.Random(5)
    for _ in range(KILLS):
        wait_s(moments.uniform(0.1, 0.5), done)  # when it is hit is up to the seed
        agreed.kill("cloud")
        agreed.start("cloud")
    telling.join(60)
    assert done.is_set()
    eventually(lossy.push, 30, "everything pushed or given up")
    wanted = {(device, metric, at_ms, value): 1 for device, at_ms, metric, value in lossy.told}
    eventually(lambda: len(agreed.logged()) >= len(wanted), 60, "everything in the log")
    eventually(agreed.drained, 30)
    assert agreed.logged() == wanted
    assert len(wanted) > ROUNDS * ROUND_DEVICES * 0.99
    assert agreed.counted("recovered_total") > 0
    assert agreed.counted("repeated_total") > 0
    assert lossy.operator.counters.values["unpushed_total{reason=lost}"] > 0
    lossy.close()
