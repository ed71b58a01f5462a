"""A real mosquitto with the configuration that `citybrain ca broker` writes: who gets in, and who may say what."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from api.pki.ca import Authority
from citybrain.cli import main
from citybrain.clock import DAY_MS, ManualClock, real_unix_ms
from citybrain.counters import read_heartbeats
from citybrain.model import Lane, Reading
from gateway.config import Tls
from gateway.service import Broker, GatewayService, poll_all
from gateway.spool import Spool
from gateway.uplink import Uplink
from streams.runtimes.broker import broker_command
from streams.runtimes.broker import mosquitto as find_mosquitto
from streams.runtimes.supervisor import accepts
from tests.authority import Box, Client, TlsBroker, made, tls_broker
from tests.conftest import end, eventually, unused_port
from tests.seeded_site import Seeded, seeded


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return made(tmp_path_factory.mktemp("centre"))


@pytest.fixture(scope="module")
def broker(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsBroker]:
    with tls_broker(tmp_path_factory.mktemp("broker"), authority) as running:
        yield running


@pytest.fixture
def connect(broker: TlsBroker) -> Iterator[Callable[..., Client]]:
    """Connect over TLS with a box's certificate, or with none; closed in the end."""
    clients: list[Client] = []

    def connect(box: Box | None, trust: Path | None = None) -> Client:
        clients.append(Client(broker.port, box, trust or (box.trust if box else None)))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


@pytest.fixture
def spy(broker: TlsBroker) -> Iterator[Client]:
    """Ingest's place: this machine's own listener."""
    client = Client(broker.folder.loopback_port, None)
    assert client.subscribe("cb/v1/#")
    yield client
    client.close()


def test_a_box_with_its_certificate_gets_in_under_its_own_name(
    tmp_path: Path, authority: Authority, connect: Callable[..., Client], spy: Client
) -> None:
    client = connect(Box(tmp_path, authority, "gw-1"))
    assert not client.refused
    for channel in ("telemetry", "event", "blob", "status", "reply"):
        client.publish(f"cb/v1/0/gw-1/{channel}", channel.encode())
    eventually(lambda: len(spy.messages) == 5)
    assert client.subscribe("cb/v1/0/gw-1/ack")
    assert client.subscribe("cb/v1/0/gw-1/command")
    spy.publish("cb/v1/0/gw-1/ack", b"1")
    eventually(lambda: client.messages == [("cb/v1/0/gw-1/ack", b"1")])


def test_missing_foreign_expired_and_revoked_certificates_are_refused(
    tmp_path: Path, authority: Authority, connect: Callable[..., Client]
) -> None:
    good = Box(tmp_path, authority, "gw-2")
    assert connect(None, good.trust).refused, "no certificate"
    assert connect(Box(tmp_path / "foreign", made(tmp_path / "other"), "gw-2"), good.trust).refused
    clock = authority.clock
    assert isinstance(clock, ManualClock)
    now_ms = clock.now_ms()
    clock.set_ms(now_ms - 366 * DAY_MS)
    old = Box(tmp_path, authority, "gw-3")
    clock.set_ms(now_ms)
    assert connect(old).refused, "expired"
    assert not connect(good).refused
    authority.revoke([good.issued.serial], "li", "stolen")
    eventually(lambda: connect(good).refused, 10, "the revocation list being read")


def test_a_box_with_a_new_certificate_is_let_in_again(
    tmp_path: Path, authority: Authority, broker: TlsBroker, connect: Callable[..., Client], spy: Client
) -> None:
    authority.revoke([Box(tmp_path, authority, "gw-13").issued.serial], "li", "board replaced")
    again = Box(tmp_path, authority, "gw-13")

    def heard() -> bool:
        client = connect(again)
        with contextlib.suppress(RuntimeError):  # until the broker has read the access list
            client.publish("cb/v1/0/gw-13/telemetry", b"back")
        return bool(spy.messages)

    eventually(heard)


def test_a_box_that_is_revoked_while_it_is_connected_is_heard_no_more(
    tmp_path: Path, authority: Authority, broker: TlsBroker, connect: Callable[..., Client], spy: Client
) -> None:
    box = Box(tmp_path, authority, "gw-4")
    client, other = connect(box), connect(Box(tmp_path, authority, "gw-5"))
    client.publish("cb/v1/0/gw-4/telemetry", b"before")
    eventually(lambda: spy.messages)
    authority.revoke([box.issued.serial], "li", "stolen")
    said = iter(range(10_000))

    def shut_out() -> bool:
        """Whether what it said last stays unheard, although what another says after it is heard."""
        mine, marker = f"after {next(said)}".encode(), f"marker {next(said)}".encode()
        client.publish("cb/v1/0/gw-4/telemetry", mine, qos=0)
        other.publish("cb/v1/0/gw-5/telemetry", marker)
        eventually(lambda: ("cb/v1/0/gw-5/telemetry", marker) in spy.messages)
        return ("cb/v1/0/gw-4/telemetry", mine) not in spy.messages

    eventually(shut_out, 10)


def test_another_boxs_topics_are_closed(
    tmp_path: Path, authority: Authority, connect: Callable[..., Client], spy: Client
) -> None:
    """Who tries is disconnected: so does mosquitto 2.0.11 where the queue has no bound."""
    box = Box(tmp_path, authority, "gw-6")
    for topic in ("cb/v1/0/gw-7/telemetry", "cb/v1/0/gw-6/ack", "cb/v1/0/gw-6/command", "cb/v1/0/gw-6", "other"):
        intruder = connect(box)
        with contextlib.suppress(RuntimeError):
            intruder.publish(topic, b"foreign")
        eventually(lambda client=intruder: "gone" in client.events)  # type: ignore[misc]
    client = connect(box)
    client.publish("cb/v1/0/gw-6/telemetry", b"own")
    eventually(lambda: spy.messages)
    assert spy.messages == [("cb/v1/0/gw-6/telemetry", b"own")]
    allowed = [client.subscribe(topic) for topic in ("cb/v1/0/gw-7/ack", "cb/v1/+/+/telemetry", "cb/v1/#", "#")]
    spy.publish("cb/v1/0/gw-7/ack", b"another box's")
    assert client.subscribe("cb/v1/0/gw-6/ack")
    spy.publish("cb/v1/0/gw-6/ack", b"own")
    eventually(lambda: client.messages)
    assert client.messages[-1] == ("cb/v1/0/gw-6/ack", b"own")
    assert all(topic.startswith("cb/v1/0/gw-6/") for topic, _ in client.messages), allowed


def test_ingest_reads_all_and_writes_answers_only(
    tmp_path: Path, authority: Authority, connect: Callable[..., Client]
) -> None:
    issued, key = authority.make_service("service-ingest", "li", "test")
    box = Box.__new__(Box)
    box.trust, box.certificate, box.key_file = (tmp_path / name for name in ("ca.pem", "i.pem", "i.key"))
    for path, data in (
        (box.trust, authority.trust()),
        (box.certificate, authority.pem(issued.serial)),
        (box.key_file, key),
    ):
        path.write_bytes(data)
    ingest, gateway = connect(box), connect(Box(tmp_path, authority, "gw-8"))
    assert ingest.subscribe("cb/v1/0/+/telemetry")
    assert gateway.subscribe("cb/v1/0/gw-8/ack")
    gateway.publish("cb/v1/0/gw-8/telemetry", b"x")
    eventually(lambda: ingest.messages == [("cb/v1/0/gw-8/telemetry", b"x")])
    ingest.publish("cb/v1/0/gw-8/ack", b"ok")
    eventually(lambda: gateway.messages == [("cb/v1/0/gw-8/ack", b"ok")])
    with contextlib.suppress(RuntimeError):
        ingest.publish("cb/v1/0/gw-8/telemetry", b"forged")
    eventually(lambda: "gone" in ingest.events)
    assert ingest.messages == [("cb/v1/0/gw-8/telemetry", b"x")]


def test_a_cloned_card_throws_the_first_one_out(
    tmp_path: Path, authority: Authority, connect: Callable[..., Client]
) -> None:
    """The name in the certificate is the client id, so a name has one connection. docs/wire.md: the connection counter
    and the board's serial in the status, and a conflict of content, say which one it is.
    """
    box = Box(tmp_path, authority, "gw-9")
    first = connect(box)
    second = connect(box)
    eventually(lambda: "gone" in first.events, 10, "the first one being thrown out")
    assert not second.refused


def test_after_a_rotation_both_authorities_are_let_in(
    tmp_path: Path, authority: Authority, broker: TlsBroker, connect: Callable[..., Client]
) -> None:
    old = Box(tmp_path, authority, "gw-10")
    authority.rotate("li", "yearly")
    new = Box(tmp_path, authority, "gw-11")
    assert new.issued.authority == old.issued.authority + 1
    eventually(lambda: not connect(new).refused, 15, "the new authority being trusted")
    assert not connect(old, old.trust).refused, "a box that has not heard of the rotation still trusts the server"


def test_the_list_is_renewed_long_before_it_is_old(tmp_path: Path) -> None:
    clock = ManualClock(real_unix_ms())
    authority = made(tmp_path, clock)
    before = (authority.folder / "crl.pem").read_bytes()
    clock.set_ms(clock.now_ms() + 29 * DAY_MS)
    authority.tend()
    assert (authority.folder / "crl.pem").read_bytes() == before
    clock.set_ms(clock.now_ms() + 2 * DAY_MS)
    authority.tend()
    assert (authority.folder / "crl.pem").read_bytes() != before


def test_the_broker_of_a_run_lets_boxes_in_beside_its_own(tmp_path: Path, free_port: int) -> None:
    """`citybrain ca broker` without --out; then what `citybrain run` starts."""
    authority, port = made(tmp_path), unused_port()
    words = ("ca", "broker", "--port", str(port), "--bind", "127.0.0.1", "--data", str(tmp_path))
    assert main([*words]) == 0
    program = find_mosquitto()
    command = broker_command(authority.layout, free_port, program)
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            eventually(lambda: accepts("127.0.0.1", port) and accepts("127.0.0.1", free_port), what="both listeners")
            box = Box(tmp_path / "box", authority, "gw-1")
            inside, outside = Client(free_port, None), Client(port, box, box.trust)
            assert inside.subscribe("cb/v1/#")
            outside.publish("cb/v1/0/gw-1/telemetry", b"x")
            eventually(lambda: inside.messages == [("cb/v1/0/gw-1/telemetry", b"x")])
            assert Client(port, None, box.trust).refused
            authority.revoke([box.issued.serial], "li", "stolen")
            eventually(lambda: Client(port, box, box.trust).refused, 10, "the run's broker reading the list")
            assert inside.events == ["connected Success"]
            inside.close()
        finally:
            end(process)


# --- all of it: box, broker, ingest -------------------------------------------------------------------------------


class SecurePath:
    """A seeded site whose ingest reaches the broker over TLS with its own certificate."""

    def __init__(self, root: Path, authority: Authority, site: Seeded, broker: TlsBroker) -> None:
        self.root, self.authority, self.site, self.broker = root, authority, site, broker

    def box(self, name: str) -> Box:
        return Box(self.root, self.authority, name)

    def service(self, box: Box, board: str, spool: Path) -> GatewayService:
        tls = Tls(str(box.trust), str(box.certificate), str(box.key_file))
        opened = Spool(spool, board)
        opened.start()
        shard = self.site.index.gateways[self.site.index.gateway_index[box.name]].shard
        broker = Broker("127.0.0.1", self.broker.port, tls=tls)
        return GatewayService(Uplink(opened, box.name, shard, timeout_s=0.5), box.name, shard, broker)

    def counted(self, name: str) -> float:
        found = [beat for beat in read_heartbeats(self.site.layout.run) if beat.process == "ingest"]
        return found[0].counters.get(name, 0.0) if found else 0.0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecurePath]:
    root = tmp_path_factory.mktemp("whole")
    site = seeded(root / "site")
    for writer in site.writers:
        writer.close()
    authority = made(root / "site")
    issued, key = authority.make_service("service-ingest", "li", "test")
    files = [root / name for name in ("ca.pem", "ingest.pem", "ingest.key")]
    for path, data in zip(files, (authority.trust(), authority.pem(issued.serial), key), strict=True):
        path.write_bytes(data)
    with tls_broker(root, authority) as broker:
        argv = [sys.executable, "-m", "citybrain", "ingest", "--data", str(site.layout.root)]
        argv += ["--mqtt-host", "127.0.0.1", "--port", str(broker.port), "--mqtt-tls", ",".join(map(str, files))]
        with (root / "ingest.log").open("wb") as log, subprocess.Popen(argv, stdout=log, stderr=log) as ingest:
            try:
                ready = SecurePath(root, authority, site, broker)
                connected = lambda: any(b.gauges.get("connected") for b in read_heartbeats(site.layout.run))  # noqa: E731
                eventually(connected, 30, f"ingest connected: {(root / 'ingest.log').read_text()}")
                yield ready
            finally:
                end(ingest)


def polled(*services: GatewayService) -> bool:
    poll_all(services, 0.02)
    return True


def test_what_a_box_says_within_tls_is_logged_and_acknowledged(tmp_path: Path, whole: SecurePath) -> None:
    service = whole.service(whole.box("gw-01"), "board-1", tmp_path)
    device = next(
        one.id for one in whole.site.district.registry.devices if one.gateway == "gw-01" and one.kind == "hydrant"
    )
    for number in range(500):
        values = {"pressure_mpa": 0.3 + number / 10_000}
        service.spool.append(Lane.TELEMETRY, [Reading(device, whole.site.now_ms + number, values)], number)
    service.spool.commit()
    eventually(lambda: polled(service) and service.ready and service.uplink.idle(), 20, "all of it acknowledged")
    service.close()
    assert whole.counted("errors_total{stage=broker}") == 0


def test_a_clone_and_the_first_one_are_noticed_as_two_boards(tmp_path: Path, whole: SecurePath) -> None:
    box = whole.box("gw-02")
    first, clone = whole.service(box, "board-1", tmp_path / "a"), whole.service(box, "board-2", tmp_path / "b")
    eventually(lambda: polled(first) and first.ready)
    eventually(lambda: polled(first, clone) and whole.counted("boards_total") >= 2, 30, "both boards heard in turn")
    first.close()
    clone.close()


def test_the_log_of_a_revoked_box_says_so(tmp_path: Path, whole: SecurePath) -> None:
    box = whole.box("gw-03")
    service = whole.service(box, "board-3", tmp_path)
    eventually(lambda: polled(service) and service.ready)
    whole.authority.revoke([box.issued.serial], "li", "stolen")
    service.spool.append(Lane.TELEMETRY, [Reading("x", 1, {"pressure_mpa": 0.3})], 1)
    service.spool.commit()
    said = service.uplink.counters.warnings
    eventually(
        lambda: polled(service) and any("it has been revoked" in one for one in said), 20, "the reason in its log"
    )
    service.close()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--mqtt-host", "10.0.0.1"), 2),
        (("--mqtt-tls", "one,two"), 2),
        (("--mqtt-tls", "/no/ca,/no/cert,/no/key"), 3),
    ],
)
def test_ingest_says_what_is_wrong_with_its_certificates(tmp_path: Path, words: tuple[str, ...], code: int) -> None:
    argv = [sys.executable, "-m", "citybrain", "ingest", "--data", str(tmp_path), *words]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, "--mqtt-" in done.stderr) == (code, True), done.stderr
