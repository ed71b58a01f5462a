"""`citybrain ingest --log kafka` with a real mosquitto, a real gateway's spool and a real Kafka, any of them killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from citybrain import wire
from citybrain.clock import RunClock, real_unix_ms
from citybrain.counters import Counters, Heartbeat
from citybrain.errors import EXIT_UNAVAILABLE
from citybrain.layout import Layout, Run
from citybrain.mailbox import Mailbox, command
from citybrain.model import Device, Gateway, Lane, Place, Reading, Registry
from citybrain.segments import Record
from gateway.service import Broker, GatewayService
from gateway.spool import Spool
from gateway.uplink import Uplink
from streams.ingest import Ingest
from streams.log import Control, Kind, decode_control, frame_head
from streams.logs import records
from streams.registry import encode_registry
from streams.runtimes.kafka.store import KafkaStore
from tests.conftest import end, eventually
from tests.kafka_cluster import Cluster

PLACE = Place(121.5, 31.2, "310104001001001")
REGISTRY = Registry(
    (Gateway("gw-a", 1, PLACE),), (Device("hyd-1", "hydrant", "gw-a", PLACE, ("pressure_mpa",), ("tilt_deg",)),)
)


class Site:
    """A data folder, ingest as a process, and a gateway."""

    def __init__(self, folder: Path, mqtt_port: int, kafka: str, topic_prefix: str) -> None:
        self.folder = folder
        self.layout = Layout(folder / "data")
        self.layout.make()
        now_ms = real_unix_ms()
        self.layout.write_run(Run(clock=RunClock(now_ms, now_ms, 1.0), shards=2, mqtt_port=mqtt_port))
        self.kafka, self.prefix = kafka, topic_prefix
        self.process: subprocess.Popen[bytes] | None = None
        spool = Spool(folder / "gw-a", "board-1")
        spool.start()
        self.gateway = GatewayService(
            Uplink(spool, "gw-a", 1, timeout_s=1.0), "gw-a", 1, Broker("127.0.0.1", mqtt_port)
        )
        self.spooled = 0

    def provision(self) -> None:
        content = self.layout.put_blob(encode_registry(REGISTRY))
        Mailbox(self.layout.mailbox("ingest")).put(command("registry", "test", 1, {"content": content}))

    def start(self) -> None:
        argv = [sys.executable, "-m", "citybrain", "ingest", "--data", str(self.layout.root)]
        argv += ["--log", "kafka", "--kafka", self.kafka, "--topics", self.prefix]
        with (self.folder / "ingest.log").open("ab") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log)
        pid = self.process.pid
        eventually(lambda: self.alive(pid), 60, "ingest alive")

    def alive(self, pid: int) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "ingest.log").read_text()
        beat = self.beat()
        return beat is not None and beat.pid == pid

    def kill(self) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def beat(self) -> Heartbeat | None:
        path = self.layout.run / "ingest.heartbeat.json"
        return msgspec.json.decode(path.read_bytes(), type=Heartbeat) if path.exists() else None

    def gauge(self, name: str) -> float:
        beat = self.beat()
        return 0.0 if beat is None else beat.gauges.get(name, 0.0)

    def spool(self, count: int) -> None:
        for _ in range(count):
            self.spooled += 1
            self.gateway.spool.append(
                Lane.TELEMETRY, [Reading("hyd-1", self.spooled * 1000, {"pressure_mpa": 0.3})], self.spooled
            )
        self.gateway.spool.commit()

    @property
    def acked(self) -> int:
        return self.gateway.spool.floor(Lane.TELEMETRY) - 1

    def polled(self) -> bool:
        self.gateway.poll(0.02)
        return True

    def drive(self) -> None:
        eventually(lambda: self.polled() and self.acked == self.spooled, 60, "everything acknowledged")

    def records(self) -> list[Record]:
        reader, found = KafkaStore(self.kafka, self.layout, 2, prefix=self.prefix).reader("log", 1), list[Record]()
        while records := reader.read():
            found += records
        return found

    def frames(self) -> Counter[int]:
        return Counter(frame_head(record.payload).seq for record in self.records() if record.kind == Kind.FRAME)

    def close(self) -> None:
        self.gateway.close()
        if self.process is not None:
            end(self.process)


@pytest.fixture
def site(tmp_path: Path, mosquitto: int, mortal: Cluster, topic_prefix: str) -> Iterator[Site]:
    made = Site(tmp_path, mosquitto, mortal.address, topic_prefix)
    try:
        made.provision()
        made.start()
        yield made
    finally:
        made.close()


def test_what_is_acknowledged_is_in_kafka_once_whoever_is_killed(site: Site, mortal: Cluster) -> None:
    (broker,) = mortal.brokers
    site.spool(200)
    site.drive()
    site.spool(300)
    eventually(lambda: site.polled() and site.acked > 250)
    site.kill()  # ingest, with a window of messages on their way
    assert site.acked <= max(site.frames())
    for path in site.layout.blobs.iterdir():
        path.unlink()  # another machine takes over: registry and cursors come from Kafka
    site.start()
    site.drive()
    site.spool(300)
    eventually(lambda: site.polled() and site.acked > 550)
    broker.kill()
    eventually(lambda: site.polled() and site.gauge("log_waiting_s") > 0, what="ingest waiting for Kafka")
    before = site.acked
    for _ in range(20):
        site.polled()
    assert site.acked == before  # nothing is acknowledged that Kafka has not
    site.kill()  # both
    mortal.revive()
    site.start()
    site.drive()
    assert site.frames() == Counter(range(1, site.spooled + 1))
    offsets = [record.offset for record in site.records()]
    assert offsets == list(range(len(offsets)))
    controls = [decode_control(record.payload) for record in site.records() if record.kind == Kind.CONTROL]
    assert [control.what for control in controls].count("cursors") == 3  # one a life


def test_told_to_stop_while_kafka_is_away_it_stops_and_acknowledges_nothing(site: Site, mortal: Cluster) -> None:
    (broker,) = mortal.brokers
    site.spool(5)
    site.drive()
    broker.signal(signal.SIGSTOP)
    site.spool(5)
    eventually(lambda: site.polled() and site.gauge("log_waiting_s") > 0, what="ingest waiting for Kafka")
    assert site.process is not None
    site.process.send_signal(signal.SIGTERM)
    assert site.process.wait(20) == 5
    assert "nothing of it is acknowledged" in (site.folder / "ingest.log").read_text()
    assert site.acked == 5
    broker.signal(signal.SIGCONT)
    site.start()
    site.drive()
    assert site.frames() == Counter(range(1, 11))


# --- several ingests on one shared folder -----------------------------------------------------------------------------


def owned(*, adopted: bool) -> Registry:
    """Two gateways, one a shard; their devices are unknown until they are adopted."""
    gateways = tuple(Gateway(f"gw-{shard}", shard, PLACE) for shard in (0, 1))
    devices = [Device(f"hyd-{shard}", "hydrant", f"gw-{shard}", PLACE, ("pressure_mpa",)) for shard in (0, 1)]
    return Registry(gateways, tuple(devices) if adopted else ())


def test_ingests_of_different_shards_share_a_folder_and_its_quarantine(
    tmp_path: Path, kafka: str, topic_prefix: str
) -> None:
    layout = Layout(tmp_path)
    layout.make()
    store = KafkaStore(kafka, layout, 2, prefix=topic_prefix)
    store.open()
    names = [layout.put_blob(encode_registry(owned(adopted=adopted))) for adopted in (False, True)]
    ingests = [Ingest(layout, [shard], Counters(f"ingest-{shard}"), logs=store) for shard in (0, 1)]
    for one in ingests:
        one.start()
        one.control(Control("registry", 1, "test", names[0]), 1)
        one.commit()
    for seq in range(1, 31):  # in turn, as two machines would
        for shard, one in enumerate(ingests):
            header = wire.Header(1, seq, 1, 1000)
            body = wire.json_body([Reading(f"hyd-{shard}", seq * 1000, {"pressure_mpa": 0.3})])
            one.message(wire.topic(shard, f"gw-{shard}", "telemetry"), wire.json_message(header, body), 1000)
            one.commit()
    for one in ingests:
        assert one.counters.gauges["quarantined"] == 30
    ingests[0].close()
    again = Ingest(layout, [0], Counters("ingest-0"), logs=store)  # one begins anew beside the other
    again.start()
    for one in (again, ingests[1]):
        one.control(Control("registry", 2000, "test", names[1]), 2000)
        one.commit()
        assert (one.counters.values["replayed_total"], one.counters.gauges["quarantined"]) == (30, 0)
        one.close()
    for shard in (0, 1):
        found = [record.payload for record in records(store.reader("log", shard)) if record.kind == Kind.FRAME]
        assert sum(frame_head(payload).values for payload in found) == 30


def test_a_second_ingest_on_a_shard_is_refused(site: Site) -> None:
    argv = [sys.executable, "-m", "citybrain", "ingest", "--data", str(site.layout.root), "--shards", "1"]
    argv += ["--log", "kafka", "--kafka", site.kafka, "--topics", site.prefix]
    second = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert second.returncode == EXIT_UNAVAILABLE
    assert "another ingest has shard 1" in second.stderr
    site.spool(5)
    site.drive()  # and hurts nobody
