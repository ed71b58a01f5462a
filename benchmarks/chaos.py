"""Kill processes of a running system at random, then check that nothing was lost, repeated, doubled or forgotten.

    python -m benchmarks.chaos --seed 5 --kills 20 --json

The real `citybrain run --simulate` at `--speed` times real time, and four more gateways that commit `--rate` messages a
second; every few seconds one of broker, ingest, worker, desk, api, simulate (the district's gateways), load (the other
gateways) gets SIGKILL and is started again. Afterwards, with everything drained:

lost       messages that a spool committed and the log does not hold
repeated   messages that the log holds more than once
doubled    causes with more than one case, subjects with more than one rescue, cases the grid platform took twice
forgotten  causes that were due a case, rescue or maintenance order and have none; cases the platform never got
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import select

from benchmarks.chaos_load import extended
from benchmarks.system import System
from citybrain.clock import iso
from citybrain.counters import read_heartbeats
from citybrain.db.schema import alarms, cases, outbox
from citybrain.db.store import open_store
from citybrain.layout import Layout
from citybrain.mailbox import Mailbox, command
from citybrain.model import Gateway, Lane
from citybrain.segments import SUFFIX, Reader
from citybrain.storage import OS_FILES
from streams.log import Kind, decode_control, frame_head
from streams.logs import LogStore, SegmentStore, records
from streams.registry import Index, decode_registry, encode_registry

VICTIMS = ("broker", "ingest", "worker", "desk", "api", "simulate", "load")
SETTLE_MS = 5 * 60_000  # platform time a cause gets to become a case
Key = tuple[str, int, int]  # gateway, lane, epoch


def logged(layout: Layout, logs: LogStore, shards: int) -> Counter[tuple[Key, int]]:
    """Return how often each (gateway, lane, epoch, seq) stands in the log, under the registry in force there."""
    found: Counter[tuple[Key, int]] = Counter()
    for shard in range(shards):
        gateways: tuple[Gateway, ...] = ()
        for record in records(logs.reader("log", shard)):
            if record.kind == Kind.CONTROL:
                control = decode_control(record.payload)
                if control.what == "registry":
                    gateways = Index(decode_registry(layout.get_blob(control.content)), control.content).gateways
            elif record.kind == Kind.FRAME:
                head = frame_head(record.payload)
                found[(gateways[head.gateway].id, int(head.lane), head.epoch), head.seq] += 1
    return found


def spooled(folder: Path) -> tuple[int, set[int]]:
    """Return the highest seq that a lane's spool committed, and those that wait in it for their acknowledgement."""
    last = max((int(path.name[: -len(SUFFIX)]) for path in folder.glob(f"*{SUFFIX}")), default=1)
    tail = Reader(folder, last).read(1 << 30)
    highest = tail[-1].offset if tail else last - 1
    return highest, set(range(max(OS_FILES.marked(folder / "floor"), 1), highest + 1))


def count_lost(layout: Layout, found: Counter[tuple[Key, int]]) -> tuple[int, int]:
    """Return (messages produced, messages that are neither in the log nor in a spool any more)."""
    taken: dict[tuple[str, int], set[int]] = {}
    for (gateway, lane, _epoch), seq in found:
        taken.setdefault((gateway, lane), set()).add(seq)
    total = lost = 0
    for folder in sorted((layout.root / "gateways").iterdir()):
        for lane in Lane:
            highest, waiting = spooled(folder / lane.topic)
            total += highest
            lost += len(set(range(1, highest + 1)) - taken.get((folder.name, int(lane)), set()) - waiting)
    return total, lost


def read_truth(layout: Layout) -> list[dict[str, Any]]:
    """Return the planted causes."""
    return [json.loads(line) for line in layout.truth.read_text().splitlines() if line.strip()]


def judge(layout: Layout, now_ms: int) -> dict[str, int]:
    """Compare cases with the causes that had time to become one."""
    with open_store(layout.database, readonly=True).connect() as db:
        rows = [dict(row) for row in db.execute(select(cases)).mappings()]
        members = [dict(row) for row in db.execute(select(alarms.c.incident, alarms.c.subject)).mappings()]
        undelivered = len(db.execute(select(outbox.c.id).where(outbox.c.state != "delivered")).all())
    subjects: dict[int, set[str]] = {}
    for member in members:
        subjects.setdefault(member["incident"], set()).add(member["subject"])
    causes = doubled = forgotten = 0
    for cause in read_truth(layout):
        due = cause["due"]
        if cause["start_ms"] + SETTLE_MS > now_ms or not (due["case"] or due["rescues"] or due["maintenance"]):
            continue
        causes += 1
        mine = [
            row
            for row in rows
            if cause["start_ms"] - 120_000 <= row["observed_at"] <= cause["end_ms"] + 1_800_000
            and (row["subject"] in cause["subjects"] or subjects[row["incident"]] & set(cause["subjects"]))
        ]
        kinds = Counter(row["kind"] for row in mine)
        rescues = Counter(row["subject"] for row in mine if row["kind"] == "rescue")
        for kind in ("case", "maintenance"):
            doubled += max(0, kinds[kind] - 1) if due[kind] else 0
            forgotten += 1 if due[kind] and not kinds[kind] else 0
        doubled += sum(count - 1 for count in rescues.values())
        forgotten += sum(1 for subject in due["rescues"] if not rescues[subject])
    return {"causes": causes, "cases": len(rows), "doubled": doubled, "forgotten": forgotten + undelivered}


def platform_doubles(port: int) -> int:
    """Return how many of our cases the grid platform holds more than once."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/cases", timeout=10) as answer:
        held = json.loads(answer.read())
    return sum(max(0, int(case["accepted"]) - 1) for case in held["cases"])


class Loaded(System):
    """The system, and gateways beside it that keep it busy."""

    def __init__(self, root: Path, speed: float, seed: int, rate: float) -> None:
        super().__init__(root, "--speed", str(speed), "--seed", str(seed))
        self._rate = rate
        self.load: subprocess.Popen[bytes] | None = None

    def extend(self) -> None:
        """Let ingest activate a registry with the load's gateways, and start them."""
        active, run = self.layout.read_active(), self.layout.read_run()
        assert active is not None, "the system is live, so something is activated"
        registry = extended(decode_registry(self.layout.get_blob(active.registry)), run.shards)
        name = self.layout.put_blob(encode_registry(registry))
        box = Mailbox(self.layout.mailbox("ingest"))
        box.put(command("registry", "chaos", run.clock.now_ms(), {"content": name}, "load"))
        self.wait_for(lambda: getattr(self.layout.read_active(), "registry", "") == name, 30, "extended")
        self._start_load()

    def _start_load(self) -> None:
        arguments = ["--data", str(self.layout.root), "--rate", str(self._rate)]
        self.load = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.chaos_load", *arguments], start_new_session=True
        )

    def kill(self, name: str) -> int:
        """Kill a process, return its id; the load is started again here, everything else by the supervisor."""
        if name != "load":
            pid = self.pid_of(name)
            os.kill(pid, signal.SIGKILL)
            return pid
        assert self.load is not None
        self.load.kill()
        self.load.wait()
        pid = self.load.pid
        self._start_load()
        return pid

    def beats(self, name: str, not_pid: int) -> bool:
        """Whether `name` runs again with another process id, and has said so."""
        if name == "broker":
            return self.pid_of("broker") not in (0, not_pid)
        return any(
            beat.process == name and beat.pid != not_pid and beat.live(time.time_ns() // 1_000_000)
            for beat in read_heartbeats(self.layout.run)
        )

    def quiet(self) -> None:
        """End the load; it first waits until everything it committed is acknowledged."""
        if self.load is not None:
            self.load.terminate()
            self.load.wait(30)


def run(root: Path, kills: int, seed: int, speed: float, pause_s: float, rate: float) -> dict[str, Any]:
    """Run the system, kill, drain, judge."""
    rng = random.Random(seed)
    system = Loaded(root, speed, seed, rate)
    system.start()
    system.extend()
    recovery: list[float] = []
    victims: Counter[str] = Counter()
    try:
        for number in range(kills):
            time.sleep(rng.uniform(0.3, 1.7) * pause_s)
            name = VICTIMS[number % len(VICTIMS)] if number < len(VICTIMS) else rng.choice(VICTIMS)
            pid = system.kill(name)
            victims[name] += 1
            recovery.append(system.wait_for(partial(system.beats, name, pid), 60, f"{name} back"))
        system.quiet()
        clock = system.layout.read_run().clock
        now_ms = clock.now_ms()
        time.sleep(SETTLE_MS / 1000 / speed)
        system.wait_for(lambda: (system.status() or {}).get("undelivered", 1) == 0, 120, "all delivered")
        doubles = platform_doubles(system.layout.read_run().platform_port)
    finally:
        system.quiet()
        system.stop()
    found = logged(system.layout, SegmentStore(system.layout), system.layout.read_run().shards)
    total, lost = count_lost(system.layout, found)
    judged = judge(system.layout, now_ms)
    judged["doubled"] += doubles
    return {
        "kills": kills,
        "produced": total,
        "logged": len(found),
        "lost": lost,
        "repeated": sum(found.values()) - len(found),
        **judged,
        "recovery_s_max": round(max(recovery, default=0.0), 2),
        "victims": dict(victims),
        "until": iso(now_ms),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--speed", type=float, default=10.0, help="platform seconds a second")
    parser.add_argument("--pause-s", type=float, default=4.0, help="mean pause between kills")
    parser.add_argument(
        "--rate", type=float, default=200.0, help="messages a second of 10 readings beside the district"
    )
    parser.add_argument("--data", type=Path, help="keep the data here (default: a folder that is removed)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        root = options.data or Path(folder)
        result = run(root, options.kills, options.seed, options.speed, options.pause_s, options.rate)
    print(json.dumps(result) if options.json else "\n".join(f"{k:16} {v}" for k, v in result.items()))
    return 0 if not any(result[key] for key in ("lost", "repeated", "doubled", "forgotten")) else 1


if __name__ == "__main__":
    sys.exit(main())
