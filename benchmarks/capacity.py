"""Measure how cost grows: of the engine with series and rules, of the desk with the alarms that are open.

    python -m benchmarks.capacity --json

engine  for each (series, rules a series): values/s of one core, bytes an instance, memory, restart
desk    for each number of open alarms: transitions/s of the next `--step` raises, each a device of its own, in seconds
        this process computed and in wall seconds (one sync a transaction), and bytes of the database an alarm

docs/capacity.md is written from these figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from api.desk import Desk
from benchmarks import engine as engines
from citybrain.db.store import open_store
from citybrain.layout import Active, Layout
from citybrain.model import Cell, Device, Edge, Evidence, Gateway, Place, Registry, Transition, Unit
from rules.categories import load_categories
from rules.files import library
from streams.log import Kind, encode_transition
from streams.logs import SegmentStore
from streams.registry import encode_registry
from streams.ruleset import encode_ruleset

START = 1_767_225_600_000
RULE = "hydrant_battery_low"
SECOND_MS = 1000


def make_registry(devices: int) -> Registry:
    """Return hydrants in cells of ten, behind one gateway, and a unit that does the work."""
    cells = tuple(Cell(f"{310104001001:012d}{n % 1000:03d}", f"grid-{n % 80}", "001") for n in range(1000))
    places = [Place(121.4 + n % 1000 / 10_000, 31.2 + n // 1000 / 10_000, cells[n % 1000].code) for n in range(devices)]
    hydrants = tuple(Device(f"hyd-{n:06d}", "hydrant", "gw-0", place, ("battery_v",)) for n, place in enumerate(places))
    return Registry((Gateway("gw-0", 0, places[0]),), hydrants, cells, (Unit("water", "供水公司", "Water company"),))


class Town:
    """A desk with nothing before it: transitions are written for it, and it takes them."""

    def __init__(self, root: Path, devices: int) -> None:
        self.layout = Layout(root)
        self.layout.make()
        self.logs = SegmentStore(self.layout)
        self.ruleset = self.layout.put_blob(encode_ruleset(library()))
        self.layout.write_active(Active(self.layout.put_blob(encode_registry(make_registry(devices))), self.ruleset))
        self.writer = self.logs.writer("transitions", 0)
        self.writer.start()
        self.desk = Desk(open_store(self.layout.database), self.layout, (0,), load_categories(), logs=self.logs)
        self.desk.start()
        self.desk.step(START)
        self.raised = 0

    def raises(self, count: int) -> tuple[float, float]:
        """Let so many more devices raise; return (transitions/s computed, transitions/s by the wall)."""
        now_ms = START + self.raised * 10
        for n in range(self.raised, self.raised + count):
            evidence = Evidence("battery_v", 2.9, 3.0, now_ms)
            transition = Transition(0, n, 0, RULE, f"hyd-{n:06d}", Edge.RAISE, now_ms, now_ms, evidence, self.ruleset)
            self.writer.append(Kind.TRANSITION, now_ms, encode_transition(transition))
        self.writer.commit()
        self.raised += count
        cpu, wall, taken = time.process_time(), time.perf_counter(), 0
        while step := self.desk.step(now_ms + SECOND_MS):
            taken += step
        return taken / (time.process_time() - cpu), taken / (time.perf_counter() - wall)

    def bytes_per_alarm(self) -> float:
        """Return what the database holds for each alarm, its incident, order, message and journal included."""
        files = self.layout.root.glob(f"{self.layout.database.name}*")
        return sum(path.stat().st_size for path in files) / self.raised


def desk_growth(most: int, step: int) -> list[dict[str, Any]]:
    """Measure the desk at 0, a tenth of a tenth, a tenth, and all of `most` open alarms."""
    found = []
    with tempfile.TemporaryDirectory(prefix="capacity-") as folder:
        town = Town(Path(folder), most + 4 * step)
        for level in (0, most // 100, most // 10, most):
            if level > town.raised:
                town.raises(level - town.raised)
            open_before = town.raised
            computed, wall = town.raises(step)
            found.append(
                {
                    "open_alarms": open_before,
                    "transitions_per_cpu_s": round(computed),
                    "transitions_per_s": round(wall),
                    "bytes_per_alarm": round(town.bytes_per_alarm()),
                }
            )
        town.desk.store.dispose()
    return found


def engine_growth(series: list[int], rules: list[int]) -> list[dict[str, Any]]:
    """Measure the engine for each number of series, and of rules on the first of them."""
    found = []
    grid = [(each, rules[0]) for each in series] + [(series[0], each) for each in rules[1:]]
    for count, each in grid:
        with tempfile.TemporaryDirectory(prefix="capacity-") as folder:
            one = engines.run(Path(folder), count, each, 1000, 2)
        keys = ("values_per_s", "series", "instances", "bytes_per_instance", "snapshot_pause_s", "restore_s")
        found.append({"rules": each, **{key: one[key] for key in keys}, "rss_mb": one["details"]["rss_mb"]})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=int, nargs="+", default=[100_000, 1_000_000, 4_000_000])
    parser.add_argument("--rules", type=int, nargs="+", default=[3, 1, 10], help="thresholds a series")
    parser.add_argument("--alarms", type=int, default=100_000)
    parser.add_argument("--step", type=int, default=2_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = {
        "engine": engine_growth(options.series, options.rules),
        "desk": desk_growth(options.alarms, options.step),
    }
    if options.json:
        print(json.dumps(result))
        return 0
    for name, rows in result.items():
        print(name)
        for row in rows:
            print("  " + "  ".join(f"{key}={value}" for key, value in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
