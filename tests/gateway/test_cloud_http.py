"""The intake's HTTP side: who is let in, what is refused and how that is said, and clients that behave badly."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from citybrain.cli import main
from citybrain.clock import real_unix_s
from citybrain.errors import StorageError
from citybrain.storage import OS_FILES, Files
from citybrain.webhook import sign
from gateway.clouds.http import Limits, Refused, read_head
from gateway.clouds.process import CloudProcess
from tests.cloud_site import Client, CloudSite, imei, message
from tests.conftest import eventually
from tests.faulty_files import LossyFiles

LIMITS = Limits(head_s=0.3, body_s=0.3, idle_s=5.0, connections=8)
GOOD = [message(imei(0), 1_767_225_600_000, water_pressure=310)]


class Served:
    """The process's loop in a thread; no broker, so that everything stays in the spools."""

    def __init__(self, folder: Path, files: Files = OS_FILES, *, active: bool = True) -> None:
        self.site = CloudSite(folder)
        if active:
            self.site.activate()
        self.failure: StorageError | None = None
        self._files = files
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        assert self._ready.wait(20)
        eventually(self._listens)
        self.client = self.site.client()

    async def _run(self) -> None:
        self.process = CloudProcess(self.site.layout, self.site.run, self.site.clouds, LIMITS, self._files)
        self._loop = asyncio.get_running_loop()
        self._ready.set()
        try:
            await self.process.run(self.site.run.cloud_port)
        except StorageError as error:
            self.failure = error

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.site.run.cloud_port)) == 0

    def count(self, name: str) -> int:
        return self.process.counters.values[name]

    def raw(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.site.run.cloud_port), timeout=10)

    def say(self, text: bytes) -> bytes:
        """Send bytes and return everything that is answered until the connection ends."""
        with self.raw() as peer:
            peer.sendall(text)
            return read_all(peer)

    def stop(self) -> None:
        self.client.close()
        self._loop.call_soon_threadsafe(self.process.stop)
        self.ended()

    def ended(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()


def read_all(peer: socket.socket) -> bytes:
    parts = []
    while some := peer.recv(65536):
        parts.append(some)
    return b"".join(parts)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("cloud"))
    try:
        yield made
    finally:
        made.stop()


# --- who is let in ---


def test_a_signed_push_is_taken(served: Served) -> None:
    status, body, headers = served.client.post(GOOD)
    assert status == 200
    assert body == {"received": 1, "accepted": 1, "repeated": 0, "dropped": {}, "problems": []}
    assert headers["content-type"] == "application/json"
    assert served.client.post([])[0] == 200, "an empty batch is a sign of life"


@pytest.mark.parametrize(
    ("changed", "error", "where"),
    [
        ({"authorization": "Bearer guessed-guessed-guessed"}, "signature_token", "header authorization"),
        ({"authorization": ""}, "signature_token", "header authorization"),
        ({"authorization": "Basic eDp5"}, "signature_token", "header authorization"),
        ({"authorization": "Bearer ÿ"}, "signature_token", "header authorization"),
        ({"webhook_signature": "v1,AAAA"}, "signature_wrong", "header webhook-signature"),
        ({"webhook_signature": ""}, "signature_missing", "header webhook-signature"),
        ({"webhook_id": "another"}, "signature_wrong", "header webhook-signature"),
        ({"webhook_timestamp": "1767225600"}, "signature_old", "header webhook-signature"),
        ({"webhook_timestamp": "soon"}, "signature_missing", "header webhook-signature"),
    ],
)
def test_who_cannot_prove_himself_is_told_why(served: Served, changed: dict[str, str], error: str, where: str) -> None:
    before = served.count(f"dropped_total{{reason={error}}}")
    status, body, headers = served.client.post(GOOD, **changed)
    assert (status, body["status"], body["error"], body["where"]) == (401, 401, error, where)
    assert served.client.keys.token not in str(body)
    assert headers["content-type"] == "application/problem+json"
    assert served.count(f"dropped_total{{reason={error}}}") == before + 1
    assert served.client.post(GOOD)[0] == 200, "the connection goes on"


def test_a_signature_is_that_of_the_body(served: Served) -> None:
    changed = [message(imei(0), 1_767_225_600_000, water_pressure=311)]
    signed = served.client.headers(msgspec.json.encode(GOOD))
    names = ("webhook-id", "webhook-timestamp", "webhook-signature")
    status, body, _ = served.client.post(changed, **{name.replace("-", "_"): signed[name] for name in names})
    assert (status, body["error"]) == (401, "signature_wrong")


def test_an_old_request_is_refused_and_a_replayed_one_adds_nothing(served: Served) -> None:
    content = [message(imei(2), 1_767_225_600_000, water_pressure=100)]
    body = msgspec.json.encode(content)
    keys = served.client.keys
    old = {n.replace("-", "_"): v for n, v in sign(keys.secret, "m", real_unix_s() - 301, body).items()}
    assert served.client.post(content, **old)[1]["error"] == "signature_old"
    recent = {n.replace("-", "_"): v for n, v in sign(keys.secret, "m", real_unix_s() - 100, body).items()}
    assert served.client.post(content, **recent)[1]["accepted"] == 1
    assert served.client.post(content, **recent)[1]["repeated"] == 1


def test_one_operators_keys_do_not_open_for_another(served: Served) -> None:
    other = Client(served.site.run.cloud_port, "onenet", served.client.keys)
    assert other.post({"msg": []})[1]["error"] == "signature_token"
    other.close()


def test_a_device_of_another_operator_is_refused(served: Served) -> None:
    foreign = message(imei(1), 1_767_225_600_000, water_pressure=310)
    status, body, _ = served.client.post([foreign])
    assert (status, body["accepted"], body["dropped"]) == (200, 0, {"foreign_device": 1})
    assert body["problems"][0]["where"] == imei(1)


def test_an_unknown_device_is_not_refused(served: Served) -> None:
    status, body, _ = served.client.post([message("nobody-knows", 1_767_225_600_000, water_pressure=310)])
    assert (status, body["accepted"]) == (200, 1)


# --- what is refused ---


@pytest.mark.parametrize(
    ("content", "error", "where"),
    [
        (b"pressure=3", "not_json", "body"),
        (b'[{"IMEI":"1","timestamp":5,"payload":{"tilt":NaN}}]', "not_json", "body"),
        (b'"text"', "no_messages", "body"),
        ([message(imei(0), "now", tilt=1)], "bad_time", "[0].timestamp"),  # type: ignore[arg-type]
        ([message(imei(0), 5, tilt="steep")], "not_a_number", "[0].payload.tilt"),
        ([message(imei(0), 5, smell=1)], "unknown_metric", "[0].payload.smell"),
    ],
)
def test_a_body_of_no_use_is_refused_with_its_place(served: Served, content: object, error: str, where: str) -> None:
    before = served.count(f"dropped_total{{reason={error}}}")
    status, body, _ = served.client.post(content)
    assert (status, body["error"], body["where"]) == (400, error, where)
    assert body["what"]
    assert served.count(f"dropped_total{{reason={error}}}") == before + 1


def test_ten_megabytes_are_refused_before_they_are_read(served: Served) -> None:
    status, body, headers = served.client.post(b"[" + b" " * 10_000_000 + b"]")
    assert (status, body["error"], body["where"]) == (413, "oversized", "body")
    assert "at most 1048576" in body["what"]
    assert headers["connection"] == "close"
    assert served.client.post(GOOD)[0] == 200


@pytest.mark.parametrize(
    ("request_", "status", "error"),
    [
        (b"GET /push/ctwing HTTP/1.1\r\n\r\n", 405, "method"),
        (b"POST /push/nobody HTTP/1.1\r\ncontent-length: 0\r\n\r\n", 404, "unknown_operator"),
        (b"POST /push/ctwing/x HTTP/1.1\r\ncontent-length: 0\r\n\r\n", 404, "not_found"),
        (b"POST / HTTP/1.1\r\ncontent-length: 0\r\n\r\n", 404, "not_found"),
        (b"POST /push/ctwing HTTP/1.1\r\n\r\n", 411, "no_length"),
        (b"POST /push/ctwing HTTP/1.1\r\ncontent-length: -5\r\n\r\n", 411, "no_length"),
        (b"POST /push/ctwing HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 411, "no_length"),
        (b"POST /push/ctwing HTTP/1.1\r\ncontent-encoding: gzip\r\ncontent-length: 3\r\n\r\nabc", 415, "encoded"),
        (b"POST /push/ctwing HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab", 400, "not_http"),
        (b"POST /push/ctwing HTTP/1.1\r\n folded: yes\r\n\r\n", 400, "not_http"),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400, "not_http"),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * 20_000 + b"\r\n\r\n", 431, "oversized"),
    ],
)
def test_what_is_no_request_of_ours_is_answered(served: Served, request_: bytes, status: int, error: str) -> None:
    answer = served.say(request_.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n", 1))
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    body = msgspec.json.decode(answer.partition(b"\r\n\r\n")[2])
    assert (body["status"], body["error"]) == (status, error)
    assert body["where"]
    assert body["what"]


def test_curl_may_ask_before_it_sends_a_body(served: Served) -> None:
    with served.raw() as peer:
        peer.sendall(
            b"POST /push/ctwing HTTP/1.1\r\ncontent-length: 2\r\nexpect: 100-continue\r\nconnection: close\r\n\r\n"
        )
        assert peer.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        peer.sendall(b"[]")
        assert read_all(peer).startswith(b"HTTP/1.1 401 ")


@given(
    method=st.sampled_from(["POST", "GET", "X"]),
    path=st.text("abc/?%", max_size=20),
    headers=st.dictionaries(st.text("abc-XYZ", min_size=1, max_size=8), st.text("abc 1,;:", max_size=12), max_size=6),
)
def test_a_head_is_read_as_it_was_written(method: str, path: str, headers: dict[str, str]) -> None:
    names = {name.lower() for name in headers}
    lines = [f"{method} /{path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    try:
        found = read_head("\r\n".join(lines).encode())
    except Refused:
        assert len(names) < len(headers), "the same header twice, and not the same"
    else:
        assert found[:2] == (method, f"/{path}")
        assert set(found[2]) == names
        assert all(found[2][name.lower()] == value.strip() for name, value in headers.items())


@given(st.binary(max_size=200))
def test_rubbish_is_refused_and_raises_nothing_else(head: bytes) -> None:
    with contextlib.suppress(Refused):
        read_head(head + b"\r\n\r\n")


# --- clients that behave badly ---


def test_a_client_that_trickles_is_given_up_and_nobody_waits_for_him(served: Served) -> None:
    slow = [served.raw() for _ in range(3)]
    slow[0].sendall(b"POST /push/ctwing HTTP/1.1\r\nx-a: ")
    slow[1].sendall(b"POST /push/ctwing HTTP/1.1\r\ncontent-length: 100\r\n\r\n[")
    assert served.client.post(GOOD)[0] == 200
    for peer, where in ((slow[0], b'"headers"'), (slow[1], b'"body"')):
        answer = read_all(peer)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert where in answer
    assert served.count("dropped_total{reason=slow}") == 2
    for peer in slow:
        peer.close()


def test_too_many_connections_are_told_to_come_again(served: Served) -> None:
    served.client.connection.close()
    many = [served.raw() for _ in range(LIMITS.connections)]
    eventually(lambda: len(served.process._server._open) >= LIMITS.connections)
    answer = served.say(b"")
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 5" in answer
    for peer in many:
        peer.close()
    eventually(lambda: not served.process._server._open)
    assert served.client.post(GOOD)[0] == 200


def test_a_client_that_leaves_in_the_middle_does_no_harm(served: Served) -> None:
    for text in (b"", b"POST", b"POST /push/ctwing HTTP/1.1\r\ncontent-length: 9\r\n\r\n[1"):
        with served.raw() as peer:
            peer.sendall(text)
    assert served.client.post(GOOD)[0] == 200


# --- the platform itself ---


def test_a_port_in_use_is_named(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    port = served.site.run.cloud_port
    arguments = ["cloud", "--data", str(served.site.folder / "other"), "--port", str(port)]
    config = ["--config", str(served.site.layout.root / "clouds.yaml")]
    assert main([*arguments, *config, "--new-keys"]) == 0
    assert main([*arguments, *config]) == 4
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_without_a_configuration_it_says_where_it_looked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cloud", "--data", str(tmp_path)]) == 3
    assert f"{tmp_path / 'clouds.yaml'}: cannot be read" in capsys.readouterr().err


def test_before_anything_is_provisioned_operators_are_told_to_wait(tmp_path: Path) -> None:
    made = Served(tmp_path, active=False)
    try:
        status, body, headers = made.client.post(GOOD)
        assert (status, headers["retry-after"]) == (503, "30")
        assert "no gateway in the registry in force" in body["what"]
        made.site.activate()
        eventually(lambda: made.client.post(GOOD)[0] == 200, what="the registry noticed")
    finally:
        made.stop()


def test_on_a_full_disk_operators_are_told_to_come_again_and_nothing_is_lost(tmp_path: Path) -> None:
    disk = LossyFiles()
    made = Served(tmp_path, files=disk)
    try:
        assert made.client.post(GOOD)[1]["accepted"] == 1
        disk.capacity = disk.used()
        more = [message(imei(0), 1_767_225_600_000 + number, water_pressure=310) for number in range(1, 6)]
        status, body, headers = made.client.post(more)
        assert (status, body["error"], headers["retry-after"]) == (503, "disk_full", "30")
        assert made.count("errors_total{stage=disk_full}") >= 1
        disk.capacity = None
        assert made.client.post(more)[1]["accepted"] == 5
        assert made.count("accepted_total") == 6
    finally:
        made.stop()


def test_a_disk_that_fails_ends_the_process_and_nobody_is_told_it_is_stored(tmp_path: Path) -> None:
    disk = LossyFiles()
    made = Served(tmp_path, files=disk)
    disk.failing_syncs = 1
    with pytest.raises((http.client.HTTPException, OSError)):
        made.client.post(GOOD)
    made.ended()
    assert isinstance(made.failure, StorageError)
