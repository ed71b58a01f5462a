"""Measure one engine: from the log's frames to transitions, its snapshots, its restart, and what it holds.

    python -m benchmarks.engine --json

values_per_s        from records to transitions with frames of 100 readings, a reading has four values; of one core, in
                    seconds this process computed; `values_per_s_10` with frames of 10 readings; `values_per_s_disk`
                    read from segments on disk
series, instances   how many; every series has `--rules` thresholds with deadband and delays, every device an absence
bytes_per_instance  what the engine keeps for them: state, plan, links, and the registry's arrays and times, per
                    instance; not the registry's ids and names, which `rss_mb` holds
snapshot_pause_s    how long the stream stands still for a snapshot
snapshot_s          until it is on disk (beside the stream)
restore_s           from a new process's first import to an engine that goes on: registry, plan, snapshot

`snapshot_pause_s` and `restore_s` are wall time; `process_cpu_s` in the details is what the new process computed, its
imports included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from citybrain.config import Lines, convert
from citybrain.layout import Layout
from citybrain.model import Device, Gateway, Lane, Place, Registry
from citybrain.segments import Reader, Record, Writer
from streams.engine import Engine
from streams.log import Control, FrameHead, Kind, pack_frame
from streams.registry import Index, encode_registry
from streams.ruleset import Rule, RuleSet, encode_ruleset
from streams.runtimes.snapshots import restored_engine, write_frozen
from streams.warm import warm_engine
from streams.watches import Conditions, Watch

PLACE = Place(121.47, 31.23, "310104001001001")
START = 1_767_225_600_000
METRICS = ("pressure_mpa", "flow_lps", "tilt_deg", "battery_v")
GATEWAY_DEVICES = 250
PASS_MS = 60_000
READ_BYTES = 8 * 1024 * 1024


def make_registry(series: int) -> Registry:
    """Return hydrants with four series each behind gateways of 250 hydrants."""
    devices = max(1, series // len(METRICS))
    names = [f"gw-{n:05d}" for n in range(-(-devices // GATEWAY_DEVICES))]
    return Registry(
        tuple(Gateway(name, 0, PLACE) for name in names),
        tuple(
            Device(f"hyd-{d:06d}", "hydrant", names[d // GATEWAY_DEVICES], PLACE, METRICS, zone=f"z-{d % 40}")
            for d in range(devices)
        ),
    )


def make_index(series: int) -> Index:
    """Return that registry with numbers."""
    return Index(make_registry(series), "")


def make_ruleset(rules: int, *, absence: bool = False) -> RuleSet:
    """Return `rules` thresholds on each of the metrics; and an absence on every device."""
    found = [make_rule(f"{metric}_{n}", threshold(metric, n)) for metric in METRICS for n in range(rules)]
    if absence:
        found.append(make_rule("silent", {"kind": "absence", "timeout": "5min"}))
    return RuleSet(tuple(found))


def threshold(metric: str, n: int) -> dict[str, Any]:
    """Return the condition of the n-th rule of a metric."""
    delays = {"on_delay": "2min", "off_delay": "5min"}
    return {"kind": "threshold", "metric": metric, "above": 3.0 + n, "deadband": 0.5, **delays}


def make_rule(name: str, when: dict[str, Any]) -> Rule:
    """Return a rule on all hydrants."""
    rule = {
        "id": name,
        "title": {"zh": name, "en": name},
        "select": {"kind": "hydrant"},
        "when": when,
        "urgency": "normal",
        "correlate": {"by": "device", "cause": name, "within": "30min"},
        "confirm": {"policy": "at_once"},
        "case": {"kind": "case", "category": "battery"},
        "source": "benchmark",
        "owner": "benchmark",
    }
    return convert(rule, Rule, Lines(name, None))


class City:
    """A log of a registry, a rule set, and passes over all its devices."""

    def __init__(self, layout: Layout, series: int, rules: int, beyond: int) -> None:
        self.layout = layout
        self.registry = make_registry(series)
        self.beyond = beyond
        self.dice = np.random.default_rng(7)
        self.offset = 0
        self.controls = [
            self._control("registry", encode_registry(self.registry)),
            self._control("ruleset", encode_ruleset(make_ruleset(rules, absence=True))),
        ]

    def _control(self, what: str, content: bytes) -> Record:
        payload = msgspec.json.encode(Control(what, START, "benchmark", content=self.layout.put_blob(content)))
        return self._record(Kind.CONTROL, START, payload)

    def _record(self, kind: Kind, at_ms: int, payload: bytes) -> Record:
        self.offset += 1
        return Record(self.offset - 1, at_ms, kind, payload)

    def one_pass(self, number: int, readings: int) -> Iterator[Record]:
        """Yield one reading of every device, `readings` a frame; every `beyond`-th value passes a limit."""
        at_ms, devices, width = START + number * PASS_MS, len(self.registry.devices), len(METRICS)
        for base in range(0, devices, GATEWAY_DEVICES):
            end = min(base + GATEWAY_DEVICES, devices)
            for low in range(base, end, readings):
                n = (min(low + readings, end) - low) * width
                head = FrameHead(base // GATEWAY_DEVICES, Lane.TELEMETRY, 1, number + 1, at_ms, n, 0)
                series = np.arange(low * width, low * width + n, dtype=np.uint32)
                yield self._record(Kind.FRAME, at_ms, pack_frame(head, np.full(n, at_ms), self._values(n), series))

    def _values(self, n: int) -> npt.NDArray[np.float64]:
        return np.where(self.dice.integers(0, self.beyond, n) == 0, 9.0, self.dice.random(n))


def held_bytes(engine: Engine) -> dict[str, int]:
    """Return how many bytes of arrays the engine holds, by what they are for."""
    found = {"state": 0, "plan": 0, "links": 0, "times": size_of(*engine.times)}
    for watch in engine.watches.values():
        table = watch.table
        found["state"] += state_bytes(watch)
        found["plan"] += size_of(table.rule, table.device, table.side, table.first, table.settings, table.judged)
        found["links"] += size_of(table.links.start, table.links.instance, table.links.role, table.links.term)
    arrays = vars(engine.index).values() if engine.index is not None else ()
    found["registry"] = size_of(*(each for each in arrays if isinstance(each, np.ndarray)))
    return found


def state_bytes(watch: Watch) -> int:
    """Return the bytes of what a table's instances remember."""
    if isinstance(watch, Conditions):
        life = watch.life
        return size_of(life.phase, life.state, life.gate, life.ring, life.seen, watch.memory)
    return size_of(*watch.freeze().values())


def size_of(*arrays: npt.NDArray[Any]) -> int:
    """Return the bytes of arrays."""
    return sum(array.nbytes for array in arrays)


def instances_of(engine: Engine) -> int:
    """Return the number of rule instances."""
    return sum(len(watch.table.rule) for watch in engine.watches.values())


def values_per_s(engine: Engine, city: City, passes: range, readings: int) -> float:
    """Return values/s of computed time of the best of these passes, a few MB of records at a time."""
    best = float("inf")
    for number in passes:
        records = list(city.one_pass(number, readings))
        step = max(1, READ_BYTES // (len(records[0].payload) + 50))
        began = time.process_time()
        for low in range(0, len(records), step):
            engine.process(records[low : low + step])
        best = min(best, time.process_time() - began)
    return len(METRICS) * len(city.registry.devices) / best


def from_disk(engine: Engine, city: City, number: int) -> float:
    """Return values/s of computed time where the engine's log is read from segments on disk."""
    folder = city.layout.log(0)
    writer = Writer(folder)
    writer.start()
    skipped = city.offset
    city.offset = 0
    for record in city.one_pass(number, 100):
        writer.append(record.kind, record.received_at, record.payload)
    writer.commit()
    writer.close()
    reader, began, engine.offset = Reader(folder), time.process_time(), 0
    while records := reader.read(READ_BYTES):
        engine.process(records)
    took = time.process_time() - began
    engine.offset = city.offset = skipped + city.offset
    return len(METRICS) * len(city.registry.devices) / took


def snapshots(engine: Engine, folder: Path) -> tuple[float, float]:
    """Return the pause and the whole time of a snapshot, the median of five and of those."""
    pauses, wholes = [], []
    for _ in range(5):
        began = time.perf_counter()
        frozen = engine.freeze()
        pauses.append(time.perf_counter() - began)
        write_frozen(frozen, folder)
        wholes.append(time.perf_counter() - began)
    return sorted(pauses)[2], sorted(wholes)[2]


def restart(root: Path) -> dict[str, float]:
    """Restore in a new process; return its seconds and its memory."""
    argv = [sys.executable, "-m", "benchmarks.engine", "--restore", str(root)]
    began = time.perf_counter()
    done = subprocess.run(argv, check=True, capture_output=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found | {"process_s": time.perf_counter() - began}


def restore(root: Path) -> dict[str, float]:
    """Return how long this process took to have an engine that goes on, and what it holds then."""
    began = time.perf_counter()
    warm_engine()
    warmed = time.perf_counter()
    engine, warnings = restored_engine(0, Layout(root))
    took = time.perf_counter() - warmed
    assert engine.index is not None
    assert not warnings
    status = Path("/proc/self/status").read_text(encoding="ascii")
    rss_kb = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    return {"warm_s": warmed - began, "restore_s": took, "rss_mb": rss_kb / 1024, "cpu_s": time.process_time()}


def run(root: Path, series: int, rules: int, beyond: int, repeat: int) -> dict[str, Any]:
    """Measure all of it on a city of so many series."""
    layout = Layout(root)
    layout.make()
    warm_engine()
    city, engine = City(layout, series, rules, beyond), Engine(0, layout)
    engine.process(city.controls)
    values_per_s(engine, city, range(2), 100)  # touches all memory
    per_s = values_per_s(engine, city, range(2, 2 + repeat), 100)
    per_s_10 = values_per_s(engine, city, range(2 + repeat, 4 + repeat), 10)
    per_s_disk = from_disk(engine, city, 4 + repeat)
    pause_s, whole_s = snapshots(engine, layout.engine(0))
    held, instances, again = held_bytes(engine), instances_of(engine), restart(root)
    return {
        "values_per_s": round(per_s),
        "values_per_s_10": round(per_s_10),
        "values_per_s_disk": round(per_s_disk),
        "series": engine.index.n_series if engine.index is not None else 0,
        "instances": instances,
        "bytes_per_instance": round(sum(held.values()) / instances, 1),
        "snapshot_pause_s": round(pause_s, 4),
        "snapshot_s": round(whole_s, 3),
        "restore_s": round(again["restore_s"] + again["warm_s"], 2),
        "details": {
            "bytes": {name: round(size / instances, 2) for name, size in held.items()},
            "rss_mb": round(again["rss_mb"]),
            "process_s": round(again["process_s"], 2),
            "process_cpu_s": round(again["cpu_s"], 2),
            "transitions": engine.counts["transitions"],
            "beyond": beyond,
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=int, default=1_000_000)
    parser.add_argument("--rules", type=int, default=3, help="thresholds a series")
    parser.add_argument("--beyond", type=int, default=1000, help="one value in so many passes a limit")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--restore", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.restore is not None:
        print(json.dumps(restore(options.restore)))
        return 0
    with tempfile.TemporaryDirectory(prefix="engine-") as folder:
        result = run(Path(folder), options.series, options.rules, options.beyond, options.repeat)
    print(json.dumps(result) if options.json else "\n".join(f"{key:20} {value}" for key, value in result.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
