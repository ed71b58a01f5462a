"""An authority in a folder, boxes with keys, and a mosquitto that reads what `citybrain ca broker` wrote."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from api.pki import certificates
from api.pki.broker import BrokerFolder
from api.pki.ca import Authority, Setting
from api.pki.certificates import Key
from api.pki.journal import Issued
from citybrain.clock import ManualClock, real_unix_ms
from citybrain.layout import Layout
from streams.runtimes.broker import mosquitto as find_mosquitto
from streams.runtimes.supervisor import accepts
from tests.conftest import end, eventually, unused_port


def made(
    root: Path, clock: ManualClock | None = None, *, hosts: tuple[str, ...] = ("127.0.0.1", "localhost")
) -> Authority:
    """Return a new authority."""
    authority = Authority(Layout(root), clock or ManualClock(real_unix_ms()))
    authority.init(Setting(hosts), "li", "test")
    return authority


class Box:
    """What a gateway has in its pki folder."""

    def __init__(self, folder: Path, authority: Authority, name: str, key: Key | None = None) -> None:
        self.name = name
        self.key = key or certificates.new_key()
        self.issued: Issued = authority.sign("gateway", name, self.key.public_key(), "li", "test")
        self.folder = folder / f"{name}-{self.issued.serial[:8]}"
        self.folder.mkdir(parents=True)
        self.trust = self._put("ca.pem", authority.trust())
        self.certificate = self._put("gateway.pem", authority.pem(self.issued.serial))
        self.key_file = self._put("gateway.key", certificates.key_pem(self.key))

    def _put(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path


class Client:
    """A real MQTT client, and what became of it."""

    def __init__(self, port: int, box: Box | None, trust: Path | None = None, client_id: str = "anything") -> None:
        self.events: list[str] = []
        self.messages: list[tuple[str, bytes]] = []
        self.subscribed: list[bool] = []
        self.client = paho.Client(CallbackAPIVersion.VERSION2, client_id, reconnect_on_failure=False)
        if trust is not None:
            files = (str(box.certificate), str(box.key_file)) if box else (None, None)
            self.client.tls_set(str(trust), *files)
        self.client.on_connect = lambda *rest: self.events.append(f"connected {rest[3]}")
        self.client.on_disconnect = lambda *rest: self.events.append("gone")
        self.client.on_message = lambda _c, _d, message: self.messages.append((message.topic, bytes(message.payload)))
        self.client.on_subscribe = lambda *rest: self.subscribed.append(not rest[3][0].is_failure)
        try:
            self.client.connect("127.0.0.1", port)
        except OSError as error:
            self.events.append(f"gone {error}")
        else:
            self.client.loop_start()
        eventually(lambda: self.events, 10, "an answer of the broker")

    @property
    def refused(self) -> bool:
        """Whether the broker never let it in."""
        return not any(event == "connected Success" for event in self.events)

    def subscribe(self, topic: str) -> bool:
        """Subscribe, and return whether the broker allows it."""
        before = len(self.subscribed)
        self.client.subscribe(topic, qos=1)
        eventually(lambda: len(self.subscribed) > before)
        return self.subscribed[-1]

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> None:
        """Publish, and with QoS 1 wait until the broker has it; raises RuntimeError where it ends the connection."""
        self.client.publish(topic, payload, qos).wait_for_publish(10)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


class TlsBroker:
    """The ports of a running mosquitto, and its process and log."""

    def __init__(self, folder: BrokerFolder, process: subprocess.Popen[bytes], log: Path) -> None:
        self.folder = folder
        self.process = process
        self.log = log

    @property
    def port(self) -> int:
        return self.folder.port

    def reloads(self) -> int:
        """Return how often it has read its configuration again."""
        return self.log.read_text(errors="replace").count("Reloading config")


@contextlib.contextmanager
def tls_broker(root: Path, authority: Authority) -> Iterator[TlsBroker]:
    """Run a mosquitto with the configuration that the authority writes."""
    program = find_mosquitto()
    assert program is not None, "mosquitto is not installed: apt-get install mosquitto (or run .ci/run)"
    user = "root" if Path("/proc/self").owner() == "root" else ""
    folder = BrokerFolder(str(root / "broker"), unused_port(), "127.0.0.1", unused_port(), user)
    authority.serve_broker(folder)
    log = root / "mosquitto.log"
    config = str(root / "broker" / "mosquitto.conf")
    with log.open("wb") as out, subprocess.Popen([program, "-c", config], stdout=out, stderr=out) as process:
        try:
            eventually(lambda: accepts("127.0.0.1", folder.port), what=f"mosquitto listening: {log.read_text()}")
            yield TlsBroker(folder, process, log)
        finally:
            end(process)
