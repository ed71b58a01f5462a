"""The real `citybrain ingest` on a real mosquitto, also when either is killed; and the MQTT client under it."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import paho.mqtt.client as paho
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paho.mqtt.enums import CallbackAPIVersion

from citybrain import wire
from citybrain.clock import RunClock, real_unix_ms
from citybrain.counters import Heartbeat
from citybrain.errors import ConfigError, ProtocolError, Unavailable, UsageError
from citybrain.layout import Layout, Run
from citybrain.mailbox import Command, Mailbox, command
from citybrain.model import Device, Gateway, Place, Reading, Registry
from citybrain.segments import Reader
from citybrain.storage import OS_FILES
from streams.log import Control, Kind, Tick, decode_control, decode_tick, frame_head
from streams.registry import encode_registry
from streams.runtimes import mqtt
from streams.runtimes.broker import mosquitto as find_mosquitto
from streams.runtimes.broker import mosquitto_configuration
from streams.runtimes.ingest import control_of, parse_shards
from streams.runtimes.supervisor import accepts
from tests.conftest import end, eventually

PLACE = Place(121.5, 31.2, "310104001001001")
REGISTRY = Registry(
    (Gateway("gw-a", 0, PLACE), Gateway("gw-b", 1, PLACE)),
    (
        Device("hyd-1", "hydrant", "gw-a", PLACE, ("pressure_mpa",)),
        Device("hyd-2", "hydrant", "gw-b", PLACE, ("pressure_mpa",)),
    ),
)
SPEED = 20.0  # ticks every 0.25 s


class Site:
    """A data folder, a broker and ingest, each to be killed and started again."""

    def __init__(self, folder: Path, port: int) -> None:
        now_ms = real_unix_ms()
        self.folder = folder
        self.port = port
        self.layout = Layout(folder / "data")
        self.layout.make()
        self.clock = RunClock(now_ms, now_ms, SPEED)
        self.layout.write_run(Run(clock=self.clock, shards=2, mqtt_port=port))
        self.broker: subprocess.Popen[bytes] | None = None
        self.ingest: subprocess.Popen[bytes] | None = None

    def start_broker(self) -> None:
        program = find_mosquitto()
        assert program is not None, "mosquitto is not installed: apt-get install mosquitto (or run .ci/run)"
        path = self.folder / "mosquitto.conf"
        path.write_text(mosquitto_configuration(self.port))
        with (self.folder / "mosquitto.log").open("ab") as log:
            self.broker = subprocess.Popen([program, "-c", str(path)], stdout=log, stderr=log)
        eventually(lambda: accepts("127.0.0.1", self.port), what="mosquitto listening")

    def start_ingest(self) -> None:
        command_line = [sys.executable, "-m", "citybrain", "ingest", "--data", str(self.layout.root)]
        with (self.folder / "ingest.log").open("ab") as log:
            self.ingest = subprocess.Popen(command_line, stdout=log, stderr=log)
        pid = self.ingest.pid
        eventually(lambda: (beat := self.beat()) is not None and beat.pid == pid, 60, "ingest alive")

    def send_command(self, kind: str, **body: object) -> None:
        Mailbox(self.layout.mailbox("ingest")).put(command(kind, "test", self.clock.now_ms(), body))

    def provision(self) -> None:
        self.send_command("registry", content=self.layout.put_blob(encode_registry(REGISTRY)))

    def beat(self) -> Heartbeat | None:
        path = self.layout.run / "ingest.heartbeat.json"
        return msgspec.json.decode(path.read_bytes(), type=Heartbeat) if path.exists() else None

    def counted(self, name: str) -> int:
        beat = self.beat()
        return 0 if beat is None else beat.counters.get(name, 0)

    def connected(self) -> bool:
        beat = self.beat()
        return beat is not None and beat.gauges.get("connected") == 1

    def frames(self) -> Counter[tuple[int, int]]:
        """Return how often each (gateway number, seq) stands in the log."""
        found: Counter[tuple[int, int]] = Counter()
        for shard in (0, 1):
            for record in Reader(self.layout.log(shard)):
                if record.kind == Kind.FRAME:
                    head = frame_head(record.payload)
                    found[head.gateway, head.seq] += 1
        return found

    def controls(self) -> list[Control]:
        records = Reader(self.layout.log(0))
        return [decode_control(record.payload) for record in records if record.kind == Kind.CONTROL]

    def ticks(self) -> list[Tick]:
        return [decode_tick(record.payload) for record in Reader(self.layout.log(0)) if record.kind == Kind.TICK]

    def stop(self) -> None:
        for process in (self.ingest, self.broker):
            if process is not None:
                end(process)


@pytest.fixture
def site(tmp_path: Path, free_port: int) -> Iterator[Site]:
    """A broker and ingest, provisioned and connected."""
    made = Site(tmp_path, free_port)
    try:
        made.start_broker()
        made.provision()
        made.start_ingest()
        eventually(lambda: made.connected() and made.counted("commands_total"), what="ingest connected")
        yield made
    finally:
        made.stop()


class Sender:
    """A gateway on another MQTT library: it resends behind the last acknowledgement until all is acknowledged."""

    def __init__(self, site: Site, gateway: str, shard: int, device: str) -> None:
        self.site, self.gateway, self.shard, self.device = site, gateway, shard, device
        self.acked = 0
        self.heard = threading.Event()
        self.client = paho.Client(CallbackAPIVersion.VERSION2, client_id=gateway)
        self.client.reconnect_delay_set(1, 1)
        self.client.on_connect = lambda client, *_: client.subscribe(wire.topic(shard, gateway, "ack"), 0)
        self.client.on_message = self._message
        self.client.connect_async("127.0.0.1", site.port, 5)
        self.client.loop_start()

    def _message(self, _client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        ack = wire.decode_ack(bytes(message.payload))
        assert (ack.lane, ack.epoch) == ("telemetry", 9)
        self.acked = max(self.acked, ack.seq)
        self.heard.set()

    def publish(self, seq: int) -> None:
        at = self.site.clock.now_ms()
        body = wire.columns_body([Reading(self.device, 1_000 * (at // 10**6 * 10**3) + seq, {"pressure_mpa": 0.3})])
        payload = wire.columns_message(wire.Header(9, seq, self.acked + 1, at), body)
        self.client.publish(wire.topic(self.shard, self.gateway, "telemetry"), payload, 1)

    def drive(self, last: int) -> bool:
        """Send the next window, wait a moment; return whether everything up to `last` is acknowledged."""
        if self.acked < last:
            self.heard.clear()
            if self.client.is_connected():
                for seq in range(self.acked + 1, min(self.acked + 33, last + 1)):
                    self.publish(seq)
            self.heard.wait(0.2)
        return self.acked >= last

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@pytest.fixture
def senders(site: Site) -> Iterator[list[Sender]]:
    made = [Sender(site, "gw-a", 0, "hyd-1"), Sender(site, "gw-b", 1, "hyd-2")]
    yield made
    for sender in made:
        sender.close()


def drive_all(senders: list[Sender], last: int) -> bool:
    done = [sender.drive(last) for sender in senders]  # each of them, also behind one that is not done
    return all(done)


def test_messages_are_logged_acknowledged_and_counted(site: Site, senders: list[Sender]) -> None:
    eventually(lambda: drive_all(senders, 100), 30, "100 messages of each acknowledged")
    assert site.frames() == Counter({(gateway, seq): 1 for gateway in (0, 1) for seq in range(1, 101)})
    eventually(lambda: site.counted("accepted_total") == 200, what="the heartbeat")
    senders[0].client.publish(wire.topic(0, "gw-a", "status"), wire.encode_json(wire.Status(3, True, 5)), 1)
    senders[0].client.publish(wire.topic(0, "nobody", "telemetry"), b"{}", 1)
    senders[0].client.publish(wire.topic(0, "gw-a", "event"), b"x" * 700_000, 1)
    eventually(lambda: site.counted("dropped_total{reason=oversized}") == 1, what="the oversized one counted")
    eventually(lambda: site.counted("dropped_total{reason=unknown_gateway}") == 1, what="the stranger counted")
    beat = site.beat()
    assert beat is not None
    assert beat.details["gateways"]["gw-a"] == {"connection": 3, "online": True, "at": 5, "serial": "", "spool": ""}
    eventually(lambda: drive_all(senders, 110), what="and the rest goes on")


def test_it_stops_in_order(site: Site) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        assert site.ingest is not None
        site.ingest.send_signal(number)
        assert site.ingest.wait(2) == 0
        site.start_ingest()


def test_nothing_is_lost_or_repeated_when_either_is_killed(site: Site, senders: list[Sender]) -> None:
    assert site.ingest is not None
    assert site.broker is not None
    target = 0
    for kill_broker in (False, True, False):
        target += 150
        eventually(lambda: drive_all(senders, target - 100), 30, "acknowledged before the kill")  # noqa: B023
        for sender in senders:
            for seq in range(sender.acked + 1, sender.acked + 33):
                sender.publish(seq)  # in flight when it happens
        victim = site.broker if kill_broker else site.ingest
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait(5)
        site.start_broker() if kill_broker else site.start_ingest()
        eventually(lambda: drive_all(senders, target), 30, "acknowledged after the kill")  # noqa: B023
    frames = site.frames()
    assert {frames[gateway, seq] for gateway in (0, 1) for seq in range(1, target + 1)} == {1}
    assert set(frames.values()) == {1}


def test_ticks_stop_while_the_broker_is_away(site: Site) -> None:
    eventually(lambda: len(site.ticks()) >= 2, what="two ticks")
    before = site.ticks()[-1]
    assert before.at - site.ticks()[-2].at >= 5_000
    assert site.broker is not None
    os.kill(site.broker.pid, signal.SIGKILL)
    site.broker.wait(5)
    eventually(lambda: not site.connected(), what="the loss noticed")
    count = len(site.ticks())
    site.send_command("override", subject="hyd-1", rule="*", from_ms=1, until_ms=2)
    eventually(lambda: any(control.what == "override" for control in site.controls()), what="commands without a broker")
    assert len(site.ticks()) == count
    site.start_broker()
    eventually(lambda: len(site.ticks()) > count, what="a tick after it")
    assert site.ticks()[-1].up_since > before.at


def test_commands_go_into_the_log_or_are_kept_aside(site: Site) -> None:
    rules = site.layout.put_blob(b"[]")
    folder = site.layout.mailbox("ingest")
    site.send_command("ruleset", content=rules)
    site.send_command("ruleset", content="0" * 64)
    site.send_command("dance")
    OS_FILES.replace(folder / "000000000000000-x.json", b"{")
    eventually(lambda: not list(folder.glob("*.json")), what="an empty mailbox")
    eventually(lambda: site.counted("commands_total") == 2, what="the heartbeat")
    assert [control.content for control in site.controls() if control.what == "ruleset"] == [rules]
    assert len(list(folder.glob("*.refused"))) == 2
    assert len(list(folder.glob("*.broken"))) == 1
    beat = site.beat()
    assert beat is not None
    warnings = " ".join(beat.warnings)
    assert "no such content" in warnings
    assert "command" in warnings
    assert "expected one of registry, ruleset, override" in warnings
    active = site.layout.read_active()
    assert active is not None
    assert active.ruleset == rules


# --- without processes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        ("registry", {}, "content hash"),
        ("ruleset", {"content": 5}, "content hash"),
        ("override", {"subject": "x"}, "rule"),
        ("override", {"subject": "x", "rule": "*", "from_ms": 9, "until_ms": 8}, "from_ms <= until_ms"),
        ("override", {"subject": "x", "rule": "*", "from_ms": "1", "until_ms": 9}, "from_ms <= until_ms"),
        ("confirm", {}, "expected one of"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused(kind: str, body: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        control_of(Command("id", kind, "op", 1, body), 5)


def test_an_override_names_who_and_why() -> None:
    body = {"subject": "hyd-1", "rule": "*", "from_ms": 1, "until_ms": 9, "reason": "works", "actor": "li"}
    wanted = Control("override", 5, "li", "", "hyd-1", "*", 1, 9, "works")
    assert control_of(Command("id", "override", "op", 1, body), 5) == wanted


@pytest.mark.parametrize("given_", ["", "a", "1,,2", "-1"])
def test_shards_are_numbers(given_: str) -> None:
    with pytest.raises(UsageError, match="--shards"):
        parse_shards(given_, 2)
    assert parse_shards("1,0,1", 2) == [0, 1]
    assert parse_shards(None, 3) == [0, 1, 2]


@given(
    bodies=st.lists(st.binary(max_size=300) | st.integers(120, 20_000).map(bytes), max_size=12),
    cuts=st.lists(st.integers(0, 5000), max_size=30),
)
@settings(max_examples=200, deadline=None)
def test_packets_come_out_however_the_bytes_arrive(bodies: list[bytes], cuts: list[int]) -> None:
    data = b"".join(mqtt.packet(mqtt.PUBLISH << 4 | 2, body) for body in bodies)
    packets, at = mqtt.Packets(), 0
    found: list[mqtt.Packet] = []
    for cut in sorted(cut for cut in cuts if cut < len(data)):
        found += packets.feed(data[at:cut])
        at = cut
    found += packets.feed(data[at:])
    assert found == [(mqtt.PUBLISH, 2, body) for body in bodies]


@given(size=st.integers(mqtt.MOST_KEPT - 2, 3 * mqtt.MOST_KEPT), step=st.sampled_from([70_001, 400_000, 10**7]))
@settings(max_examples=20, deadline=None)
def test_a_huge_packet_is_cut_and_what_follows_it_is_whole(size: int, step: int) -> None:
    data = mqtt.packet(mqtt.PUBLISH << 4, b"h" * size) + mqtt.packet(mqtt.PUBACK << 4, b"\0\1")
    packets = mqtt.Packets()
    found: list[mqtt.Packet] = []
    for at in range(0, len(data), step):
        found += packets.feed(data[at : at + step])
        assert len(packets._rest) <= mqtt.MOST_KEPT + 8
    assert found == [(mqtt.PUBLISH, 0, b"h" * min(size, mqtt.MOST_KEPT)), (mqtt.PUBACK, 0, b"\0\1")]


def test_a_length_of_five_bytes_breaks_the_line() -> None:
    with pytest.raises(ProtocolError, match="four bytes"):
        list(mqtt.Packets().feed(b"\x30\xff\xff\xff\xff\x01"))


def test_a_link_talks_to_itself_through_a_real_broker(mosquitto: int) -> None:
    link = mqtt.Link("127.0.0.1", mosquitto, "one")
    link.open(["cb/v1/0/+/ack", "cb/v1/1/+/ack"])
    heard: list[tuple[str, bytes]] = []
    for n in range(500):
        link.publish(f"cb/v1/{n % 2}/gw/ack", struct.pack("<I", n))

    def all_heard() -> bool:
        link.flush()
        link.wait(0.05)
        heard.extend(link.receive())
        return len(heard) >= 500

    eventually(all_heard)
    assert sorted(heard) == sorted((f"cb/v1/{n % 2}/gw/ack", struct.pack("<I", n)) for n in range(500))
    link.close()
    with pytest.raises(Unavailable, match="not connected"):
        link.receive()


def test_a_silent_peer_is_given_up(free_port: int) -> None:
    """A listener that never answers, as a stopped broker does."""
    import socket

    with socket.create_server(("127.0.0.1", free_port)):
        link = mqtt.Link("127.0.0.1", free_port, "one")
        with pytest.raises(Unavailable, match="no answer"):
            link.open(["cb/v1/0/+/ack"], timeout_s=0.2)
        assert not link.is_open
    with pytest.raises(Unavailable, match="refused"):
        link.open(["cb/v1/0/+/ack"], timeout_s=0.2)


def test_a_broker_that_falls_silent_is_noticed(mosquitto: int) -> None:
    link = mqtt.Link("127.0.0.1", mosquitto, "one", keep_alive_s=2)
    link.open(["cb/v1/0/+/ack"])
    link._told_s -= 1.5
    link.keep_alive()  # asks, and hears
    heard_s = link._heard_s

    def answered() -> bool:
        link.wait(0.05)
        link.receive()
        return link._heard_s > heard_s

    eventually(answered)
    link._heard_s -= 4
    with pytest.raises(Unavailable, match="silent for"):
        link.keep_alive()
