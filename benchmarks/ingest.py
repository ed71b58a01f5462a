"""Measure ingest: a real broker, the real `citybrain ingest`, simulated gateways that wait for their acknowledgements.

    python -m benchmarks.ingest --json

messages_per_s         durable (synced and acknowledged) messages/s, by readings in each; columns encoding
json_readings_per_s    durable readings/s with 100 readings a message, JSON; a reading has four values
columns_readings_per_s the same in columns
p99_ack_ms             from when a message was due until its acknowledgement came, at half of the measured load
lost                   acknowledged messages that the log does not hold (and `repeated`: holds more than once)

All processes share the machine; `cpu` in the details says who used how much of a core.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from citybrain.clock import system_clock
from citybrain.counters import Heartbeat
from citybrain.layout import Layout, Run
from citybrain.mailbox import Mailbox, command
from citybrain.model import Device, Gateway, Place, Registry
from citybrain.segments import Reader
from streams.log import Kind, frame_head
from streams.registry import Index, encode_registry
from streams.runtimes.broker import mosquitto, mosquitto_configuration

SHARDS = 2
PLACE = Place(121.47, 31.23, "310104001001001")


def make_registry(gateways: int, devices: int) -> Registry:
    """Return gateways with `devices` elevators each."""
    names = [f"gw-{n:04d}" for n in range(gateways)]
    return Registry(
        tuple(Gateway(name, n % SHARDS, PLACE) for n, name in enumerate(names)),
        tuple(
            Device(f"elv-{n:04d}-{d:03d}", "elevator", name, PLACE, ("floor", "moving", "vibration_rms_g", "current_a"))
            for n, name in enumerate(names)
            for d in range(devices)
        ),
    )


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program, its words in a file of the folder; end it by its id."""
    with (
        (folder / f"{Path(arguments[0]).name}.log").open("wb") as log,
        subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=log) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def cpu_s(pid: int) -> float:
    """Return the processor time a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Bench:
    """The system under test."""

    def __init__(self, layout: Layout, registry: Registry, port: int) -> None:
        self.layout = layout
        self.port = port
        self.name = layout.put_blob(encode_registry(registry))
        self.index = Index(registry, self.name)
        self.acked: dict[tuple[int, int], int] = {}  # (epoch, gateway number) -> acknowledged
        self.pids: dict[str, int] = {}
        self._epoch = 0

    def beat(self) -> Heartbeat | None:
        path = self.layout.run / "ingest.heartbeat.json"
        return msgspec.json.decode(path.read_bytes(), type=Heartbeat) if path.exists() else None

    def wait(self) -> None:
        """Wait until ingest is connected and has its registry."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            beat = self.beat()
            if beat is not None and beat.gauges.get("connected") and beat.counters.get("commands_total"):
                return
            time.sleep(0.05)
        raise SystemExit("ingest did not come up within 60 s")

    def load(self, readings: int, encoding: str, rate: float, seconds: float) -> dict[str, Any]:
        """Run the load generator once; return its result, with the share of a core that each process used."""
        self._epoch += 1
        before = {name: cpu_s(pid) for name, pid in self.pids.items()}
        start = time.monotonic()
        options = {
            "--data": self.layout.root,
            "--registry": self.name,
            "--port": self.port,
            "--epoch": self._epoch,
            "--readings": readings,
            "--encoding": encoding,
            "--rate": rate,
            "--seconds": seconds,
        }
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.load", *(str(word) for pair in options.items() for word in pair)],
            stdout=subprocess.PIPE,
            check=True,
        )
        result: dict[str, Any] = json.loads(done.stdout)
        for name, seq in result.pop("acked").items():
            self.acked[self._epoch, self.index.gateway_index[name]] = seq
        passed = time.monotonic() - start
        result["cpu"] = {name: round((cpu_s(pid) - before[name]) / passed, 2) for name, pid in self.pids.items()}
        return result

    def verify(self) -> tuple[int, int]:
        """Return (acknowledged messages that the log does not hold, messages it holds more than once)."""
        found: Counter[tuple[int, int, int]] = Counter()
        for shard in range(SHARDS):
            for record in Reader(self.layout.log(shard)):
                if record.kind == Kind.FRAME:
                    head = frame_head(record.payload)
                    found[head.epoch, head.gateway, head.seq] += 1
        lost = sum(
            1
            for (epoch, gateway), acked in self.acked.items()
            for seq in range(1, acked + 1)
            if not found[epoch, gateway, seq]
        )
        return lost, sum(count - 1 for count in found.values())


def measure(bench: Bench, seconds: float) -> dict[str, Any]:
    """Run all loads."""
    details: dict[str, Any] = {}
    for readings in (1, 10, 100):
        details[f"columns_{readings}"] = bench.load(readings, "columns", 0.0, seconds)
    details["json_100"] = bench.load(100, "json", 0.0, seconds)
    for name, readings in (("columns_1", 1), ("columns_100", 100)):
        half = details[name]["messages_per_s"] / 2
        details[f"half_{name}"] = bench.load(readings, "columns", half, seconds)
    return details


def run(root: Path, gateways: int, seconds: float) -> dict[str, Any]:
    """Start broker and ingest on an empty data folder, measure, stop them, verify the log."""
    layout, port = Layout(root / "data"), unused_port()
    layout.make()
    layout.write_run(Run(clock=system_clock(), shards=SHARDS, mqtt_port=port))
    bench = Bench(layout, make_registry(gateways, 100), port)
    Mailbox(layout.mailbox("ingest")).put(command("registry", "benchmark", 0, {"content": bench.name}))
    program = mosquitto()
    if program is None:
        raise SystemExit("mosquitto is not installed")
    configuration = root / "mosquitto.conf"
    configuration.write_text(mosquitto_configuration(port))
    with started(root, program, "-c", str(configuration)) as broker:
        time.sleep(0.3)
        with started(root, sys.executable, "-m", "citybrain", "ingest", "--data", str(layout.root)) as ingest:
            bench.wait()
            bench.pids = {"mosquitto": broker.pid, "ingest": ingest.pid}
            details = measure(bench, seconds)
    lost, repeated = bench.verify()
    return {
        "messages_per_s": {str(n): round(details[f"columns_{n}"]["messages_per_s"]) for n in (1, 10, 100)},
        "json_readings_per_s": round(details["json_100"]["readings_per_s"]),
        "columns_readings_per_s": round(details["columns_100"]["readings_per_s"]),
        "p99_ack_ms": round(max(details[f"half_columns_{n}"]["p99_ms"] for n in (1, 100)), 1),
        "lost": lost,
        "repeated": repeated,
        "gateways": gateways,
        "cores": os.cpu_count(),
        "details": details,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gateways", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0, help="measured time of each load")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ingest-") as folder:
        result = run(Path(folder), options.gateways, options.seconds)
    print(json.dumps(result) if options.json else "\n".join(f"{key:24} {value}" for key, value in result.items()))
    return 0 if not result["lost"] and not result["repeated"] else 1


if __name__ == "__main__":
    sys.exit(main())
