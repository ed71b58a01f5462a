"""The gateway's service against a real broker: births and wills, losing and finding it, and how much paho may hold."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from citybrain.clock import monotonic_s
from citybrain.model import Lane, Reading
from citybrain.wire import (
    LANES,
    WINDOW_MESSAGES,
    About,
    Ack,
    Status,
    decode_status,
    encode_json,
    open_message,
    parse_topic,
    readings_of,
    topic,
)
from gateway.service import Broker, GatewayService, poll_all
from gateway.spool import Spool
from gateway.uplink import HANDED_OVER, Uplink
from streams.runtimes.broker import mosquitto as find_mosquitto
from streams.runtimes.broker import mosquitto_configuration
from streams.runtimes.supervisor import accepts
from tests.conftest import end, eventually
from tests.protocol import model

T, E = Lane.TELEMETRY, Lane.EVENT


class Answering:
    """The platform's end of the wire on a real broker: the model's ingest in paho's thread."""

    def __init__(self, port: int, *, answer: bool = True) -> None:
        self.statuses: list[tuple[str, Status]] = []
        self.received: list[tuple[str, Lane, int]] = []
        self.readings: list[Reading] = []  # of what was taken, in its order
        self.by_gateway: dict[str, list[Reading]] = {}
        self.ingest: dict[tuple[str, Lane], model.Ingest] = {}
        self.answer = answer
        self._subscribed = threading.Event()
        self._client = paho.Client(CallbackAPIVersion.VERSION2, "platform")
        self._client.reconnect_delay_set(1, 1)
        self._client.on_connect = lambda client, *_: client.subscribe("cb/v1/+/+/#", qos=1)
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = lambda _client, _data, message: self._take(message.topic, bytes(message.payload))
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        assert self._subscribed.wait(10)

    def _take(self, where: str, payload: bytes) -> None:
        shard, gateway, channel = parse_topic(where)
        if channel == "status":
            self.statuses.append((gateway, decode_status(payload)))
        if channel not in LANES:
            return
        lane, message = LANES[channel], open_message(payload)
        head = message.header
        self.received.append((gateway, lane, head.seq))
        if not self.answer:
            return
        sent = model.Sent(head.epoch, head.seq, head.floor, str(message.checksum))
        ingest, answer = model.take(self.ingest.get((gateway, lane), model.Ingest()), sent)
        if len(ingest.log) > len(self.ingest.get((gateway, lane), model.Ingest()).log) and lane is not Lane.BLOB:
            taken = readings_of(message)
            self.readings += taken
            self.by_gateway.setdefault(gateway, []).extend(taken)
        self.ingest[gateway, lane] = ingest
        if answer is not None:
            ack = encode_json(Ack(channel, answer.epoch, answer.seq))
            self._client.publish(topic(shard, gateway, "ack"), ack, qos=1)

    def logged(self, gateway: str, lane: Lane) -> list[int]:
        return [one.seq for one in self.ingest.get((gateway, lane), model.Ingest()).log]

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
def platform(mosquitto: int) -> Iterator[Answering]:
    answering = Answering(mosquitto)
    yield answering
    answering.close()


def opened(folder: Path, port: int, gateway: str = "gw-1", password: str | None = None) -> GatewayService:
    spool = Spool(folder / gateway, "board-1")
    spool.start()
    broker = Broker("127.0.0.1", port, gateway if password else None, password)
    return GatewayService(Uplink(spool, gateway, 3, timeout_s=0.5), gateway, 3, broker)


def fill(service: GatewayService, count: int, lane: Lane = T) -> None:
    for number in range(count):
        service.spool.append(lane, [Reading("d", number, {"value": float(number)})], number)
    service.spool.commit()


def polled(service: GatewayService) -> bool:
    service.poll(0.01)
    return True


def drive(*services: GatewayService, within_s: float = 15.0) -> None:
    """Poll until everything spooled is acknowledged."""

    def idle() -> bool:
        poll_all(services, 0.02)
        return all(service.ready and service.uplink.idle() for service in services)

    eventually(idle, within_s, "an empty spool")


def test_what_is_spooled_arrives_once_in_order_and_is_freed(
    tmp_path: Path, mosquitto: int, platform: Answering
) -> None:
    service = opened(tmp_path, mosquitto)
    fill(service, 300)
    fill(service, 5, E)
    drive(service)
    assert platform.logged("gw-1", T) == list(range(1, 301))
    assert platform.logged("gw-1", E) == [1, 2, 3, 4, 5]
    assert len(platform.received) == 305
    assert service.uplink.counters.values["acked_total"] == 305
    service.close()


def test_birth_and_farewell_carry_the_connection_and_the_board(
    tmp_path: Path, mosquitto: int, platform: Answering
) -> None:
    service = opened(tmp_path, mosquitto)
    drive(service)
    eventually(lambda: polled(service) and len(platform.statuses) == 1)
    service.close()
    eventually(lambda: len(platform.statuses) == 2)
    (gateway, birth), (_, farewell) = platform.statuses
    assert (gateway, birth.online, birth.serial, birth.connection) == (
        "gw-1",
        True,
        "board-1",
        service.spool.connection,
    )
    assert (farewell.online, farewell.connection) == (False, birth.connection)
    again = opened(tmp_path, mosquitto)
    eventually(lambda: polled(again) and len(platform.statuses) == 3)
    assert platform.statuses[-1][1].connection > birth.connection
    again.close()


def test_what_a_box_says_of_itself_is_told_with_its_birth_and_when_it_changes(
    tmp_path: Path, mosquitto: int, platform: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.service.TELL_LEAST_S", 0.2)
    service = opened(tmp_path, mosquitto)
    service.tell(About("0.1.0", "ab" * 32))
    drive(service)
    eventually(lambda: polled(service) and len(platform.statuses) == 1)
    assert platform.statuses[0][1].about == About("0.1.0", "ab" * 32)
    service.tell(About("0.1.0", "ab" * 32, {"meters": "no such port"}))
    eventually(lambda: polled(service) and len(platform.statuses) == 2)
    again = platform.statuses[1][1]
    assert (again.online, again.connection, again.about.failing) == (
        True,
        service.spool.connection,
        {"meters": "no such port"},
    )
    service.tell(About("0.1.0", "ab" * 32, {"meters": "no such port"}))
    service.close()
    eventually(lambda: len(platform.statuses) >= 3)
    assert [status.online for _, status in platform.statuses] == [True, True, False], "what has not changed is not told"


def test_a_cut_line_leaves_the_will_and_the_backlog_follows(
    tmp_path: Path, mosquitto: int, platform: Answering
) -> None:
    service = opened(tmp_path, mosquitto)
    fill(service, 3)
    eventually(lambda: polled(service) and len(platform.statuses) == 1 and service.uplink.idle())
    service.cut()
    eventually(lambda: [status.online for _, status in platform.statuses] == [True, False])
    assert platform.statuses[0][1].connection == platform.statuses[1][1].connection
    fill(service, 50)
    for _ in range(5):
        service.poll(0.01)
    assert not service.ready
    assert platform.logged("gw-1", T) == [1, 2, 3]
    service.restore()
    drive(service)
    assert platform.logged("gw-1", T) == list(range(1, 54))
    eventually(lambda: polled(service) and len(platform.statuses) == 3)
    assert platform.statuses[2][1].connection > platform.statuses[1][1].connection
    service.close()


def test_a_new_connection_starts_with_nothing_of_the_old_one(tmp_path: Path, mosquitto: int) -> None:
    """Paho sends its unconfirmed messages again by itself: messages would arrive that the uplink never sent."""
    platform = Answering(mosquitto, answer=False)
    service = opened(tmp_path, mosquitto)
    fill(service, 20)

    def sent(count: int) -> bool:
        service.poll(0.01)
        counters = service.uplink.counters.values
        return counters["sent_total"] + counters["resent_total"] >= count

    for connection in range(1, 5):
        eventually(lambda at=connection: sent(20 * at), what="sending")  # type: ignore[misc]
        service.cut()
        service.restore()
    eventually(lambda: sent(100))
    counters = service.uplink.counters.values
    service.close()
    platform.close()
    assert len(platform.received) <= counters["sent_total"] + counters["resent_total"]
    assert counters["connections_total"] >= 4


def test_a_broker_killed_and_started_again_loses_nothing(tmp_path: Path, free_port: int) -> None:
    program = find_mosquitto()
    assert program is not None
    config = tmp_path / "mosquitto.conf"
    config.write_text(mosquitto_configuration(free_port))

    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen([program, "-c", str(config)], stderr=subprocess.DEVNULL)
        eventually(lambda: accepts("127.0.0.1", free_port), what="mosquitto listening")
        return process

    broker = start()
    try:
        platform = Answering(free_port)
        service = opened(tmp_path, free_port)
        fill(service, 100)
        eventually(lambda: polled(service) and len(platform.received) > 10)
        broker.kill()
        broker.wait(5)
        fill(service, 100)
        eventually(lambda: polled(service) and not service.ready)
        broker = start()
        drive(service)
        assert platform.logged("gw-1", T) == list(range(1, 201))
        service.close()
        platform.close()
    finally:
        end(broker)


def test_many_gateways_share_one_wait(tmp_path: Path, mosquitto: int, platform: Answering) -> None:
    services = [opened(tmp_path, mosquitto, f"gw-{number}") for number in range(8)]
    for service in services:
        fill(service, 40)
    drive(*services)
    assert all(platform.logged(service.gateway, T) == list(range(1, 41)) for service in services)
    for service in services:
        service.close()


def test_nobody_listening_is_said_once_and_tried_ever_more_seldom(tmp_path: Path, free_port: int) -> None:
    service = opened(tmp_path, free_port)
    fill(service, 1)
    before = monotonic_s()
    eventually(lambda: polled(service) and service.uplink.counters.values["errors_total{stage=connect}"] >= 4)
    assert monotonic_s() - before > 0.5 * (0.25 + 0.5 + 1.0)
    (warning,) = service.uplink.counters.warnings
    assert f"127.0.0.1:{free_port}: Connection refused" in warning
    assert service.spool.connection == 0  # a try without a connection costs the card no write


@pytest.fixture
def guarded(tmp_path: Path, free_port: int) -> Iterator[int]:
    """A broker that wants a password."""
    program, tool = find_mosquitto(), shutil.which("mosquitto_passwd")
    assert program is not None
    if tool is None:
        pytest.skip("mosquitto_passwd is not installed")
    subprocess.run([tool, "-c", "-b", str(tmp_path / "passwords"), "gw-1", "secret"], check=True, capture_output=True)
    text = mosquitto_configuration(free_port).replace("allow_anonymous true", "allow_anonymous false")
    config = tmp_path / "mosquitto.conf"
    config.write_text(f"{text}password_file {tmp_path / 'passwords'}\n")
    process = subprocess.Popen([program, "-c", str(config)], stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: accepts("127.0.0.1", free_port), what="mosquitto listening")
        yield free_port
    finally:
        end(process)


def test_a_password_opens_the_door_and_a_wrong_one_says_so(tmp_path: Path, guarded: int) -> None:
    wrong = opened(tmp_path, guarded, password="guess")
    eventually(lambda: polled(wrong) and wrong.uplink.counters.warnings)
    assert "the broker refuses: Not authorized" in wrong.uplink.counters.warnings[0]
    wrong.close()
    right = opened(tmp_path, guarded, password="secret")
    drive(right)
    right.close()


def test_two_boxes_of_one_name_are_told_so_once(tmp_path: Path, mosquitto: int) -> None:
    """A copied card: the broker lets in whoever came last, and ends the other's connection, again and again."""
    one, two = opened(tmp_path / "one", mosquitto), opened(tmp_path / "two", mosquitto)
    said = "the broker ends each connection soon: does another box, or a copy of this card, use 'gw-1'?"

    def told(service: GatewayService) -> list[str]:
        return [warning for warning in service.uplink.counters.warnings if said in warning]

    def both() -> bool:
        for service in (one, two):
            service.poll(0.01)
        return bool(told(one) and told(two))

    eventually(both, 20, "both being told")
    connections = one.uplink.counters.values["connections_total"]
    eventually(lambda: both() and one.uplink.counters.values["connections_total"] > connections, 20, "another round")
    for service in (one, two):
        assert len(told(service)) == 1
        warnings = service.uplink.counters.warnings
        assert len(set(warnings)) == len(warnings), "each reason once, however often it is met"
        service.close()


class Silent:
    """A broker that accepts connections and subscriptions and never confirms a message."""

    def __init__(self) -> None:
        self.published = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with self._listener, self._listener.accept()[0] as peer, peer.makefile("rb") as stream:
            while head := stream.read(1):
                length, shift, more = 0, 0, 0x80
                while more & 0x80:
                    more = stream.read(1)[0]
                    length |= (more & 0x7F) << shift
                    shift += 7
                packet = stream.read(length)
                kind = head[0] >> 4
                if kind == 1:
                    peer.sendall(b"\x20\x02\x00\x00")
                elif kind == 8:
                    peer.sendall(b"\x90\x03" + packet[:2] + b"\x01")
                elif kind == 3:
                    self.published += 1

    def join(self) -> None:
        self._thread.join(5)


def test_paho_never_holds_more_than_the_windows(tmp_path: Path) -> None:
    broker = Silent()
    service = opened(tmp_path, broker.port)
    fill(service, 200)
    fill(service, 200, E)
    until_s = monotonic_s() + 2.0  # four time-outs of the uplink, from when the windows are full
    latest_s = until_s + 20.0
    while monotonic_s() < until_s:
        service.poll(0.01)
        if broker.published < 1 + WINDOW_MESSAGES and monotonic_s() < latest_s:
            until_s = monotonic_s() + 2.0
    service.cut()
    broker.join()
    assert broker.published == 1 + WINDOW_MESSAGES < HANDED_OVER  # the birth and events; telemetry waits for them
    assert service.uplink.counters.values["resent_total"] == 0
