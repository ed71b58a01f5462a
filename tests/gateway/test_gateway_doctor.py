"""`gateway doctor` and what answers where the broker should be: each is named, in one line, and harms no connection."""

from __future__ import annotations

import doctest
import json
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from citybrain.cli import main
from gateway.broker import greet
from tests.conftest import end, eventually
from tests.gateway.test_gateway_tls import Site, broker
from tests.gateway_box import GATEWAY, Process, config_text

Answer = Callable[[socket.socket], None]


class Stranger:
    """Whoever answers on a port of loopback without being a broker."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                line, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(line)
            threading.Thread(target=self._one, args=(line,), daemon=True).start()

    def _one(self, line: socket.socket) -> None:
        try:
            self._answer(line)
        except OSError:
            return

    def close(self) -> None:
        for one in [self._listener, *self._open]:
            one.close()


def login_page(line: socket.socket) -> None:
    line.recv(1000)
    line.sendall(b"HTTP/1.1 302 Found\r\nLocation: http://hotel.example/login\r\nContent-Length: 0\r\n\r\n")


def silence(line: socket.socket) -> None:
    line.recv(1_000_000)
    threading.Event().wait(30)


@pytest.fixture
def strangers() -> Iterator[list[Stranger]]:
    made: list[Stranger] = []
    yield made
    for one in made:
        one.close()


def findings(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, str]]:
    main(["gateway", "doctor", "--json", "--data", str(folder)])
    told = json.loads(capsys.readouterr().out)["findings"]
    codes = [one["code"] for one in told if one["level"] == "wrong"]
    assert len(set(codes)) == len(codes), "one line for one trouble"
    return {one["code"]: one for one in told}


def told(site: Site) -> str:
    tls = site.tls()
    return f"{{ca: {tls.ca}, certificate: {tls.certificate}, key: {tls.key}}}"


def over_tls(site: Site) -> Answer:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server = site.authority.sign("page", server=True)
    context.load_cert_chain(server, server.with_suffix(".key"))

    def answer(line: socket.socket) -> None:
        login_page(context.wrap_socket(line, server_side=True))

    return answer


@pytest.mark.parametrize(
    ("who", "tls", "says"),
    [
        ("page", True, "speaks no TLS: is it a TLS port, or a login page of the network (captive portal)?"),
        ("silence", True, "it takes connections, and does not answer the TLS handshake"),
        ("page over tls", True, "what answers there is no MQTT broker"),
        ("page", False, "what answers there is no MQTT broker"),
        ("silence", False, "what answers there is no MQTT broker"),
    ],
)
def test_whoever_answers_in_the_brokers_place_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], strangers: list[Stranger], who: str, tls: bool, says: str
) -> None:
    site = Site(tmp_path)
    answers = {"page": login_page, "silence": silence, "page over tls": over_tls(site)}
    strangers.append(stranger := Stranger(answers[who]))
    text = config_text(stranger.port, tls=told(site)) if tls else config_text(stranger.port)
    (tmp_path / "gateway.yaml").write_text(text)
    found = findings(tmp_path, capsys)
    assert says in found["broker"]["en"]
    assert "broker_well" not in found


def test_without_our_files_nothing_is_said_of_the_broker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = Site(tmp_path)
    site.good.write_text("no certificate")
    with broker(site, tmp_path):
        (tmp_path / "gateway.yaml").write_text(config_text(site.port, tls=told(site)))
        found = findings(tmp_path, capsys)
    assert "gw-0007.pem: expected a certificate in PEM" in found["certificate"]["en"], "the key is not blamed"
    assert {"broker", "broker_well"} & set(found) == set()


def test_a_tls_port_without_tls_is_named_by_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site, folder = Site(tmp_path), tmp_path / "box"
    folder.mkdir()
    with broker(site, tmp_path):
        (folder / "gateway.yaml").write_text(config_text(site.port))
        assert "it hung up on our greeting: is it a TLS port?" in findings(folder, capsys)["broker"]["en"]
        box = Process(folder)
        try:
            eventually(lambda: "hung up on our greeting: is it a TLS port, and `tls` left out?" in box.said(), 20)
        finally:
            end(box.process)


def test_the_doctor_leaves_the_gateways_connection_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site, folder = Site(tmp_path), tmp_path / "box"
    folder.mkdir()
    with broker(site, tmp_path):
        (folder / "gateway.yaml").write_text(config_text(site.port, tls=told(site)))
        box = Process(folder)
        try:
            box.wait_online()
            found = findings(folder, capsys)
            before = box.beat()
            assert "broker_well" in found
            assert before is not None
            eventually(lambda: (beat := box.beat()) is not None and beat.at > before.at, 10, "a heartbeat later")
            beat = box.beat()
            assert beat is not None
            assert beat.counters["connections_total"] == 1
            assert f"no connection: {GATEWAY}" not in box.said()
        finally:
            end(box.process)


def test_whoever_reads_only_the_first_line_gets_no_traceback(tmp_path: Path) -> None:
    command = f"{sys.executable} -P -m citybrain gateway doctor --data {tmp_path} | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (len(done.stdout.splitlines()), done.stderr) == (1, "")


def test_examples() -> None:
    results = doctest.testmod(greet)
    assert results.attempted > 0
    assert results.failed == 0
