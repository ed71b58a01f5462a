"""The distributed runtime for real, each part a process of its own that can be killed, stopped or cut off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from sqlalchemy import Engine

from benchmarks.faults.lines import Line, Lines
from benchmarks.faults.load import registry_of, ruleset
from citybrain.clock import RunClock, monotonic_s, real_unix_ms
from citybrain.counters import Heartbeat, read_heartbeats
from citybrain.db.migrations import upgrade
from citybrain.db.store import open_store
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
from tests.postgres import PASSWORD, USER
from tests.postgres import Cluster as Server
from tests.victoria import Victoria

SHARDS = 2
BROKERS = 3
RESTART_S = 1.0  # whoever ends by itself is started again after that, as a service manager does
END_S = 20.0
START_S = 120.0
PACE = 100.0  # the platform works no case to its end meanwhile: then an alarm that holds stays open
HOST = "127.0.0.1"
DESKS = ("desk-a", "desk-b")
HOLDER = "desk"  # the one of the desks that has the lease


class Process:
    """A program that is kept running until `end`; signals go to it and to all its children."""

    def __init__(
        self, name: str, argv: Sequence[str], folder: Path, port: int = 0, owner: tuple[int, int] | None = None
    ) -> None:
        self.name = name
        self.port = port  # where it listens; 0: nowhere
        self.ended: Counter[int] = Counter()  # exit codes of those that ended by themselves
        becomes = [f"--reuid={owner[0]}", f"--regid={owner[1]}", "--clear-groups"] if owner and not os.getuid() else []
        self._argv = ["setpriv", *becomes, "--pdeathsig", "KILL", *argv]  # none outlives the benchmark
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._held = False  # we keep it down
        self._due_s = 0.0

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    @property
    def well(self) -> bool:
        """Whether it runs, and listens where it should."""
        return (
            self._process is not None and self._process.poll() is None and (not self.port or accepts(HOST, self.port))
        )

    def start(self) -> None:
        self._held, self._due_s = False, 0.0
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
        if self._process is None or self._process.poll() is not None:
            return
        for pid in family(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def family(pid: int) -> list[int]:
    """Return a process and all that descend from it. PostgreSQL's backends have process groups of their own."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            parent = int(path.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


class Victim(NamedTuple):
    """A kind of part that faults happen to: its processes, whether it has a line that can be cut, and where its faults
    are felt: by the desk, or by who reads values in InfluxDB.
    """

    kind: str
    members: tuple[str, ...]
    cuttable: bool
    felt: Literal["desk", "influx"] = "desk"


VICTIMS = (
    Victim("ingest", ("ingest-0", "ingest-1"), cuttable=True),  # from the MQTT broker
    Victim("worker", ("worker-a", "worker-b"), cuttable=False),  # Kafka sees no difference to one that is stopped
    Victim("desk", (HOLDER,), cuttable=True),  # from the database
    Victim("kafka", tuple(f"kafka-{number}" for number in range(1, BROKERS + 1)), cuttable=True),
    Victim("postgres", ("postgres",), cuttable=True),
    Victim("mosquitto", ("mosquitto",), cuttable=True),
    Victim("gateways", ("gateways",), cuttable=True),  # from the MQTT broker
    Victim("influx", ("victoria",), cuttable=True, felt="influx"),
    Victim("projection", ("influx",), cuttable=False, felt="influx"),  # who writes to it
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
        self.address = self.stored_url = ""
        self.books: Engine  # the desk's database, to read; behind the lines
        self._server: Server | None = None
        self._database: Callable[[int], str]  # by the port it is reached at

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
        self._start_postgres()
        now_ms = run.clock.now_ms()
        for shard in range(SHARDS):
            box = Mailbox(self.layout.mailbox(f"ingest-{shard}"))
            for position, (what, content) in enumerate(self._content().items()):
                box.put(command(what, "faults", now_ms + position, {"content": content}))
            port = self._line(f"ingest-{shard}", self.lines["mosquitto"].port)
            self._citybrain(f"ingest-{shard}", "ingest", "--shards", str(shard), "--port", str(port))
        for name in ("worker-a", "worker-b"):
            self._citybrain(name, "worker", "--runtime", "kafka", "--name", name)
        for name in DESKS:
            url = self._database(self._line(name, self.lines["postgres"].port))
            self._citybrain(name, "desk", "--name", name, "--database", url)
        self._start_influx()
        self._add("platform", self._argv("platform", "--pace", str(PACE)), run.platform_port).start()
        eventually(self._provisioned, START_S, "registry and rules in force")
        load = [sys.executable, "-m", "benchmarks.faults.load", "--data", str(self.layout.root)]
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

    def _start_postgres(self) -> None:
        """Make a database with this version's tables; what runs then is ours to kill."""
        self._server = Server.ours()
        assert self._server.folder is not None
        name = self._server.database("template0")
        store = open_store(self._server.url(name))
        upgrade(store)
        store.dispose()
        self._server.stop()
        password = self.layout.secrets / "postgres.password"
        password.write_text(PASSWORD)
        password.chmod(0o600)
        port, owner = urlsplit(self._server.base).port or 0, self._server.folder.stat()
        self._database = f"postgresql://{USER}@{HOST}:{{}}/{name}?password_file={password}".format
        self._add("postgres", self._server.argv, port, (owner.st_uid, owner.st_gid)).start()
        self._line("postgres", port)
        self.books = open_store(self._database(port), readonly=True)

    def _start_influx(self) -> None:
        server = Victoria(self._root / "victoria")
        self._add("victoria", server.argv, server.port).start()
        self.stored_url = server.url  # behind the line
        url = f"http://{HOST}:{self._line('victoria', server.port)}"
        config = {"url": url, "org": "citybrain", "bucket": "readings"}
        (self.layout.root / "influx.yaml").write_text("".join(f"{key}: {value}\n" for key, value in config.items()))
        eventually(lambda: self.processes["victoria"].well, START_S, "VictoriaMetrics listening")
        self._citybrain("influx", "influx")

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

    def _add(self, name: str, argv: Sequence[str], port: int = 0, owner: tuple[int, int] | None = None) -> Process:
        self.processes[name] = Process(name, argv, self._root, port, owner)
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

    def beat(self, name: str) -> Heartbeat | None:
        """Return a process's last heartbeat."""
        return next((beat for beat in read_heartbeats(self.layout.run) if beat.process == name), None)

    def log_ends(self) -> list[int]:
        """Return the offset behind the last record of each shard's log now."""
        return [self.store.end("log", shard) for shard in range(SHARDS)]

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
        if self._server is not None:
            self.books.dispose()
            self._server.remove()


@contextmanager
def running(root: Path, rate: float, causes: int, seed: int) -> Iterator[Site]:
    """A whole site; it ends with the block."""
    with ExitStack() as stack:
        site = Site(root, stack.enter_context(Lines()), rate, causes, seed)
        stack.callback(site.end_all)
        site.start()
        yield site
