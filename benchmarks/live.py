"""The whole product, live, for some minutes: how far behind it is, what it drops, what memory it takes.

    python -m benchmarks.live --minutes 30 --speed 60 --size reference --json

It starts `citybrain run --simulate` on a new data folder and, once that is live and warm (one minute), looks every few
seconds. lag_s_p99: real seconds from the arrival of a message at ingest until the desk had decided on what it caused,
or until the worker had judged it, whichever is worse, over all that came in these minutes, rounded up to a size of
`citybrain.counters.BOUNDS_S`; by_stage has each stage's. pss_mb_max: the memory of all processes of the run together
(PSS; the simulator and the grid platform, which are not ours to run in a city, included; pss_mb_ours without them).
dropped: by reason. unexplained: those of them whose reason is not one of `api.health.HARMLESS`, which say why they lose
nothing. levels, reasons: how often the status page said which.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from api.calls import Api
from api.health import HARMLESS
from benchmarks.system import System
from citybrain.counters import Heartbeat, percentile, read_heartbeats
from citybrain.errors import Unavailable

LOOK_S = 5.0
WARM_S = 60.0  # compiling, first snapshots, the first reports of all devices at once
BESIDE = frozenset({"simulate", "platform", "operator"})


def pss_kb(pid: int) -> int:
    """Return a process's proportional set size; 0 where it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")), 0)


class Watch:
    """What was seen since `begin`."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.reasons: Counter[str] = Counter()
        self.levels: Counter[str] = Counter()
        self.pss_mb = self.pss_mb_ours = 0.0
        self._first = self._beats()

    def _beats(self) -> dict[str, Heartbeat]:
        return {beat.process: beat for beat in read_heartbeats(self.system.layout.run)}

    def look(self) -> None:
        """Take one sample of status and memory."""
        try:  # not `citybrain status`: starting Python every few seconds is load of its own
            health = Api(self.system.layout).get("/v1/status")["health"]
        except Unavailable:
            health = {"level": "no answer", "reasons": []}
        self.levels[health["level"]] += 1
        self.reasons.update(reason["code"] for reason in health["reasons"])
        sizes = {name: pss_kb(pid) / 1024 for name, pid in self.system.children().items()}
        whole = sum(sizes.values()) + (pss_kb(self.system.process.pid) / 1024 if self.system.process else 0.0)
        self.pss_mb = max(self.pss_mb, whole)
        self.pss_mb_ours = max(self.pss_mb_ours, whole - sum(sizes.get(name, 0.0) for name in BESIDE))

    def told(self) -> dict[str, Any]:
        """Return the result: differences of the heartbeats' totals since the beginning."""
        last = self._beats()
        delays: dict[str, Counter[int]] = {}
        dropped: Counter[str] = Counter()
        readings = 0
        for name, beat in last.items():
            first = self._first.get(name)
            again = first is None or first.pid != beat.pid  # it was restarted: its delays begin anew
            for kind, delay in beat.delays.items():
                before = first.delays.get(kind) if first is not None and not again else None
                stage = "outbox" if kind == "outbox_s" else name
                counts = delays.setdefault(stage, Counter())
                for size, amount in enumerate(delay.counts):
                    counts[size] += amount - (before.counts[size] if before is not None else 0)
            if name in BESIDE:
                continue
            for key, amount in beat.counters.items():
                rise = amount - (first.counters.get(key, 0) if first is not None else 0)
                if key.startswith("dropped_total{") and rise:
                    dropped[key.partition("=")[2].rstrip("}")] += rise
                elif key == "readings_total" and name.startswith("ingest"):
                    readings += rise
        by_stage = {
            stage: {"p50": percentile(c, 0.5), "p99": percentile(c, 0.99)} for stage, c in sorted(delays.items())
        }
        return {
            "lag_s_p99": max((value["p99"] for stage, value in by_stage.items() if stage != "outbox"), default=None),
            "pss_mb_max": round(self.pss_mb, 1),
            "dropped": dict(dropped),
            "unexplained": sum(amount for reason, amount in dropped.items() if reason not in HARMLESS),
            "readings": readings,
            "by_stage": by_stage,
            "pss_mb_ours": round(self.pss_mb_ours, 1),
            "levels": dict(self.levels),
            "reasons": dict(self.reasons),
            "restarts": {n: v for n, v in last["run"].counters.items() if n.startswith("restarts")}
            if "run" in last
            else {},
        }


def measure(root: Path, minutes: float, words: list[str], warm_s: float = WARM_S) -> dict[str, Any]:
    """Run for `minutes` after the warm-up; return what was seen."""
    system = System(root, *words)
    live_s = system.start()
    try:
        time.sleep(warm_s)
        watch, began_s = Watch(system), time.monotonic()
        while (left_s := minutes * 60 - (time.monotonic() - began_s)) > 0:
            time.sleep(min(LOOK_S, left_s))
            watch.look()
        result = watch.told()
        result |= {"minutes": round((time.monotonic() - began_s) / 60, 2), "live_s": round(live_s, 1)}
    finally:
        system.stop()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long, after a warm-up (default: 30)")
    parser.add_argument("--speed", type=float, default=1.0, help="platform seconds per real second (default: 1)")
    parser.add_argument("--size", help="of the simulated district, where `citybrain run` has such a choice")
    parser.add_argument("--workers", type=int, help="engines, where `citybrain run` has such a choice")
    parser.add_argument("--warm-s", type=float, default=WARM_S, help="seconds that do not count (default: 60)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    words = ["--speed", f"{options.speed:g}"]
    for name in ("size", "workers"):
        if getattr(options, name) is not None:
            words += [f"--{name}", str(getattr(options, name))]
    with tempfile.TemporaryDirectory(prefix="live-") as folder:
        result = measure(Path(folder), options.minutes, words, options.warm_s)
    print(json.dumps(result) if options.json else json.dumps(result, indent=1))
    return 0 if not result["unexplained"] else 1


if __name__ == "__main__":
    sys.exit(main())
