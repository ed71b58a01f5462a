"""The platform's side of the benchmark, and the gateway: processes that can be killed and come back."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from benchmarks.gateway_chaos.box import DEVICES, GATEWAY, SHARD
from benchmarks.gateway_chaos.source import Cable
from benchmarks.ingest import unused_port
from citybrain.clock import system_clock
from citybrain.counters import Heartbeat
from citybrain.layout import Layout, Run
from citybrain.mailbox import Mailbox, command
from citybrain.model import Device, Gateway, Place, Registry
from streams.registry import encode_registry
from streams.runtimes.broker import mosquitto, mosquitto_configuration

PLACE = Place(120.16, 31.19, "990101001001001")
PATIENCE_S = 60.0


def registry(count: int = DEVICES) -> Registry:
    """Return the gateway with its meters."""
    meters = (Device(f"meter-{n}", "meter", GATEWAY, PLACE, ("value",), ("evidence",)) for n in range(count))
    return Registry((Gateway(GATEWAY, SHARD, PLACE),), tuple(meters))


def gateway_yaml(broker: int, source: int) -> str:
    """Return the configuration of the real gateway."""
    devices = ", ".join(f"meter-{n}: meter-{n}" for n in range(DEVICES))
    return f"""\
gateway: {GATEWAY}
shard: {SHARD}
broker: {{host: 127.0.0.1, port: {broker}}}
spool: {{limit_mb: 32, commit_every: 250ms}}
drivers:
  lines:
    driver: json_lines
    connect: "127.0.0.1:{source}"
    devices: {{{devices}}}
    metrics: {{evidence: {{metric: evidence, lane: event}}}}
"""


class Platform:
    """Broker, ingest and gateway as processes that can be killed and come back."""

    def __init__(self, root: Path, card: Path, source: int, registry: Registry, *, real: bool = False) -> None:
        self.layout = Layout(root / "data")
        self.card = card
        self.port = unused_port()
        self.cable = Cable(self.port)
        self._root = root
        self._source = source
        self._registry = registry
        self._real = real
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start broker and ingest with the registry in force; the gateway is started apart."""
        self.layout.make()
        self.layout.write_run(Run(clock=system_clock(), shards=1, mqtt_port=self.port))
        name = self.layout.put_blob(encode_registry(self._registry))
        Mailbox(self.layout.mailbox("ingest")).put(command("registry", "benchmark", 0, {"content": name}))
        (self.card / "gateway.yaml").write_text(gateway_yaml(self.cable.port, self._source))
        (self._root / "mosquitto.conf").write_text(mosquitto_configuration(self.port))
        self.spawn("broker")
        self.spawn("ingest")
        wait(lambda: self.counted("commands_total") > 0, "ingest has its registry")

    def spawn(self, name: str) -> None:
        """Start a process; its words go to a file."""
        program = mosquitto()
        assert program is not None, "main looked for it"
        ports = ("--source", str(self._source), "--broker", str(self.cable.port))
        words: dict[str, tuple[str, ...]] = {
            "broker": (program, "-c", str(self._root / "mosquitto.conf")),
            "ingest": (sys.executable, "-m", "citybrain", "ingest", "--data", str(self.layout.root)),
            "gateway": (
                sys.executable, "-m", "benchmarks.gateway_chaos.box", "--spool", str(self.card / "spool"), *ports,
            ),
        }  # fmt: skip
        if self._real:
            words["gateway"] = (sys.executable, "-m", "citybrain", "gateway", "run", "--data", str(self.card))
        with (self._root / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(words[name], stdout=log, stderr=log)

    def kill(self, name: str) -> None:
        """Kill -9, and start again at once."""
        process = self._running[name]
        if process.poll() is not None:
            raise SystemExit(f"{name} had ended by itself ({process.returncode}); see {self._root / name}.log")
        process.kill()
        process.wait()
        self.spawn(name)

    def pid(self, name: str) -> int:
        return self._running[name].pid

    def counted(self, name: str) -> int:
        """Return a counter of ingest, as its heartbeat has it."""
        path = self.layout.run / "ingest.heartbeat.json"
        return msgspec.json.decode(path.read_bytes(), type=Heartbeat).counters.get(name, 0) if path.exists() else 0

    def stop(self) -> None:
        """End what runs, by its id."""
        self.cable.stop()
        for name in ("gateway", "ingest", "broker"):
            process = self._running.pop(name, None)
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def wait(condition: Callable[[], bool], what: str, limit_s: float = PATIENCE_S) -> float:
    """Wait until the condition holds; return how long that took, or end the benchmark."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > limit_s:
            raise SystemExit(f"not within {limit_s:.0f} s: {what}")
        time.sleep(0.02)
    return time.monotonic() - start
