"""Measure the gateway on Modbus lines: is every poll on time, what does a dead device cost, and what does the box need.

    python -m benchmarks.gateway --minutes 10 --json

The real `citybrain gateway run` asks 64 devices of 10 registers at 1 Hz over 4 pseudo-terminals whose slaves answer at
line speed (115,200 baud 8N1, the silence between frames included), in a process of their own; its readings go through a
real mosquitto to the real `citybrain ingest`.

devices              how many are asked each second
late_polls           that reached their device more than 100 ms late, or not at all, as the slaves saw it: against a
                     grid of whole intervals through the device's earliest poll
line_use             bytes and mandated silence on the wire by the time it took, all four lines asked flat out by the
                     drivers' own schedule
dead_device_delay_s  the most that any other poll was late while one device does not answer
dead_device_others_late  polls of others more than 100 ms late meanwhile (a time-out is 200 ms)
rss_mb, cpu_share    of the gateway's process: largest resident size, CPU seconds by second, from ready to the end
ready_s              from its start until its drivers run and its broker has it
machine_stall_s      the most that an idle process beside it was kept from running: above 0.1 s the machine is too busy
                     for `late_polls` to say anything of the gateway
polls, readings      asked by the gateway; in ingest's log, with the box's own (the last seconds' may be under way)
dropped              what ingest did not use, by reason
turnaround_cpu_ms    CPU of the flat-out process by read: what the machine, not the line, must have
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from api.assets.kinds import metrics_of
from benchmarks.ingest import Bench, cpu_s, started, unused_port
from citybrain.clock import system_clock
from citybrain.counters import Heartbeat
from citybrain.layout import Layout, Run
from citybrain.mailbox import Mailbox, command
from citybrain.model import Device, Gateway, Place, Registry
from edge.drivers.modbus import Bus, Station, plan
from edge.drivers.modbus_rtu import Config, SerialLine
from edge.mailbox import Mailbox as Box
from edge.mailbox import MailboxHost
from streams.runtimes.broker import mosquitto, mosquitto_configuration

GATEWAY, SHARD = "gw-0000", 0
BUSES, DEVICES, BAUD = 4, 16, 115_200
METRICS = ("pressure_mpa", "temperature_c", "battery_v", "water_present", "flow_lps", "quality")
EVENTS = ("tilt_deg", "cap_open", "impact_g", "hammer_mpa")
PLACE = Place(121.47, 31.23, "310104001001001")
LATE_S = 0.1
SETTLE_S = 3.0  # after which the drivers have begun
FLAT_OUT_S = 10.0
Asked = list[dict[str, list[float]]]  # by bus and unit: when, on the monotonic clock


class Lines:
    """The slaves' process."""

    def __init__(self, *words: str) -> None:
        argv = [sys.executable, "-m", "simulators.lines.modbus", "--buses", str(BUSES), "--devices", str(DEVICES)]
        self._process = subprocess.Popen([*argv, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.ports: list[str] = json.loads(self._process.stdout.readline())

    def stop(self) -> Asked:
        """End it; return when which device was asked."""
        out, _ = self._process.communicate("", timeout=30)
        asked: Asked = json.loads(out)
        return asked


def device(bus: int, unit: int) -> str:
    """Name a device."""
    return f"hyd-{bus}-{unit:03d}"


def stations(bus: int) -> tuple[Station, ...]:
    """Return what hangs on a bus."""
    return tuple(Station(device(bus, unit), unit, "hydrant") for unit in range(1, DEVICES + 1))


def configuration(ports: list[str], broker_port: int) -> str:
    """Return the gateway.yaml."""
    drivers = {
        f"bus-{bus}": {
            "driver": "modbus_rtu", "port": port, "baud": BAUD, "interval": "1s", "timeout": "200ms",
            "devices": [msgspec.to_builtins(station) | {"interval": "1s"} for station in stations(bus)],
        }
        for bus, port in enumerate(ports)
    }  # fmt: skip
    broker = {"host": "127.0.0.1", "port": broker_port}
    return json.dumps({"gateway": GATEWAY, "shard": SHARD, "broker": broker, "drivers": drivers})  # JSON is YAML


def registry() -> Registry:
    """Return the gateway and its devices."""
    names = [device(bus, unit) for bus in range(BUSES) for unit in range(1, DEVICES + 1)]
    devices = [Device(name, "hydrant", GATEWAY, PLACE, METRICS, EVENTS) for name in names]
    own = Device(GATEWAY, "gateway", GATEWAY, PLACE, metrics_of("gateway", ())[0])
    return Registry((Gateway(GATEWAY, SHARD, PLACE),), (own, *devices))


@contextmanager
def platform(root: Path) -> Iterator[Bench]:
    """Run mosquitto and ingest for the gateway."""
    program = mosquitto()
    if program is None:
        raise SystemExit("mosquitto is not installed")
    port, layout = unused_port(), Layout(root / "platform")
    layout.run.mkdir(parents=True)
    layout.write_run(Run(clock=system_clock(), shards=1, mqtt_port=port))
    bench = Bench(layout, registry(), port)
    Mailbox(layout.mailbox("ingest")).put(command("registry", "benchmark", 0, {"content": bench.name}))
    (root / "mosquitto.conf").write_text(mosquitto_configuration(port))
    with started(root, program, "-c", str(root / "mosquitto.conf")):
        time.sleep(0.3)
        with started(root, sys.executable, "-m", "citybrain", "ingest", "--data", str(layout.root)):
            bench.wait()
            yield bench


def beat_of(folder: Path) -> Heartbeat | None:
    """Return the gateway's heartbeat, once it has one."""
    path = folder / "run" / "gateway.heartbeat.json"
    return msgspec.json.decode(path.read_bytes(), type=Heartbeat) if path.exists() else None


def rss_mb(pid: int) -> float:
    """Return the largest resident size that a process had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def run_gateway(root: Path, seconds: float, dead: int = 0) -> tuple[Asked, dict[str, Any]]:
    """Let a gateway ask all lines for so long; return when which device was asked, and what the process needed."""
    root.mkdir()
    lines = Lines("--dead", str(dead))
    with platform(root) as bench:
        folder = root / "box"
        folder.mkdir()
        (folder / "gateway.yaml").write_text(configuration(lines.ports, bench.port))
        begun_s = time.monotonic()
        with started(root, sys.executable, "-m", "citybrain", "gateway", "run", "--data", str(folder)) as box:
            while (beat := beat_of(folder)) is None or not beat.gauges.get("online"):
                if box.poll() is not None or time.monotonic() > begun_s + 60:
                    raise SystemExit(f"the gateway does not come up: {(root / 'python.log').read_text()[-2000:]}")
                time.sleep(0.02)
            ready_s = time.monotonic() - begun_s
            cpu_before, since_s = cpu_s(box.pid), time.monotonic()
            stall_s = worst_stall_s(seconds)
            took_s = time.monotonic() - since_s
            needed: dict[str, Any] = {
                "ready_s": round(ready_s, 2),
                "machine_stall_s": round(stall_s, 4),
                "cpu_share": round((cpu_s(box.pid) - cpu_before) / took_s, 4),
                "rss_mb": round(rss_mb(box.pid), 1),
            }
        asked = lines.stop()
        time.sleep(1.0)  # ingest publishes its counters once a second
        platform_beat = bench.beat()
        counters = platform_beat.counters if platform_beat is not None else {}
        needed["readings"] = counters.get("readings_total", 0)
        needed["dropped"] = {name: n for name, n in counters.items() if name.startswith("dropped_total")}
    return asked, needed


def worst_stall_s(seconds: float) -> float:
    """Sleep for so long in steps of 5 ms; return the most that one step took too long."""
    worst_s, end_s = 0.0, time.monotonic() + seconds
    while (before_s := time.monotonic()) < end_s:
        time.sleep(0.005)
        worst_s = max(worst_s, time.monotonic() - before_s - 0.005)
    return worst_s


def lateness(times: list[float], end_s: float) -> tuple[list[float], int]:
    """Return how late each poll of a device was, and how many are missing up to the end.

    >>> late, missing = lateness([0.0, 1.0, 2.25, 4.0], 4.5)
    >>> late, missing
    ([0.0, 0.0, 0.25, 0.0], 1)
    """
    phases = [at - round(at - times[0]) for at in times]
    base = min(phases)
    numbers = {round(at - times[0]) for at in times}
    return [phase - base for phase in phases], int(end_s - times[0]) + 1 - len(numbers)


def judge(asked: Asked, but: int = 0) -> tuple[int, float, int]:
    """Return how many polls were late or missing, how late the latest was, and how many there were.

    but: this unit of the first bus does not count.
    """
    end_s = max(max(times) for bus in asked for times in bus.values() if times) - 1.0
    late_polls, worst_s, polls = 0, 0.0, 0
    for number, bus in enumerate(asked):
        for unit, times in bus.items():
            if number == 0 and int(unit) == but:
                continue
            late, missing = lateness(times, end_s) if times else ([], 1)
            late_polls += sum(one > LATE_S for one in late) + max(0, missing)
            worst_s, polls = max([worst_s, *late]), polls + len(times)
    return late_polls, worst_s, polls


def flat_out(seconds: float) -> dict[str, Any]:
    """Ask all lines as fast as the drivers' schedule goes; return how much of the lines' time was used."""
    lines, boxes, threads = Lines(), [], []
    config = Config("", stations(0), BAUD)
    for bus, port in enumerate(lines.ports):
        box = Box(1)
        own = msgspec.structs.replace(config, port=port)
        asking = Bus(f"bus-{bus}", SerialLine(own), own.devices_, {}, 20)  # an interval that it can never keep
        threads.append(threading.Thread(target=asking.run, args=(MailboxHost(box, system_clock()),)))
        boxes.append(box)
    cpu_before = time.process_time()
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    for box in boxes:
        box.stop()
    for thread in threads:
        thread.join()
    cpu_used = time.process_time() - cpu_before
    asked = lines.stop()
    block = plan(config.devices_, {}, 1000, 0.0)[0].reads[0]
    shares, reads = [], 0
    for one in asked:
        times = sorted(at for unit in one.values() for at in unit)[DEVICES:]  # without the beginning
        shares.append((len(times) - 1) * config.wire_s(block) / (times[-1] - times[0]))
        reads += len(times)
    return {
        "line_use": round(min(shares), 3),
        "line_use_mean": round(statistics.fmean(shares), 3),
        "reads_per_s": round(reads / seconds),
        "turnaround_cpu_ms": round(1000 * cpu_used / reads, 3),
    }


def main() -> int:
    """Run the three measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long all must be on time")
    parser.add_argument("--dead-minutes", type=float, default=1.0, help="how long one device is dead")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        used = flat_out(FLAT_OUT_S)
        asked, needed = run_gateway(Path(folder) / "on-time", 60 * args.minutes)
        late, worst_s, polls = judge(asked)
        asked, _ = run_gateway(Path(folder) / "dead", 60 * args.dead_minutes, dead=DEVICES // 2)
        others_late, delay_s, _ = judge(asked, but=DEVICES // 2)
    result = {
        "devices": BUSES * DEVICES,
        "late_polls": late,
        "worst_late_s": round(worst_s, 4),
        "dead_device_delay_s": round(delay_s, 4),
        "dead_device_others_late": others_late,
        "polls": polls,
        "minutes": args.minutes,
        "cores": os.cpu_count(),
        **needed,
        **used,
    }
    sys.stdout.write(json.dumps(result) + "\n" if args.json else "".join(f"{k}: {v}\n" for k, v in result.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
