"""What the tests of the cloud intake share: a registry with virtual gateways, a configuration, a client that signs, and
the real processes around them."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from citybrain.clock import RunClock, real_unix_ms, real_unix_s
from citybrain.counters import Heartbeat
from citybrain.layout import Active, Layout, Run
from citybrain.mailbox import Mailbox, command
from citybrain.model import Device, Edge, Gateway, Place, Registry
from citybrain.segments import Reader
from citybrain.webhook import sign
from gateway.clouds.config import Clouds, Keys, make_keys, read_clouds, read_keys
from rules.files import library
from streams.log import Kind, decode_control, decode_transition, frame_arrays, frame_head
from streams.registry import METRIC_NAMES, Index, decode_registry, encode_registry
from streams.ruleset import encode_ruleset
from streams.runtimes.broker import mosquitto as find_mosquitto
from streams.runtimes.broker import mosquitto_configuration
from streams.runtimes.supervisor import accepts
from tests.conftest import end, eventually, unused_port

PLACE = Place(121.5, 31.2, "310104001001001")
DEVICES = 20
CONFIG = """\
operators:
  ctwing:
    token: ctwing.token
    key: ctwing.key
    device: IMEI
    time: timestamp
    values: payload
    only: {messageType: dataReport}
    ignore: [crc]
    gateways: cloud-0
    fields:
      water_pressure: {metric: pressure_mpa, factor: 0.001}
      battery.voltage: {metric: battery_v}
      tilt: {metric: tilt_deg, lane: event}
  onenet:
    token: onenet.token
    key: onenet.key
    messages: msg
    device: imei
    time: at
    stream: ds_id
    values: value
    only: {type: 1}
    gateways: cloud-1
    fields:
      "3323_0_5700": {metric: pressure_mpa}
"""
Key = tuple[str, str, int, float]  # device, metric, observed_at, value


def imei(number: int) -> str:
    """Return a device's name on the wire."""
    return f"8640160594{number:05d}"


def registry() -> Registry:
    """Return two virtual gateways, each in its shard, with the hydrants behind them, and one that is none of ours."""
    gateways = [Gateway("cloud-0", 0, PLACE), Gateway("cloud-1", 1, PLACE), Gateway("gw-a", 0, PLACE)]
    devices = [Device(g.id, "gateway", g.id, PLACE, ("uptime_s", "spooled")) for g in gateways]
    for number in range(DEVICES):
        gateway = "gw-a" if number == DEVICES - 1 else f"cloud-{number % 2}"
        metrics, events = ("pressure_mpa", "battery_v"), ("tilt_deg",)
        asset = Device(f"hyd-{number}", "hydrant", gateway, PLACE, metrics, events, sensor=imei(number))
        devices.append(asset)
    return Registry(tuple(gateways), tuple(devices))


def message(device: str, at_ms: int, **payload: Any) -> dict[str, Any]:
    """Return a message in the style of CTWing."""
    head = {"upPacketSN": -1, "messageType": "dataReport", "protocol": "lwm2m", "deviceId": f"d-{device}"}
    return {**head, "IMEI": device, "timestamp": at_ms, "payload": payload}


class Client:
    """An operator's HTTP client, one connection."""

    def __init__(self, port: int, operator: str, keys: Keys) -> None:
        self.operator = operator
        self.keys = keys
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)

    def headers(self, body: bytes, **changed: str) -> dict[str, str]:
        """Return what a signed push carries."""
        signed = sign(self.keys.secret, "m-1", real_unix_s(), body)
        given = {"authorization": f"Bearer {self.keys.token}", "content-type": "application/json", **signed}
        return given | {name.replace("_", "-"): value for name, value in changed.items()}

    def post(self, content: Any, **changed: str) -> tuple[int, dict[str, Any], dict[str, str]]:
        """Push and return (status, body, headers)."""
        body = content if isinstance(content, bytes) else msgspec.json.encode(content)
        self.connection.request("POST", f"/push/{self.operator}", body, self.headers(body, **changed))
        answer = self.connection.getresponse()
        content = answer.read()
        return answer.status, msgspec.json.decode(content), {k.lower(): v for k, v in answer.getheaders()}

    def close(self) -> None:
        self.connection.close()


class CloudSite:
    """A data folder with its processes, each to be killed and started again."""

    def __init__(self, folder: Path, config: str = CONFIG, speed: float = 1.0, operator_port: int = 1) -> None:
        now_ms = real_unix_ms()
        self.folder = folder
        self.layout = Layout(folder / "data")
        self.layout.make()
        clock = RunClock(now_ms, now_ms, speed)
        mqtt_port, cloud_port = unused_port(), unused_port()
        self.run = Run(clock, 2, mqtt_port=mqtt_port, cloud_port=cloud_port, operator_port=operator_port)
        self.layout.write_run(self.run)
        (self.layout.root / "clouds.yaml").write_text(config)
        self.clouds: Clouds = read_clouds(self.layout.root / "clouds.yaml")
        make_keys(self.layout.secrets, self.clouds)
        self.registry = self.layout.put_blob(encode_registry(registry()))
        self.ruleset = self.layout.put_blob(encode_ruleset(library()))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def activate(self) -> None:
        """Say that the registry is in force, as ingest does; for tests without it."""
        self.layout.write_active(Active(self.registry, self.ruleset))

    def provision(self) -> None:
        """Ask ingest for registry and rules."""
        box = Mailbox(self.layout.mailbox("ingest"))
        for position, what in enumerate(("registry", "ruleset")):
            body = {"content": getattr(self, what)}
            box.put(command(what, "test", self.run.clock.now_ms() + position, body))

    def client(self, operator: str = "ctwing") -> Client:
        keys = read_keys(self.layout.secrets, self.clouds.operators[operator])
        return Client(self.run.cloud_port, operator, keys)

    def start_broker(self) -> None:
        program = find_mosquitto()
        assert program is not None, "mosquitto is not installed: apt-get install mosquitto (or run .ci/run)"
        path = self.folder / "mosquitto.conf"
        path.write_text(mosquitto_configuration(self.run.mqtt_port))
        self._spawn("broker", [program, "-c", str(path)])
        eventually(lambda: accepts("127.0.0.1", self.run.mqtt_port), what="mosquitto listening")

    def start(self, name: str, *words: str) -> None:
        """Start a citybrain process and wait until its heartbeat is its own."""
        self._spawn(name, [sys.executable, "-P", "-m", "citybrain", name, "--data", str(self.layout.root), *words])
        eventually(lambda: self.own_beat(name), 60, f"{name} alive")

    def _spawn(self, name: str, argv: list[str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(argv, stdout=log, stderr=log)

    def kill(self, name: str) -> None:
        """SIGKILL one process, by its id."""
        os.kill(self.processes[name].pid, signal.SIGKILL)
        self.processes[name].wait()

    def beat(self, name: str = "cloud") -> Heartbeat | None:
        path = self.layout.run / f"{name}.heartbeat.json"
        return msgspec.json.decode(path.read_bytes(), type=Heartbeat) if path.exists() else None

    def own_beat(self, name: str) -> bool:
        beat = self.beat(name)
        return beat is not None and beat.pid == self.processes[name].pid

    def counted(self, name: str, process: str = "cloud") -> int:
        beat = self.beat(process)
        return 0 if beat is None else beat.counters.get(name, 0)

    def gauge(self, name: str, process: str = "cloud") -> float:
        beat = self.beat(process)
        return -1.0 if beat is None else beat.gauges.get(name, -1.0)

    def drained(self) -> bool:
        """Whether the intake has nothing more to send."""
        return self.own_beat("cloud") and self.gauge("spooled") == 0

    def logged(self) -> Counter[Key]:
        """Return how often each value stands in the log, by the sensor's name; without the gateways' own."""
        values = self._values()
        return Counter({value: times for value, times in values.items() if not value[0].startswith("cloud-")})

    def vitals(self) -> dict[str, list[int]]:
        """Return the times of each virtual gateway's own readings."""
        found: dict[str, list[int]] = {}
        for device, metric, at_ms, _ in self._values():
            if device.startswith("cloud-") and metric == "uptime_s":
                found.setdefault(device, []).append(at_ms)
        return found

    def raised(self, since_ms: int) -> Counter[tuple[str, str]]:
        """Return how often each (rule, subject) was raised from a time on."""
        found: Counter[tuple[str, str]] = Counter()
        for shard in range(self.run.shards):
            for record in Reader(self.layout.transitions(shard)):
                transition = decode_transition(record.payload)
                if transition.edge is Edge.RAISE and transition.at_ms >= since_ms:
                    found[transition.rule, transition.subject] += 1
        return found

    def _values(self) -> Counter[Key]:
        found: Counter[Key] = Counter()
        for shard in range(self.run.shards):
            index: Index | None = None
            for record in Reader(self.layout.log(shard)):
                if record.kind == Kind.CONTROL:
                    control = decode_control(record.payload)
                    if control.what == "registry":
                        index = Index(decode_registry(self.layout.get_blob(control.content)), control.content)
                elif record.kind == Kind.FRAME and index is not None:
                    found.update(_values(index, record.payload))
        return found

    def stop(self) -> None:
        for process in reversed(list(self.processes.values())):
            end(process)


def _values(index: Index, payload: bytes) -> list[Key]:
    times, values, series = frame_arrays(payload, frame_head(payload))
    found = []
    for at_ms, value, number in zip(times.tolist(), values.tolist(), series.tolist(), strict=True):
        device = index.devices[index.series_device[number]]
        found.append((device.wire_id, METRIC_NAMES[index.series_metric[number]], at_ms, value))
    return found
