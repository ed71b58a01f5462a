"""The samples of the pages do what the pages say: each runs in a real gateway, on a real line, to a real broker.

A sample is taken from its page as it stands; only what names a place (a port's path, an address) is put in.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from citybrain.units import METRICS
from simulators.lines.modbus import RtuBus, Slave, TcpServer, hydrant
from tests.certificates import Authority
from tests.conftest import end, eventually, unused_port
from tests.gateway.test_gateway_service import Answering
from tests.gateway.test_gateway_tls import Site, broker
from tests.gateway_box import Process

DOCS = Path(__file__).parents[2] / "docs"
BY_ID = re.compile(r"/dev/serial/by-id/\S+")
OWN_PUMP = Slave(3, dict(enumerate((0, 0x3E99, 0, 90, 0, 0, 0, 210, 0, 16, 0, 231))), {0: True})
PUMP_ROOM = Slave(1, dict(enumerate((0x3F00, 0, 0x4120, 0, 120, 3800, 40, 210, 231, 0))), {0: True})
# Of each page: which metrics its devices must tell, all of them together.
TOLD = {
    "edge.md": {"pressure_mpa", "local_alarm", "quality"},
    "drivers/modbus.md": {"pressure_mpa", "flow_lps", "level_m", "moving", "water_present", "fault_code", "quality"},
    "drivers/json_lines.md": {"pressure_mpa", "battery_v", "quality"},
    "drivers/elevator_serial.md": {"floor", "moving", "occupied", "door_closed", "service_mode", "fault_code"},
    "drivers/elevator_retrofit.md": {"moving", "temperature_c", "service_mode", "door_closed", "fault_code"},
    "drivers/vibration.md": {name for name in METRICS if name.startswith("vibration_")},
    "drivers/pressure_fast.md": {"pressure_mpa", "pressure_min_mpa", "pressure_max_mpa", "hammer_count", "hammer_mpa"},
}


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def sample(name: str) -> str:
    """Return the page's configuration, all of it."""
    return "\n".join(re.findall(r"```yaml\n(.*?)```", page(name), re.DOTALL))


class Lines:
    """The counterparts of all pages: what a page says to start is started as it says."""

    def __init__(self, folder: Path, undo: ExitStack) -> None:
        self._folder, self._undo = folder, undo

    def command(self, name: str) -> Path:
        """Start the `python -m simulators.lines.…` of a page; return its port."""
        found = re.search(r"`python (-m simulators\.lines\.[^`]+)`", page(name))
        assert found is not None, f"{name} names no counterpart to try it with"
        process = subprocess.Popen(
            [sys.executable, *found[1].split()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=False
        )
        self._undo.callback(end, process)
        assert process.stdout is not None
        return Path(json.loads(process.stdout.readline())["port"])

    def bus(self, *slaves: Slave) -> Path:
        made = RtuBus(self._folder / f"bus-{slaves[0].unit_id}-{len(slaves)}", slaves, 9600)
        made.start()
        self._undo.callback(made.stop)
        return made.wire.port

    def tcp(self) -> int:
        made = TcpServer([PUMP_ROOM])
        made.start()
        self._undo.callback(made.stop)
        return made.port

    def sender(self, port: int, line: str) -> None:
        """Send the page's line a few times a second, as soon as somebody listens."""
        over = threading.Event()

        def send() -> None:
            while not over.wait(0.2):
                try:
                    with socket.create_connection(("127.0.0.1", port), 1) as connected:
                        while not over.wait(0.2):
                            connected.sendall(line.encode() + b"\n")
                except OSError:
                    continue

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        self._undo.callback(thread.join)
        self._undo.callback(over.set)


def placed(name: str, lines: Lines) -> str:
    """Return a page's sample with the places that exist here."""
    text = sample(name)
    if name == "edge.md":
        return BY_ID.sub(str(lines.bus(hydrant(17))), text)
    if name == "drivers/modbus.md":
        text = BY_ID.sub(str(lines.bus(hydrant(17), hydrant(18), OWN_PUMP)), text)
        return text.replace("192.168.10.20", "127.0.0.1").replace("port: 502 ", f"port: {lines.tcp()} ")
    if name == "drivers/json_lines.md":
        port, said = unused_port(), re.search(r'```\n(\{"d".*?)\n```', page(name))
        assert said is not None
        lines.sender(port, said[1])
        return text.replace("listen: 7070 ", f"listen: {port} ")
    return BY_ID.sub(str(lines.command(name)), text)


class Sampled:
    """All pages' samples, each in a gateway of its own, on one broker."""

    def __init__(self, folder: Path, port: int, site: Site, undo: ExitStack) -> None:
        self.boxes: dict[str, Process] = {}
        self.platform = Answering(port)
        undo.callback(self.platform.close)
        lines = Lines(folder, undo)
        for number, name in enumerate(TOLD):
            box = folder / f"box-{number}"
            box.mkdir()
            text = placed(name, lines)
            if text.startswith("gateway:"):
                text = text.replace("mqtt.example.city", "127.0.0.1").replace("port: 8883", f"port: {site.port}")
                _pki(box, site.authority)
            else:
                head = f"gateway: gw-{number}\nshard: 1\nbroker: {{host: 127.0.0.1, port: {port}}}\n"
                text = head + "spool: {commit_every: 200ms}\n" + text
            (box / "gateway.yaml").write_text(text)
            self.boxes[name] = Process(box)
            undo.callback(self.boxes[name].stop)

    def wrong(self, name: str) -> object:
        beat = self.boxes[name].beat()
        return "no heartbeat" if beat is None else beat.details.get("gateway", {}).get("wrong")

    def told(self, name: str) -> set[str]:
        """Return the metrics that the platform has of the devices of a page's gateway."""
        number = list(TOLD).index(name)
        gateway = "gw-0007" if name == "edge.md" else f"gw-{number}"
        devices = set(self.devices(name))
        mine = [one for one in self.platform.by_gateway.get(gateway, []) if one.device in devices]
        return {metric for one in mine for metric in one.values}

    def devices(self, name: str) -> list[str]:
        path = self.boxes[name].folder / "run" / "gateway.points.json"
        return list(msgspec.json.decode(path.read_bytes())["devices"]) if path.exists() else []


def _pki(box: Path, authority: Authority) -> None:
    mine = authority.sign("gw-0007")
    pki = box / "pki"
    pki.mkdir()
    (pki / "ca.pem").write_bytes(authority.ca.read_bytes())
    (pki / "gateway.pem").write_bytes(mine.read_bytes())
    (pki / "gateway.key").write_bytes(mine.with_suffix(".key").read_bytes())


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sampled]:
    folder = tmp_path_factory.mktemp("samples")
    site = Site(folder)
    with broker(site, folder), ExitStack() as undo:
        yield Sampled(folder, site.plain, site, undo)


def until(holds: Callable[[], bool], sampled: Sampled, name: str) -> None:
    box = sampled.boxes[name]
    try:
        eventually(holds, 40, name)
    except BaseException:
        print(sampled.wrong(name), sampled.told(name), box.said(), sep="\n")
        raise


@pytest.mark.parametrize("name", TOLD)
def test_the_sample_of_a_page_runs_and_every_metric_arrives(sampled: Sampled, name: str) -> None:
    until(lambda: sampled.told(name) >= TOLD[name], sampled, name)
    until(lambda: sampled.wrong(name) == {}, sampled, name)
    assert sampled.boxes[name].process.poll() is None
