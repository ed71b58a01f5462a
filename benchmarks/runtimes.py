"""Measure one log through every runtime: embedded, Kafka's group protocol, Faust; and Faust as its manual has it.

    python -m benchmarks.runtimes --json

values                          how many stand in the log, of all shards, in frames of 100 readings of 4 values
differs                         transitions that a runtime wrote otherwise than the embedded one, or not, or twice
embedded_values_per_s           from segments on disk to transitions on disk, one process, all shards
kafka_values_per_s              from the first record appended in Kafka to the last transition in Kafka, `--workers`
faust_values_per_s              processes; the appending, the broker and the reading run on the same machine
..._per_cpu_s                   values per second that the worker processes computed
ingest_values_per_s             the whole path (benchmarks.path): from the first message until all are acknowledged;
path_values_per_s               until the last transition stands in Kafka, with `--runtime kafka`;
faust_path_values_per_s         ... with `--runtime faust`
path                            who computed how long for a million values; what share of it the gateways take
per_event_faust_readings_per_s  an agent that takes one reading an event, as JSON, and applies the same rule in Python
ratio_to_per_event              readings/s of the whole path, over those

A Kafka is started (tests/kafka_cluster.py), or taken from CITYBRAIN_TEST_KAFKA.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from benchmarks import path
from benchmarks.engine import METRICS, City, make_rule
from benchmarks.faust_events import measure as measure_events
from citybrain.clock import system_clock
from citybrain.counters import Counters
from citybrain.layout import Layout, Run
from citybrain.model import Registry, Transition
from citybrain.segments import Record
from streams.log import Kind, decode_transition
from streams.logs import LogStore, LogWriter, SegmentStore, records
from streams.registry import encode_registry
from streams.ruleset import RuleSet, encode_ruleset
from streams.runtimes.kafka.store import KafkaStore
from streams.runtimes.worker import ShardWorker
from streams.warm import warm_engine
from tests.kafka_cluster import VARIABLE, cluster

SERIES = 20_000  # of a shard
BEYOND = 500  # every so many-th value passes its limit, and the next one is below it again
READINGS = 100
WARM_PASSES = 2


class Spent(NamedTuple):
    """Seconds passed and seconds computed."""

    wall_s: float
    cpu_s: float


class Shard(City):
    """One shard's log: `passes` over all its devices. Every value that passes a limit raises, the next clears."""

    def __init__(self, layout: Layout, number: int) -> None:
        super().__init__(layout, SERIES, 1, BEYOND)
        self.dice = np.random.default_rng(number)
        self.registry = of_shard(self.registry, number)
        self.offset = 0
        rules = tuple(make_rule(name, {"kind": "threshold", "metric": name, "above": 3.0}) for name in METRICS)
        self.controls = [
            self._control("registry", encode_registry(self.registry)),
            self._control("ruleset", encode_ruleset(RuleSet(rules))),
        ]

    def passes(self, first: int, last: int) -> list[Record]:
        """Return the records of some passes."""
        return [record for number in range(first, last) for record in self.one_pass(number, READINGS)]

    def _values(self, n: int) -> npt.NDArray[np.float64]:
        return np.where(self.dice.integers(0, self.beyond, n) == 0, 9.0, self.dice.random(n))


def of_shard(registry: Registry, number: int) -> Registry:
    """Return the registry with its gateways in a shard."""
    gateways = tuple(msgspec.structs.replace(gateway, shard=number) for gateway in registry.gateways)
    return msgspec.structs.replace(registry, gateways=gateways)


def append(writer: LogWriter, found: list[Record]) -> None:
    """Append records as ingest would: some hundred a commit."""
    for low in range(0, len(found), 500):
        for record in found[low : low + 500]:
            writer.append(record.kind, record.received_at, record.payload)
        writer.commit()


def embedded(layout: Layout, logs: list[list[Record]], warm: int) -> Spent:
    """Run the embedded worker over segments; the first `warm` records of each shard are not measured."""
    store, shards = SegmentStore(layout), []
    writers = []
    for number, log in enumerate(logs):
        writer = store.writer("log", number)
        writer.start()
        append(writer, log[:warm])
        writers.append(writer)
        shard = ShardWorker(number, layout, Counters("worker"), 30.0, logs=store)
        shard.start()
        shards.append(shard)
    while any(shard.step() for shard in shards):
        pass
    for writer, log in zip(writers, logs, strict=True):
        append(writer, log[warm:])
        writer.close()
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    while any(shard.step() for shard in shards):
        pass
    spent = Spent(time.perf_counter() - wall_s, time.process_time() - cpu_s)
    for shard in shards:
        shard.stop()
    return spent


def transitions(store: LogStore, shards: int) -> list[list[Transition]]:
    """Return what stands in the transition logs."""
    return [
        [decode_transition(one.payload) for one in records(store.reader("transitions", shard)) if one.kind]
        for shard in range(shards)
    ]


def computed_s(process: subprocess.Popen[bytes]) -> float:
    """Return the seconds a process has computed."""
    fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def worker(layout: Layout, address: str, prefix: str, runtime: str, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A worker process."""
    argv = [sys.executable, "-m", "citybrain", "worker", "--data", str(layout.root), "--log", "kafka"]
    argv += ["--kafka", address, "--topics", prefix, "--runtime", runtime, "--name", name]
    with (layout.root / f"{name}.log").open("wb") as log, subprocess.Popen(argv, stdout=log, stderr=log) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


class Distributed:
    """One runtime on Kafka: its topics, its workers, and what they wrote."""

    def __init__(self, layout: Layout, address: str, runtime: str, shards: int) -> None:
        self.prefix = f"bench-{runtime}-{os.getpid()}-"
        self.layout, self.address, self.runtime = layout, address, runtime
        self.store = KafkaStore(address, layout, shards, prefix=self.prefix)
        self.store.open()
        self.writers = [self.store.writer("log", shard) for shard in range(shards)]
        self.readers = [self.store.reader("transitions", shard) for shard in range(shards)]
        self.seen = [0] * shards
        for writer in self.writers:
            writer.start()

    def wait(self, due: list[int], within_s: float = 600.0) -> None:
        """Wait until so many transitions of each shard are there."""
        until_s = time.monotonic() + within_s
        while any(seen < wanted for seen, wanted in zip(self.seen, due, strict=True)):
            if time.monotonic() > until_s:
                raise TimeoutError(f"{self.runtime}: {self.seen} of {due} transitions after {within_s:g} s")
            for shard, reader in enumerate(self.readers):
                self.seen[shard] += sum(record.kind == Kind.TRANSITION for record in reader.read())
            time.sleep(0.01)

    def dealt(self, names: list[str]) -> bool:
        """Return whether every worker has a shard, and all shards are had."""
        had = [self._has(name) for name in names]
        return all(had) and sum(map(len, had)) == len(self.writers)

    def _has(self, name: str) -> list[int]:
        beat = self.layout.run / f"{name}.heartbeat.json"
        found: list[int] = json.loads(beat.read_bytes())["details"].get("assigned", []) if beat.exists() else []
        return found

    def run(self, logs: list[list[Record]], warm: int, expected: list[list[Transition]], workers: int) -> Spent:
        """Run the workers over the log; the first `warm` records of each shard are not measured."""
        names = [f"{self.runtime}-{number}" for number in range(workers)]
        with ExitStack() as stack:
            enter = stack.enter_context
            processes = [enter(worker(self.layout, self.address, self.prefix, self.runtime, name)) for name in names]
            while not self.dealt(names):
                time.sleep(0.1)
            for writer, log in zip(self.writers, logs, strict=True):
                append(writer, log[:warm])
            self.wait([sum(one.source < warm for one in found) for found in expected])
            wall_s, cpu_s = time.perf_counter(), sum(map(computed_s, processes))
            for low in range(warm, max(map(len, logs)), 2000):
                for writer, log in zip(self.writers, logs, strict=True):
                    append(writer, log[low : low + 2000])
            self.wait([len(found) for found in expected])
            return Spent(time.perf_counter() - wall_s, sum(map(computed_s, processes)) - cpu_s)


def differences(expected: list[list[Transition]], found: list[list[Transition]]) -> int:
    """Return how many transitions are missing, other, or there twice."""
    return sum(
        sum(a != b for a, b in zip(own, other, strict=False)) + abs(len(own) - len(other))
        for own, other in zip(expected, found, strict=True)
    )


def paths(root: Path, address: str, pids: Sequence[int], values: int, workers: int, readings: int) -> dict[str, Any]:
    """Return the figures of the whole path, with either runtime's workers."""
    kafka, faust = (path.measure(root, address, pids, name, workers, values, readings) for name in ("kafka", "faust"))
    figures = {name: kafka[name] for name in ("ingest_values_per_s", "path_values_per_s")}
    return figures | {"faust_path_values_per_s": faust["path_values_per_s"], "path": {"kafka": kafka, "faust": faust}}


def measure(root: Path, address: str, values: int, shards: int, workers: int) -> dict[str, Any]:
    """Return the figures of all runtimes over one log, one after the other."""
    warm_engine()
    layout = Layout(root)
    layout.make()
    layout.write_run(Run(clock=system_clock(), shards=shards))
    passes = max(1, values // (shards * SERIES))
    cities = [Shard(layout, number) for number in range(shards)]
    logs = [city.controls + city.passes(0, passes + WARM_PASSES) for city in cities]
    warm = 2 + WARM_PASSES * SERIES // (len(METRICS) * READINGS)
    count = shards * passes * SERIES
    spent = {"embedded": embedded(layout, logs, warm)}
    expected = transitions(SegmentStore(layout), shards)
    differs = 0
    for runtime in ("kafka", "faust"):
        one = Distributed(own_folder(layout, runtime), address, runtime, shards)
        spent[runtime] = one.run(logs, warm, expected, workers)
        differs += differences(expected, transitions(one.store, shards))
    per_s = {f"{name}_values_per_s": round(count / found.wall_s) for name, found in spent.items()}
    per_cpu_s = {f"{name}_values_per_cpu_s": round(count / found.cpu_s) for name, found in spent.items()}
    return {
        "values": count,
        "transitions": sum(map(len, expected)),
        "differs": differs,
        **per_s,
        **per_cpu_s,
        "workers": workers,
        "shards": shards,
        "cores": os.cpu_count(),
    }


def own_folder(layout: Layout, runtime: str) -> Layout:
    """Return another data folder with the same run and content: snapshots of one runtime are not another's."""
    made = Layout(layout.root / runtime)
    made.make()
    made.write_run(layout.read_run())
    for blob in layout.blobs.iterdir():
        made.put_blob(blob.read_bytes())
    return made


def own_kafka(stack: ExitStack, folder: Path) -> tuple[str, list[int]]:
    """Start a broker; return its address and its process ids."""
    made = stack.enter_context(cluster(folder))
    return made.address, [broker.process.pid for broker in made.brokers if broker.process is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=int, default=20_000_000)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--events", type=int, default=20_000, help="readings for the per-event agent")
    parser.add_argument("--readings", type=int, default=READINGS, help="of 4 values, in a message of the whole path")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        root = Path(folder)
        given = os.environ.get(VARIABLE)
        address, pids = (given, []) if given else own_kafka(stack, root / "kafka")
        found = measure(root / "data", address, args.values, args.shards, args.workers)
        found |= paths(root, address, pids, args.values, args.workers, args.readings)
        per_event = measure_events(root, address, args.events)
        found["per_event_faust_readings_per_s"] = round(per_event)
        found["ratio_to_per_event"] = round(found["path_values_per_s"] / len(METRICS) / per_event)
    if args.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:34} {value}")


if __name__ == "__main__":
    main()
