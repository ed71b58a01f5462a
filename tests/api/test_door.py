"""The door of the box listener: real TLS connections against small bounds, and the large ones against a fleet."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from api.boxes import Boxes
from api.door import BOUNDS, MOST_ADDRESSES, Bounds, Doorman, fitting
from api.pki.ca import Authority, Setting
from api.readings import Latest
from api.site import Site
from citybrain.counters import Counters
from tests.authority import Box
from tests.conftest import eventually, unused_port
from tests.seeded_site import Seeded, seeded

SMALL = Bounds(connections=8, handshake_s=0.5, head_s=0.5, stranger_s=1.0, known_s=3.0, shutdown_s=0.5)
TRUST = b"GET /v1/enrol/trust HTTP/1.1\r\nHost: x\r\n\r\n"
LONG_S = 20.0  # longer than any bound here, shorter than asyncio's and uvicorn's own


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Seeded:
    site = seeded(tmp_path_factory.mktemp("site"))
    Authority(site.layout).init(Setting(("127.0.0.1",), listen="127.0.0.1:1"), "li", "test")
    return site


class Listener:
    """The listener on a free port, its counters, and ways to knock."""

    def __init__(self, site: Seeded, bounds: Bounds) -> None:
        self.port = unused_port()
        self.counters = Counters("api")
        self.authority = Authority(site.layout)
        path = site.layout.ca / "ca.json"
        path.write_text(path.read_text().replace(self.authority.setting.listen, f"127.0.0.1:{self.port}"))
        latest = Latest(site.layout, site.run.shards, self.counters)
        self.boxes = Boxes(Site(site.layout, site.run, latest, self.counters), self.authority, bounds)

    def refused(self, why: str) -> int:
        return self.counters.values[f"box_refused_total{{reason={why}}}"]

    def connect(self, source: str = "127.0.0.1") -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), LONG_S, (source, 0))

    def tls(self, source: str = "127.0.0.1", box: Box | None = None) -> ssl.SSLSocket:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if box is not None:
            context.load_cert_chain(box.certificate, box.key_file)
        return context.wrap_socket(self.connect(source))

    def served(self, source: str = "127.0.0.1") -> bool:
        """Return whether a request is answered."""
        try:
            with self.tls(source) as line:
                line.sendall(TRUST)
                return answer(line).startswith(b"HTTP/1.1 200")
        except OSError:
            return False


def answer(line: socket.socket) -> bytes:
    """Return all that comes until the other side closes."""
    found = b""
    with contextlib.suppress(ConnectionError, ssl.SSLEOFError):
        while part := line.recv(65536):
            found += part
    return found


def ended_within(line: socket.socket, seconds: float) -> bool:
    """Return whether the other side ends a connection that says nothing more."""
    line.settimeout(seconds)
    try:
        answer(line)
    except TimeoutError:
        return False
    return True


@contextlib.contextmanager
def listening(site: Seeded, bounds: Bounds) -> Iterator[Listener]:
    listener = Listener(site, bounds)
    listener.boxes.look()
    try:
        eventually(listener.served, what="the listener")
        yield listener
    finally:
        listener.boxes.stop()


@pytest.fixture(scope="module")
def small(folder: Seeded) -> Iterator[Listener]:
    with listening(folder, SMALL) as listener:
        yield listener


# --- times --------------------------------------------------------------------------------------------------------


def test_who_never_shakes_hands_is_put_out(small: Listener) -> None:
    before = small.refused("handshake")
    with small.connect() as line:
        assert ended_within(line, 5)
    eventually(lambda: small.refused("handshake") == before + 1)


def test_who_says_nothing_after_the_handshake_is_put_out(small: Listener) -> None:
    before = small.refused("slow")
    with small.tls() as line:
        assert ended_within(line, 5)
    eventually(lambda: small.refused("slow") == before + 1)


def trickled_s(listener: Listener, head: bytes) -> float:
    """Send a beginning, then byte after byte, and return how long that was borne."""
    began = time.monotonic()
    with listener.tls() as line, contextlib.suppress(OSError):
        line.sendall(head)
        while time.monotonic() - began < LONG_S:
            line.sendall(b"a")
            time.sleep(0.05)
    return time.monotonic() - began


def test_a_header_byte_by_byte_is_put_out(small: Listener) -> None:
    """Slowloris: something comes all the time, and the request never begins."""
    before = small.refused("slow")
    assert trickled_s(small, b"GET / HTTP/1.1\r\nX: ") < 5
    eventually(lambda: small.refused("slow") == before + 1)


def test_a_body_byte_by_byte_is_put_out(small: Listener) -> None:
    before = small.refused("slow")
    borne_s = trickled_s(small, b"POST /v1/enrol HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n")
    assert SMALL.head_s < borne_s < 5
    eventually(lambda: small.refused("slow") == before + 1)


def test_a_box_with_a_certificate_has_longer(small: Listener, tmp_path: Path) -> None:
    box = Box(tmp_path, small.authority, "gw-01")
    with small.tls(box=box) as line:
        line.sendall(b"POST /v1/enrol/renew HTTP/1.1\r\nHost: x\r\nContent-Length: 16\r\n\r\n")
        began = time.monotonic()
        for byte in b'{"request": "x"}':
            time.sleep(0.09)
            line.sendall(bytes([byte]))
        assert time.monotonic() - began > SMALL.stranger_s
        assert answer(line).startswith(b"HTTP/1.1 422"), "it was read to its end"


def test_a_connection_carries_one_request(small: Listener) -> None:
    with small.tls() as line:
        line.sendall(TRUST)
        said = answer(line)
    assert said.startswith(b"HTTP/1.1 200")
    assert b"connection: close" in said


# --- sizes --------------------------------------------------------------------------------------------------------


def head(length: int | None, path: str = "/v1/enrol") -> bytes:
    how = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{how}\r\n\r\n".encode()


def test_a_body_that_says_it_is_too_large_is_refused_unread(small: Listener) -> None:
    before = small.refused("large")
    with small.tls() as line:
        line.sendall(head(SMALL.stranger_bytes + 1))
        said = answer(line)
    assert said.startswith(b"HTTP/1.1 413")
    assert b"at most 65536 bytes" in said
    eventually(lambda: small.refused("large") == before + 1)


def test_a_body_that_does_not_say_how_large_it_is_is_counted(small: Listener) -> None:
    before = small.refused("large")
    with small.tls() as line:
        with contextlib.suppress(OSError):
            line.sendall(head(None))
            for _ in range(40):
                line.sendall(b"1000\r\n" + b"a" * 4096 + b"\r\n")
        said = answer(line)
    eventually(lambda: small.refused("large") == before + 1)
    assert said.startswith(b"HTTP/1.1 413") or not said, "it may be gone before it is read"


def test_a_sheet_with_its_photo_passes_only_with_a_certificate(small: Listener, tmp_path: Path) -> None:
    body = b'{"sheet": "x", "signature": "y", "photo": "' + b"A" * 2_700_000 + b'"}'
    request = head(len(body), "/v1/gateways/gw-01/commissioning") + body
    with small.tls(box=Box(tmp_path, small.authority, "gw-01")) as line:
        line.sendall(request)
        assert answer(line).startswith(b"HTTP/1.1 422"), "taken, and found to be no sheet"
    with small.tls() as line:
        with contextlib.suppress(OSError):
            line.sendall(request)
        assert not answer(line).startswith((b"HTTP/1.1 422", b"HTTP/1.1 401"))


def test_a_header_without_end_is_refused_for_its_size(small: Listener) -> None:
    before = small.refused("slow")
    with small.tls() as line:
        with contextlib.suppress(OSError):
            line.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * (2 * SMALL.head_bytes))
        said = answer(line)
    assert said.startswith(b"HTTP/1.1 400") or not said, "it may be gone before it is read"
    assert small.refused("slow") == before, "not because its time was over"
    assert small.served()


# --- numbers ------------------------------------------------------------------------------------------------------


def test_a_full_house_makes_newcomers_wait_and_puts_out_who_is_idle(folder: Seeded) -> None:
    bounds = Bounds(connections=3, handshake_s=1.0)
    with listening(folder, bounds) as listener, contextlib.ExitStack() as held:
        for _ in range(3):
            held.enter_context(listener.connect())
        eventually(lambda: listener.counters.values["boxes_full_total"] > 0)
        began = time.monotonic()
        assert listener.served(), "it waits, and is served"
        assert time.monotonic() - began > 0.5, "there was no room before"


def test_one_address_cannot_keep_everybody_out(folder: Seeded) -> None:
    bounds = Bounds(connections=6, of_one_address=3)
    with listening(folder, bounds) as listener, contextlib.ExitStack() as held:
        for _ in range(3):
            held.enter_context(listener.tls())
        with listener.connect() as fourth:
            assert ended_within(fourth, 5)
        assert listener.refused("crowd") == 1
        assert listener.served("127.0.0.2")
        assert "127.0.0.1 was refused: too many open ones" in listener.counters.warnings[-1]


def test_one_address_cannot_come_again_and_again(folder: Seeded) -> None:
    bounds = Bounds(burst=6, per_s=0.001)
    with listening(folder, bounds) as listener:
        while listener.served():
            pass
        assert listener.refused("rate") == 1
        assert listener.counters.values["box_connections_total"] == 6
        assert listener.served("127.0.0.2")


def test_a_fleet_of_500_behind_one_address_is_served_at_once(folder: Seeded) -> None:
    """All at the same time, each with two calls as an enrolment has: nobody is refused."""
    with listening(folder, BOUNDS) as listener, ThreadPoolExecutor(64) as boxes:
        with contextlib.ExitStack() as held:
            lines = list(boxes.map(lambda _: listener.tls(), range(500)))
            for line in lines:
                held.enter_context(line)
            for line in lines:
                line.sendall(TRUST)
            assert all(answer(line).startswith(b"HTTP/1.1 200") for line in lines)
        assert all(boxes.map(lambda _: listener.served(), range(500)))
        assert [listener.refused(why) for why in ("rate", "crowd", "slow", "handshake")] == [0, 0, 0, 0]


# --- the doorman --------------------------------------------------------------------------------------------------


def test_an_address_may_come_in_again_at_its_rate() -> None:
    doorman = Doorman(Bounds(burst=3, per_s=2.0))
    assert [doorman.admit("a", 0.0) for _ in range(4)] == [None, None, None, "rate"]
    assert doorman.admit("b", 0.0) is None
    assert doorman.admit("a", 0.4) == "rate"
    assert doorman.admit("a", 0.6) is None
    assert [doorman.admit("a", 100.0) for _ in range(4)] == [None, None, None, "rate"]


def test_a_process_that_may_open_few_files_lets_fewer_in() -> None:
    assert fitting(BOUNDS, 100_000) == BOUNDS
    few = fitting(BOUNDS, 256)
    assert (few.connections, few.of_one_address, few.burst) == (128, 100, BOUNDS.burst)
    assert fitting(BOUNDS, 1).of_one_address == 1


def test_who_left_makes_room() -> None:
    doorman = Doorman(Bounds(of_one_address=1))
    assert [doorman.admit("a", 0.0), doorman.admit("a", 0.0)] == [None, "crowd"]
    doorman.left("a")
    assert doorman.admit("a", 0.0) is None


def test_addresses_are_not_remembered_without_end() -> None:
    doorman = Doorman(Bounds(burst=2, per_s=1.0))
    assert doorman.admit("here to stay", 0.0) is None
    for number in range(3 * MOST_ADDRESSES):
        assert doorman.admit(f"{number}", 0.0) is None
        doorman.left(f"{number}")
    assert len(doorman._known) <= MOST_ADDRESSES
    assert doorman.admit("here to stay", 0.0) is None
    assert doorman.admit("here to stay", 0.0) == "rate", "it is known still"


def test_a_listener_that_ended_is_begun_again(folder: Seeded, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(folder, BOUNDS) as listener:
        listener.boxes.stop()
        monkeypatch.setattr("api.boxes.LOOK_MS", 0)
        eventually(lambda: not listener.served())
        listener.boxes.look()
        eventually(listener.served)
