"""Measure one log through every runtime: embedded, Kafka's group protocol, Faust; and Faust as its manual has it.

    python -m benchmarks.runtimes --json

values                          how many stand in the log, of all shards, in frames of 100 readings of 4 values
differs                         transitions that a runtime wrote otherwise than the embedded one, or not, or twice
embedded_values_per_s           from segments on disk to transitions on disk, one process, all shards
kafka_values_per_s              from the first record appended in Kafka to the last transition in Kafka, `--workers`
faust_values_per_s              processes; the appending, the broker and the reading run on the same machine
..._per_cpu_s                   values per second that the worker processes computed
ingest_values_per_s             the whole path (path.py): from the first message until all are acknowledged;
path_values_per_s               until the last transition stands in Kafka, with `--runtime kafka`;
faust_path_values_per_s         ... with `--runtime faust`
path                            who computed how long for a million values; what share of it the gateways take
per_event_faust_readings_per_s  an agent that takes one reading an event, as JSON, and applies the same rule in Python
ratio_to_per_event              readings/s of the whole path, over those
cases, cases_differ, kills,     answers.py: another log through each runtime with 1 worker and with 2, while
rebalances, runs                workers join, leave and are killed; `differs` counts its transitions too

A Kafka is started (tests/kafka_cluster.py), or taken from CITYBRAIN_TEST_KAFKA.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.engine import METRICS
from benchmarks.runtimes import path
from benchmarks.runtimes.answers import measure as measure_answers
from benchmarks.runtimes.faust_events import measure as measure_events
from benchmarks.runtimes.topics import (
    READINGS,
    SERIES,
    Distributed,
    Shard,
    Spent,
    append,
    differences,
    own_folder,
    transitions,
)
from citybrain.clock import system_clock
from citybrain.counters import Counters
from citybrain.layout import Layout, Run
from citybrain.segments import Record
from streams.logs import SegmentStore
from streams.runtimes.shard_worker import ShardWorker
from streams.warm import warm_engine
from tests.kafka_cluster import VARIABLE, cluster

WARM_PASSES = 2


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
        one = Distributed(own_folder(layout, root / runtime), address, runtime, shards)
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


def own_kafka(stack: ExitStack, folder: Path) -> tuple[str, list[int]]:
    """Start a broker; return its address and its process ids."""
    made = stack.enter_context(cluster(folder))
    return made.address, [broker.process.pid for broker in made.brokers if broker.process is not None]


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.runtimes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--values", type=int, default=20_000_000)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--events", type=int, default=20_000, help="readings for the per-event agent")
    parser.add_argument("--readings", type=int, default=READINGS, help="of 4 values, in a message of the whole path")
    parser.add_argument("--seed", type=int, default=5, help="what the disturbed runs draw from")
    parser.add_argument("--kills", type=int, default=3, help="of each disturbed run")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        root = Path(folder)
        given = os.environ.get(VARIABLE)
        address, pids = (given, []) if given else own_kafka(stack, root / "kafka")
        found = measure(root / "data", address, args.values, args.shards, args.workers)
        answers = measure_answers(root / "answers", address, args.values, args.seed, args.kills)
        found |= answers | {"differs": found["differs"] + answers["differs"]}
        found |= paths(root, address, pids, args.values, args.workers, args.readings)
        per_event = measure_events(root, address, args.events)
        found["per_event_faust_readings_per_s"] = round(per_event)
        found["ratio_to_per_event"] = round(found["path_values_per_s"] / len(METRICS) / per_event)
    if args.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:34} {value}")
