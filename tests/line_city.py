"""A city with one box: its centre as `citybrain run` starts it, a grid platform, a ledger, and a gateway on real lines.

Everything is enrolled and imported as a technician and a clerk do it; the box is a process of its own and reaches the
broker with its certificate. Numbers of rules are the library's but those of `SHORTER`.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec

from citybrain.layout import Layout
from citybrain.model import Device
from rules.files import LIBRARY
from simulators.district import build
from simulators.export import contents
from simulators.lines.elevator import Line
from simulators.lines.modbus import RtuBus, hydrant
from simulators.lines.retrofit import LANDINGS, RATE_HZ, Journey, Tick, told
from simulators.lines.talker import Talker
from simulators.lines.video import Planted, Street, write_video
from simulators.world.sheets import ASSET_HEADER, asset_row
from streams.runtimes.embedded import PORTS
from tests.conftest import end, eventually, unused_port

GATEWAY, SHARD = "gw-0007", 1
FASTER = 16  # the kit's own clock against ours: everything it measures runs on it
# What a test cannot wait for, by rule: a dwell and a silence of ten minutes.
SHORTER = {
    "camera_garbage": ("above: 600", "above: 3"),
    "hydrant_silent": ("on_delay: 10min", "on_delay: 5s"),
}
BOX = """\
spool: {{commit_every: 10s}}
drivers:
  bus-0:
    driver: modbus_rtu
    port: {lines}/bus
    baud: 115200
    interval: 1s
    devices:
      - {{device: hyd-a, unit_id: 1, map: hydrant}}
      - {{device: hyd-b, unit_id: 2, map: hydrant}}
  lifts:
    driver: elevator_serial
    port: {lines}/lifts
    region: regional_11
    devices: [{{device: lift-a, station: 1}}]
  kit:
    driver: elevator_retrofit
    port: {lines}/kit
    devices: [{{device: lift-b, station: 1, floors: {{-1: 0, 1: 4.2, 2: 7.4, 3: 10.6}}}}]
  cam:
    driver: camera
    device: cam-a
    source: {lines}/street.avi
    repeat: true
    regions:
      bins: {{sees: garbage, polygon: [[0.08, 0.55], [0.4, 0.55], [0.4, 0.95], [0.08, 0.95]], dwell: 4s}}
"""


def citybrain(*words: str) -> Any:
    """Run a command that must succeed, as a person would; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "citybrain", *words, "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"citybrain {' '.join(words)}: {done.stderr}{done.stdout}"
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout else None


def rules_for_a_test(folder: Path) -> Path:
    """Return the library with the numbers of `SHORTER`, as a city tunes a copy of it."""
    shutil.copytree(LIBRARY, folder, ignore=shutil.ignore_patterns("scenarios"))
    for rule, (old, new) in SHORTER.items():
        [file] = [one for one in folder.glob("*.yaml") if f"id: {rule}\n" in one.read_text(encoding="utf-8")]
        head, tail = file.read_text(encoding="utf-8").split(f"id: {rule}\n")
        assert old in tail, f"{rule} has no {old!r} any more"
        file.write_text(f"{head}id: {rule}\n{tail.replace(old, new, 1)}", encoding="utf-8")
    return folder


def sheets(folder: Path) -> list[Device]:
    """Write what a city hands over: its map and units as they are, and a sheet of what stands behind the box."""
    district = build(7)
    for name, content in contents(district):
        if name.endswith(".geojson") or name == "organisation.csv":
            (folder / name).write_bytes(content)
    standing = {device.id: device for device in district.registry.devices}
    lifts = [device for device in standing.values() if device.kind == "elevator"]
    behind = [
        renamed(standing["hyd-000003"], "hyd-a"),
        renamed(standing["hyd-000117"], "hyd-b"),
        renamed(lifts[0], "lift-a", tags=("controller",)),
        renamed(lifts[1], "lift-b", tags=("retrofit",)),
        renamed(standing["hyd-000044"], "cam-a", kind="camera", name="路口摄像机", zone="", tags=()),
    ]
    rows = io.StringIO(newline="")
    csv.writer(rows).writerows([ASSET_HEADER, *map(asset_row, behind)])
    (folder / "assets.csv").write_text(rows.getvalue(), encoding="utf-8-sig")
    at = standing["gw-01"].place
    (folder / "gateways.csv").write_text(
        f"编号,分片,经度,纬度\n{GATEWAY},{SHARD},{at.lon},{at.lat}\n", encoding="utf-8"
    )
    return behind


def renamed(device: Device, id: str, **changes: Any) -> Device:
    """Return what stands there as an asset of ours behind the box."""
    return msgspec.structs.replace(device, id=id, gateway=GATEWAY, **changes)


class Kit:
    """A car with a kit, faster than ours by `FASTER`: it waits at the ground floor until it is to get stuck."""

    def __init__(self, port: Path) -> None:
        self.stuck = False
        self._ticks = self._ride(Journey(LANDINGS, 1))
        self.talker = Talker(port, 115_200, self._told, 2 / RATE_HZ / FASTER)

    def _told(self, _: float) -> list[tuple[int, int, bytes]]:
        return [frame for _ in range(2) for frame in told(1, next(self._ticks))]

    def _ride(self, journey: Journey) -> Iterator[Tick]:
        while not self.stuck:
            yield from journey.stand(1)
        journey.door_closed, journey.people = False, True
        yield from journey.stand(4)
        journey.door_closed = True
        yield from journey.stand(2)
        yield from journey.ride(LANDINGS[2] + 1.5)
        while True:
            yield from journey.stand(10)


class Lines:
    """What is wired to the box."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.bus = RtuBus(folder / "bus", [hydrant(1), hydrant(2)])
        self.lifts = Line(folder / "lifts", "regional_11")
        self.kit = Kit(folder / "kit")
        self._all: list[Any] = [self.bus, self.lifts.talker, self.kit.talker]

    def __enter__(self) -> Lines:
        street = Street(5, [Planted("garbage", 8.0)], columns=320, rows=180)
        write_video(self.folder / "street.avi", (image for _, image in street.frames(60.0, 10.0)), 10.0)
        for one in self._all:
            one.start()
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._all:
            one.stop()


class City:
    """Everything that runs, and what is to be seen of it."""

    def __init__(self, root: Path) -> None:
        self.layout = Layout(root / "centre")
        self.data = ("--data", str(self.layout.root))
        self.lines = Lines(root / "lines")
        self.standing: dict[str, Device] = {}
        self.box = root / "box"
        self.api = httpx.Client(trust_env=False, timeout=20)
        self._root = root

    def found(self) -> None:
        """Make the authority, the broker's configuration, the secrets and what the box will be told."""
        citybrain("run", "--prepare", *self.data, *(f"--{name.replace('_', '-')}={unused_port()}" for name in PORTS))
        listen, broker = f"127.0.0.1:{unused_port()}", str(unused_port())
        citybrain("ca", "init", "--host", "127.0.0.1", "--listen", listen, "--broker-port", broker, *self.data)
        citybrain("ca", "broker", "--port", broker, "--bind", "127.0.0.1", *self.data)
        self.layout.templates.mkdir()
        text = BOX.format(lines=self.lines.folder)
        (self.layout.templates / f"{GATEWAY}.yaml").write_text(text, encoding="utf-8")
        self.api.base_url = httpx.URL(f"http://127.0.0.1:{self.layout.read_run().api_port}")

    def provision(self) -> None:
        """Put rules in force, import the sheets, and enrol the box."""
        handed = self._root / "sheets"
        handed.mkdir()
        citybrain("rules", "activate", str(rules_for_a_test(self._root / "rules")), *self.data)
        self.standing = {device.id: device for device in sheets(handed)}
        citybrain("devices", "import", str(handed), "--wait", "20", *self.data)
        invited = citybrain("devices", "enrol-code", GATEWAY, *self.data)
        citybrain("gateway", "enrol", "--qr-text", invited["qr"], "--data", str(self.box))

    def get(self, path: str, **query: Any) -> Any:
        """Return what the API answers."""
        answer = self.api.get(path, params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def cases(self, subject: str = "") -> list[dict[str, Any]]:
        """Return all cases, rescues and maintenance orders, or those of a device."""
        found = self.get("/v1/cases", state="all", limit=200)["items"]
        return [one for one in found if subject in ("", one["subject"])]

    def value(self, device: str, metric: str) -> float | None:
        """Return the latest value of a device's metric at the platform."""
        values = self.get(f"/v1/devices/{device}")["values"]
        return values[metric]["value"] if metric in values else None

    def at(self, device: str, metric: str) -> int:
        """Return the time of the latest value of a device's metric at the platform (Unix ms), 0 where there is none."""
        values = self.get(f"/v1/devices/{device}")["values"]
        return int(values[metric]["at"]) if metric in values else 0

    def delivered(self) -> list[dict[str, Any]]:
        """Return the messages that the grid platform has taken, as it wrote them down."""
        path = self.layout.root / "platform" / "received.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def until(self, holds: Callable[[], object], within_s: float, what: str) -> None:
        eventually(holds, within_s, what)


@contextlib.contextmanager
def running(layout: Layout, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command of the centre until the end of the block."""
    argv = [sys.executable, "-P", "-m", "citybrain", *words, "--data", str(layout.root)]
    with (layout.root / f"{words[0]}.log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        yield process
    finally:
        end(process)


def alive(city: City) -> bool:
    """Whether the centre is live."""
    try:
        return city.api.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False
