"""The distributed runtime for real, each part a process of its own that can be killed, stopped or cut off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.faults_lines import Line, Lines
from benchmarks.faults_load import registry_of, ruleset
from citybrain.clock import RunClock, monotonic_s, real_unix_ms
from citybrain.layout import Layout, Run
from citybrain.mailbox import Mailbox, command
from streams.registry import encode_registry
from streams.ruleset import encode_ruleset
from streams.runtimes.broker import broker_command, mosquitto
from streams.runtimes.embedded import make_secrets
from streams.runtimes.kafka.store import KafkaStore
from streams.runtimes.supervisor import accepts
from tests.conftest import eventually, unused_port
from tests.kafka_cluster import Cluster, artifacts

SHARDS = 2
BROKERS = 3
RESTART_S = 1.0  # whoever ends by itself is started again after that, as a service manager does
END_S = 20.0
START_S = 120.0
PACE = 100.0  # the platform works no case to its end meanwhile: then an alarm that holds stays open
HOST = "127.0.0.1"


class Process:
    """A program that is kept running until `end`; signals go to its whole process group."""

    def __init__(self, name: str, argv: Sequence[str], folder: Path, port: int = 0) -> None:
        self.name = name
        self.port = port  # where it listens; 0: nowhere
        self.ended: Counter[int] = Counter()  # exit codes of those that ended by themselves
        self._argv = ["setpriv", "--pdeathsig", "KILL", *argv]  # none outlives the benchmark
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._held = False  # we keep it down
        self._due_s = 0.0

    @property
    def well(self) -> bool:
        """Whether it runs, and listens where it should."""
        return (
            self._process is not None and self._process.poll() is None and (not self.port or accepts(HOST, self.port))
        )

    def start(self) -> None:
        self._held = False
        with (self._folder / f"{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def tend(self) -> None:
        """Start it again where it ended by itself."""
        if self._process is None or self._held or self._process.poll() is None:
            return
        if not self._due_s:
            self.ended[self._process.returncode] += 1
            self._due_s = monotonic_s() + RESTART_S
        elif monotonic_s() >= self._due_s:
            self._due_s = 0.0
            self.start()

    def kill(self) -> None:
        """End it as a crash would; it stays down until `start`."""
        self._held = True
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait(END_S)

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def end(self, number: signal.Signals = signal.SIGTERM, within_s: float = END_S) -> int | None:
        """Tell it to end; return its exit code, None where it had to be killed."""
        self._held = True
        if self._process is None:
            return None
        self._signal(signal.SIGCONT)
        self._signal(number)
        try:
            return self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, number)


class Victim(NamedTuple):
    """A kind of part that faults happen to: its processes, and whether it has a line that can be cut."""

    kind: str
    members: tuple[str, ...]
    cuttable: bool


VICTIMS = (
    Victim("ingest", ("ingest-0", "ingest-1"), cuttable=True),  # from the MQTT broker
    Victim("worker", ("worker-a", "worker-b"), cuttable=False),  # Kafka sees no difference to one that is stopped
    Victim("desk", ("desk",), cuttable=False),
    Victim("kafka", tuple(f"kafka-{number}" for number in range(1, BROKERS + 1)), cuttable=True),
    Victim("mosquitto", ("mosquitto",), cuttable=True),
    Victim("gateways", ("gateways",), cuttable=True),  # from the MQTT broker
)


class Site:
    """All parts, by name, and the lines before or behind those that can be cut off, by the same names."""

    def __init__(self, root: Path, lines: Lines, rate: float, causes: int, seed: int) -> None:
        self.layout = Layout(root / "data")
        self.processes: dict[str, Process] = {}
        self.lines: dict[str, Line] = {}
        self._root = root
        self._net = lines
        self._rate, self._causes, self._seed = rate, causes, seed
        self.address = ""

    @property
    def store(self) -> KafkaStore:
        """All logs, as a reader sees them."""
        return KafkaStore(self.address, self.layout, SHARDS)

    def start(self) -> None:
        """Start everything, part after part, and wait until the registry and the rules are in force."""
        self.layout.make()
        self._start_kafka()
        run = self._prepare()
        self._start_mosquitto(run)
        now_ms = run.clock.now_ms()
        for shard in range(SHARDS):
            box = Mailbox(self.layout.mailbox(f"ingest-{shard}"))
            for position, (what, content) in enumerate(self._content().items()):
                box.put(command(what, "faults", now_ms + position, {"content": content}))
            port = self._line(f"ingest-{shard}", self.lines["mosquitto"].port)
            self._citybrain(f"ingest-{shard}", "ingest", "--shards", str(shard), "--port", str(port))
        for name in ("worker-a", "worker-b"):
            self._citybrain(name, "worker", "--runtime", "kafka", "--name", name)
        self._citybrain("desk", "desk")
        self._add("platform", self._argv("platform", "--pace", str(PACE)), run.platform_port).start()
        eventually(self._provisioned, START_S, "registry and rules in force")
        load = [sys.executable, "-m", "benchmarks.faults_load", "--data", str(self.layout.root)]
        self._add("gateways", [*load, "--rate", str(self._rate), "--causes", str(self._causes)]).start()

    def _content(self) -> dict[str, str]:
        return {
            "registry": self.layout.put_blob(encode_registry(registry_of(SHARDS, self._causes))),
            "ruleset": self.layout.put_blob(encode_ruleset(ruleset())),
        }

    def _prepare(self) -> Run:
        now_ms = real_unix_ms()
        self._line("gateways", self.lines_to_mosquitto())
        run = Run(
            RunClock(now_ms, now_ms),
            shards=SHARDS,
            seed=self._seed,
            mqtt_port=self.lines["gateways"].port,
            platform_port=unused_port(),
        )
        self.layout.write_run(run)
        make_secrets(self.layout)
        return run

    def lines_to_mosquitto(self) -> int:
        """Return the port of the line before the MQTT broker, which listens behind it."""
        return self._line("mosquitto", unused_port())

    def _start_mosquitto(self, run: Run) -> None:
        program = mosquitto()
        if program is None:
            raise SystemExit("mosquitto is not installed: apt-get install mosquitto")
        port = self.lines["mosquitto"].target
        self._add("mosquitto", broker_command(self.layout, port, program), port).start()

    def _start_kafka(self) -> None:
        cluster = Cluster(self._root / "kafka", BROKERS, artifacts())
        for broker in cluster.brokers:
            broker.advertised = self._line(f"kafka-{broker.node}", broker.port)
        cluster.prepare()
        self.address = cluster.address
        for broker in cluster.brokers:
            argv = broker.java("kafka.Kafka", str(broker.properties))
            self._add(f"kafka-{broker.node}", argv, broker.port).start()
        cluster.wait()

    def _line(self, name: str, target: int) -> int:
        self.lines[name] = self._net.line(target)
        return self.lines[name].port

    def _add(self, name: str, argv: Sequence[str], port: int = 0) -> Process:
        self.processes[name] = Process(name, argv, self._root, port)
        return self.processes[name]

    def _argv(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "citybrain", arguments[0], "--data", str(self.layout.root), *arguments[1:]]

    def _citybrain(self, name: str, *arguments: str) -> None:
        self._add(name, [*self._argv(*arguments), "--log", "kafka", "--kafka", self.address]).start()

    def _provisioned(self) -> bool:
        self.tend()
        boxes = [self.layout.mailbox(f"ingest-{shard}") for shard in range(SHARDS)]
        return self.layout.read_active() is not None and not any(list(box.glob("*.json")) for box in boxes)

    def tend(self) -> None:
        """Start again whoever ended by itself."""
        for process in self.processes.values():
            process.tend()

    def platform_cases(self) -> list[dict[str, Any]]:
        """Return what the grid platform holds."""
        url = f"http://{HOST}:{self.layout.read_run().platform_port}/cases"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return list(json.loads(answer.read())["cases"])

    def end(self, names: Sequence[str]) -> None:
        """End some parts, in this order."""
        for name in names:
            if name in self.processes:
                self.processes[name].end()

    def end_all(self) -> None:
        """End everything that still runs, Kafka last."""
        names = sorted(self.processes, key=lambda name: name.startswith("kafka"))
        for name in names:
            self.processes[name].end(signal.SIGKILL)


@contextmanager
def running(root: Path, rate: float, causes: int, seed: int) -> Iterator[Site]:
    """A whole site; it ends with the block."""
    with ExitStack() as stack:
        site = Site(root, stack.enter_context(Lines()), rate, causes, seed)
        stack.callback(site.end_all)
        site.start()
        yield site
