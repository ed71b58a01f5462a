"""Logs and workers on Kafka: what is appended, who works on it, what came of it; for runtimes and answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from benchmarks.engine import METRICS, City, make_rule
from citybrain.layout import Layout
from citybrain.model import Registry, Transition
from citybrain.segments import Record
from streams.log import Kind, decode_transition
from streams.logs import LogStore, LogWriter, records
from streams.registry import encode_registry
from streams.ruleset import RuleSet, encode_ruleset
from streams.runtimes.kafka.store import KafkaStore

SERIES = 20_000  # of a shard
BEYOND = 500  # every so many-th value passes its limit, and the next one is below it again
READINGS = 100


class Spent(NamedTuple):
    """Seconds passed and seconds computed."""

    wall_s: float
    cpu_s: float


class Shard(City):
    """One shard's log: `passes` over all its devices. Every value that passes a limit raises, the next clears."""

    def __init__(self, layout: Layout, number: int, beyond: int = BEYOND) -> None:
        super().__init__(layout, SERIES, 1, beyond)
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
    """Return the registry with its gateways in a shard, and names that no other shard has."""

    def named(one: str) -> str:
        return f"{one}-{number}"

    change = msgspec.structs.replace
    return change(
        registry,
        gateways=tuple(change(one, id=named(one.id), shard=number) for one in registry.gateways),
        devices=tuple(change(one, id=named(one.id), gateway=named(one.gateway)) for one in registry.devices),
    )


def append(writer: LogWriter, found: list[Record]) -> None:
    """Append records as ingest would: some hundred a commit."""
    for low in range(0, len(found), 500):
        for record in found[low : low + 500]:
            writer.append(record.kind, record.received_at, record.payload)
        writer.commit()


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
def worker(
    layout: Layout, address: str, prefix: str, runtime: str, name: str, *options: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A worker process."""
    argv = [sys.executable, "-m", "citybrain", "worker", "--data", str(layout.root), "--log", "kafka"]
    argv += ["--kafka", address, "--topics", prefix, "--runtime", runtime, "--name", name, *options]
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
        self.prefix = f"bench-{layout.root.name}-{os.getpid()}-"
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

    def wait_dealt(self, names: list[str], within_s: float = 60.0) -> None:
        """Wait until all shards are had, and every worker has one unless they are more than the shards."""
        until_s = time.monotonic() + within_s
        while not self._dealt(names):
            if time.monotonic() > until_s:
                raise TimeoutError(f"{self.runtime}: after {within_s:g} s {[self._has(name) for name in names]}")
            time.sleep(0.05)

    def _dealt(self, names: list[str]) -> bool:
        had = [self._has(name) for name in names]
        busy = sum(map(bool, had)) == min(len(names), len(self.writers))
        return busy and sorted(shard for own in had for shard in own) == list(range(len(self.writers)))

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
            self.wait_dealt(names)
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


def own_folder(layout: Layout, root: Path) -> Layout:
    """Return another data folder with the same run and content: snapshots of one runtime are not another's."""
    made = Layout(root)
    made.make()
    made.write_run(layout.read_run())
    for blob in layout.blobs.iterdir():
        made.put_blob(blob.read_bytes())
    return made
