"""The whole path: gateways, mosquitto, `citybrain ingest`, Kafka, `citybrain worker`, until the last transition.

The gateways keep the wire contract (benchmarks.load): columns, windows, acknowledgements. Their bodies are encoded
beforehand; every `EVERY`-th message of a gateway has values beyond a limit, the next one clears them, so the number of
transitions is known and the path has ended once all of them stand in Kafka. `python -m benchmarks.runtimes` runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from benchmarks.engine import make_rule
from benchmarks.ingest import SHARDS, cpu_s, make_registry, started, unused_port
from benchmarks.load import Simulated, Template, sample
from citybrain import wire
from citybrain.clock import system_clock
from citybrain.layout import Layout, Run
from citybrain.mailbox import Mailbox, command
from citybrain.model import Device, Reading
from streams.log import Kind
from streams.registry import decode_registry, encode_registry
from streams.ruleset import RuleSet, encode_ruleset
from streams.runtimes.broker import mosquitto, mosquitto_configuration
from streams.runtimes.kafka.store import KafkaStore

GATEWAYS = 64
EVERY = 100  # messages of a gateway, of which one has values beyond the limit
BEYOND = 10  # devices in it that have one
LIMIT = 9.0
WARM = 200  # messages of every gateway before the measured ones: two that raise, and what they clear
WITHIN_S = 240.0


class Alternating(Template):
    """A packet whose body goes beyond the limit in every EVERY-th message."""

    def __init__(self, topic: str, devices: list[Device]) -> None:
        now_ms = time.time_ns() // 1_000_000
        calm = sample(devices, now_ms)
        wild = [
            Reading(one.device, one.observed_at, one.values | {"vibration_rms_g": LIMIT + 1}) if n < BEYOND else one
            for n, one in enumerate(calm)
        ]
        super().__init__(topic, calm, columns=True)
        self._calm, self._wild = self.packet, Template(topic, wild, columns=True).packet

    def numbered(self, epoch: int, seq: int, floor: int, sent_at: int) -> bytes:
        self.packet = self._wild if raises(seq) else self._calm
        return super().numbered(epoch, seq, floor, sent_at)


def raises(seq: int) -> bool:
    """Return whether a gateway's message has values beyond the limit; the one behind it clears them."""
    return seq % EVERY == EVERY - 1


def due(gateways: int, messages: int, devices: int) -> int:
    """Return how many transitions so many messages of every gateway make; `messages` is a multiple of EVERY."""
    return gateways * (messages // EVERY) * min(BEYOND, devices) * 2


# --- the gateways: a process of their own ---------------------------------------------------------------------------


def publish(gateways: list[Simulated], last: int) -> None:
    """Send every gateway's messages up to `last` as fast as the windows allow; return when all are acknowledged."""
    poll = select.epoll()
    by_fd = {gateway.socket.fileno(): gateway for gateway in gateways}
    for fd in by_fd:
        poll.register(fd, select.EPOLLIN)
    open_, mended_s = len(gateways), time.monotonic()
    for gateway in gateways:
        gateway.send(min(gateway.room(), last + 1 - gateway.next_seq), mended_s)
    while open_:
        ready = poll.poll(0.02)
        now_s = time.monotonic()
        for fd, _ in ready:
            gateway = by_fd[fd]
            if gateway.heard(now_s, []) and gateway.acked == last:
                open_ -= 1
            count = min(gateway.room(), last + 1 - gateway.next_seq)
            if count > 0:
                gateway.send(count, now_s)
        for gateway in gateways:
            gateway.flush()
        if now_s - mended_s > 0.5:
            mended_s = now_s
            for gateway in gateways:
                gateway.resend(now_s)
    poll.close()


def gateways_main(options: argparse.Namespace) -> None:
    """Serve: send the warm messages, say so, wait for a line, send the rest, say what it took."""
    registry = decode_registry(Layout(options.data).get_blob(options.registry))
    devices: dict[str, list[Device]] = {}
    for device in registry.devices:
        devices.setdefault(device.gateway, []).append(device)
    gateways = [
        Simulated(
            gateway.id, gateway.shard, options.port,
            Alternating(wire.topic(gateway.shard, gateway.id, "telemetry"), devices[gateway.id]), options.epoch,
        )
        for gateway in registry.gateways
    ]  # fmt: skip
    publish(gateways, WARM)
    print("warm", flush=True)
    sys.stdin.readline()
    cpu_before_s = time.process_time()
    publish(gateways, WARM + options.messages)
    resent = sum(gateway.resent for gateway in gateways)
    print(json.dumps({"cpu_s": time.process_time() - cpu_before_s, "resent": resent}), flush=True)


# --- the system -----------------------------------------------------------------------------------------------------


class Counted:
    """Counts the transitions in Kafka as they come."""

    def __init__(self, store: KafkaStore) -> None:
        self._readers = [store.reader("transitions", shard) for shard in range(SHARDS)]
        self.seen = 0

    def read(self) -> None:
        """Count what is there."""
        for reader in self._readers:
            self.seen += sum(record.kind == Kind.TRANSITION for record in reader.read())

    def wait(self, wanted: int) -> None:
        """Count until so many are there."""
        until_s = time.monotonic() + WITHIN_S
        while self.seen < wanted:
            if time.monotonic() > until_s:
                raise TimeoutError(f"{self.seen} of {wanted} transitions after {WITHIN_S:g} s")
            self.read()
            time.sleep(0.02)


def contents(readings: int) -> dict[str, bytes]:
    """Return what is in force: elevators with four series each, and one rule on all of them."""
    rule = make_rule("vibration", {"kind": "threshold", "metric": "vibration_rms_g", "above": LIMIT})
    rule = msgspec.structs.replace(rule, select=msgspec.structs.replace(rule.select, kind="elevator"))
    registry = make_registry(GATEWAYS, readings)
    return {"registry": encode_registry(registry), "ruleset": encode_ruleset(RuleSet((rule,)))}


def prepared(root: Path, readings: int) -> tuple[Layout, Run]:
    """Return a new data folder whose ingest will find what is in force in its mailbox."""
    layout, run = Layout(root), Run(clock=system_clock(), shards=SHARDS, mqtt_port=unused_port())
    layout.make()
    layout.write_run(run)
    for number, (kind, content) in enumerate(contents(readings).items()):
        box = Mailbox(layout.mailbox("ingest"))
        box.put(command(kind, "benchmark", number, {"content": layout.put_blob(content)}))
    return layout, run


class System:
    """mosquitto, ingest and workers on a Kafka, as processes of their own."""

    def __init__(self, root: Path, kafka: str, kafka_pids: Sequence[int], runtime: str, readings: int) -> None:
        self.layout, self.run = prepared(root, readings)
        self.runtime = runtime
        self.store = KafkaStore(kafka, self.layout, SHARDS, prefix=f"path-{runtime}-{os.getpid()}-")
        self.pids: dict[str, int] = {}
        self._kafka_pids = kafka_pids
        self._where = ("--log", "kafka", "--kafka", kafka, "--topics", self.store.prefix)

    @contextmanager
    def running(self, workers: int) -> Iterator[None]:
        """Start it and wait until it is ready; it ends with the block."""
        program = mosquitto()
        if program is None:
            raise SystemExit("mosquitto is not installed")
        configuration = self.layout.root / "mosquitto.conf"
        configuration.write_text(mosquitto_configuration(self.run.mqtt_port))
        with ExitStack() as stack:
            self._start(stack, "mosquitto", program, "-c", str(configuration))
            self._start(stack, "ingest", *self._own("ingest"))
            for name in (f"{self.runtime}-{number}" for number in range(workers)):
                self._start(stack, name, *self._own("worker", "--runtime", self.runtime, "--name", name))
            self._wait()
            yield

    def _own(self, word: str, *options: str) -> tuple[str, ...]:
        return (sys.executable, "-m", "citybrain", word, "--data", str(self.layout.root), *self._where, *options)

    def _start(self, stack: ExitStack, name: str, *argv: str) -> None:
        self.pids[name] = stack.enter_context(started(self.layout.root, *argv)).pid

    def _wait(self) -> None:
        until_s = time.monotonic() + 60
        while not self._ready():
            if time.monotonic() > until_s:
                raise TimeoutError(f"{self.runtime}: not ready within 60 s; see the logs in {self.layout.root}")
            time.sleep(0.1)
        self.store.open()

    def _ready(self) -> bool:
        """Return whether ingest has its content, every worker a shard, and all shards are had."""
        ingest = self._beat("ingest")
        had = [self._beat(name).get("details", {}).get("assigned", []) for name in self.pids if self.runtime in name]
        known = ingest.get("counters", {}).get("commands_total", 0) >= 2 and ingest["gauges"].get("connected")
        return bool(known) and all(had) and sum(map(len, had)) == SHARDS

    def _beat(self, name: str) -> dict[str, Any]:
        path = self.layout.run / f"{name}.heartbeat.json"
        found: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
        return found

    def spent_s(self) -> dict[str, float]:
        """Return the seconds that every process, and this one, has computed so far."""
        found = {name: cpu_s(pid) for name, pid in self.pids.items()}
        return found | {"kafka": sum(map(cpu_s, self._kafka_pids)), "this": time.process_time()}

    def gateways(self, messages: int) -> subprocess.Popen[str]:
        """Start the gateways; they wait for a line once their warm messages are acknowledged."""
        active = self.layout.read_active()
        assert active is not None
        options = {
            "data": self.layout.root, "port": self.run.mqtt_port, "registry": active.registry,
            "epoch": 1, "messages": messages,
        }  # fmt: skip
        said = [f"--{key}={value}" for key, value in options.items()]
        argv = [sys.executable, "-m", "benchmarks.runtimes.path", *said]
        return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


class Timed(NamedTuple):
    """Seconds until all was acknowledged, until the last transition, and what the gateways say of themselves."""

    acknowledged_s: float
    path_s: float
    told: dict[str, float]


def timed(gateways: subprocess.Popen[str], counted: Counted, wanted: int) -> Timed:
    """Let the warm gateways go and count until the last transition."""
    assert gateways.stdin is not None
    assert gateways.stdout is not None
    began_s, acknowledged_s = time.perf_counter(), 0.0
    gateways.stdin.write("go\n")
    gateways.stdin.flush()
    while not acknowledged_s:
        counted.read()
        if select.select([gateways.stdout], [], [], 0.02)[0]:
            acknowledged_s = time.perf_counter() - began_s
    counted.wait(wanted)
    return Timed(acknowledged_s, time.perf_counter() - began_s, json.loads(gateways.stdout.readline()))


def measure(
    root: Path, kafka: str, kafka_pids: Sequence[int], runtime: str, workers: int, values: int, readings: int
) -> dict[str, Any]:
    """Return values/s of the whole path and until acknowledged, and who computed how long for a million values."""
    messages = max(1, values // (4 * readings * GATEWAYS * EVERY)) * EVERY
    count = messages * GATEWAYS * readings * 4
    system = System(root / f"path-{runtime}", kafka, kafka_pids, runtime, readings)
    with system.running(workers), system.gateways(messages) as gateways:
        assert gateways.stdout is not None
        if gateways.stdout.readline() != "warm\n":
            raise SystemExit("the gateways ended before they were warm")
        counted = Counted(system.store)
        counted.wait(due(GATEWAYS, WARM, readings))
        before = system.spent_s()
        found = timed(gateways, counted, due(GATEWAYS, WARM + messages, readings))
        after = system.spent_s()
    spent_s = {name: after[name] - before[name] for name in after} | {"gateways": found.told["cpu_s"]}
    return {
        "values": count,
        "values_per_message": 4 * readings,
        "ingest_values_per_s": round(count / found.acknowledged_s),
        "path_values_per_s": round(count / found.path_s),
        "cpu_s_per_million": {name: round(seconds / count * 1e6, 4) for name, seconds in spent_s.items()},
        "gateways_cpu_share": round(spent_s["gateways"] / sum(spent_s.values()), 3),
        "resent": found.told["resent"],
        "transitions": counted.seen,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="the gateways of benchmarks.runtimes")
    for name in ("port", "epoch", "messages"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--registry", required=True)
    gateways_main(parser.parse_args())


if __name__ == "__main__":
    main()
