"""Kill a gateway, its broker and ingest at random, fill the gateway's disk, cut its line, and count what is left.

    python -m benchmarks.gateway_chaos --seed 3 --kills 200 --json
    python -m benchmarks.gateway_chaos --drain-days 7 --dense --json

A source numbers its readings, events and pictures (`source.py`); a gateway of the real agent, spool, uplink
and service takes them (`box.py`), through a real mosquitto, to the real `citybrain ingest`. What the gateway
has not committed when it is killed the source says again, as a sensor bus that is asked again would. Afterwards, with
everything drained:

produced    readings, events and pictures that the source said, all of them committed by the gateway
logged      of these, in the log (a picture: whole, with the hash it should have)
lost        neither logged nor evicted
repeated    more than once in the log
disordered  behind a later one of their device and lane
evicted     given up by the spool on a full disk, which its `floor` told the platform: not in `lost`

With `--drain-days` nothing is killed: a spool that was offline so long drains, while an event a second overtakes.
With `--real` it is `citybrain gateway run` with its driver `json_lines`, which confirms nothing to its source: what it
had in memory at a kill counts as `uncommitted`, and `lost` is what it had committed. No pictures, no full disks then.
Disks are filled for real, on a tmpfs; where this machine lets nobody mount one, `full_disks` is 0.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.gateway_chaos.box import DEVICES, SHARD, picture
from benchmarks.gateway_chaos.platform import Platform, registry, wait
from benchmarks.gateway_chaos.source import LANES, Lines, Source
from citybrain.layout import Layout
from citybrain.model import READING_LANES, Lane
from citybrain.segments import Reader
from citybrain.wire import blob_sha256
from streams.log import Kind, decode_control, frame_arrays, frame_head
from streams.runtimes.broker import mosquitto

RATES = {Lane.TELEMETRY: 200.0, Lane.EVENT: 10.0, Lane.BLOB: 0.5}
VICTIMS = ("gateway",) * 9 + ("broker",) * 7 + ("ingest",) * 4
CARD_BYTES = 48 * 1024 * 1024
MOUNTED = "CHAOS_CARD"  # set where the gateway's disk is a small one of its own


class Tail:
    """The highest number by lane that the log holds."""

    def __init__(self, layout: Layout) -> None:
        self._reader = Reader(layout.log(SHARD))
        self._last = dict.fromkeys(LANES, 0)

    def look(self) -> dict[Lane, int]:
        """Read what is new."""
        for record in self._reader:
            if record.kind == Kind.FRAME:
                head = frame_head(record.payload)
                highest = frame_arrays(record.payload, head)[1].max(initial=0.0)
                self._last[head.lane] = max(self._last[head.lane], round(float(highest)))
        return dict(self._last)


class Accidents:
    """What happens to the gateway, in an order that the seed decides."""

    def __init__(self, platform: Platform, source: Source, rng: random.Random, pause_s: float) -> None:
        self._pause_s = pause_s
        self.recovery_s: list[float] = []
        self.victims: Counter[str] = Counter()
        self._platform = platform
        self._source = source
        self._rng = rng

    def run(self, kills: int, full_disks: int, cuts: int) -> None:
        """Have them all, mixed."""
        plan = [self._kill] * kills + [self._full_disk] * full_disks + [self._cut] * cuts
        self._rng.shuffle(plan)
        for accident in plan:
            time.sleep(self._rng.uniform(0.2, 1.8) * self._pause_s)
            accident()

    def recovered(self) -> None:
        """Wait until something that was said from now on is acknowledged."""
        with self._source.lock:
            now = self._source.said[Lane.TELEMETRY]
        took = wait(lambda: self._source.progress()[Lane.TELEMETRY] > now, "an acknowledgement of what was said since")
        self.recovery_s.append(took)

    def _kill(self) -> None:
        """Kill one; three times of ten the next accident comes while it recovers."""
        victim = self._rng.choice(VICTIMS)
        self.victims[victim] += 1
        self._platform.kill(victim)
        if self._rng.random() < 0.7:
            self.recovered()

    def _full_disk(self) -> None:
        """Fill the gateway's card until it has to give something up, or for two seconds; no kill meanwhile."""
        self.recovered()
        ballast = self._platform.card / "ballast"
        until_s = time.monotonic() + self._rng.uniform(1.0, 2.0)
        with ballast.open("ab", buffering=0) as file:
            while time.monotonic() < until_s:
                try:
                    file.write(b"x" * 4096)
                except OSError:
                    time.sleep(0.005)
        ballast.unlink()
        self.recovered()

    def _cut(self) -> None:
        """Cut the line, loudly or silently."""
        self._platform.cable.cut(silently=self._rng.random() < 0.5)
        time.sleep(self._rng.uniform(0.2, 2.0))
        self._platform.cable.mend()
        self.recovered()


class Verdict:
    """What the log holds of one lane, in its order."""

    def __init__(self) -> None:
        self.last = 0
        self.seq = 0
        self.logged = self.lost = self.evicted = self.repeated = self.disordered = self.seqs_gone = 0
        self._seen: set[int] = set()
        self._by_device: dict[int, int] = {}

    def message(self, seq: int, numbers: list[int]) -> None:
        """Take a message's numbers: a gap before them is an eviction only where the seqs have one there too."""
        gone = max(seq - self.seq - 1, 0)
        self.seqs_gone += gone
        for place, n in enumerate(numbers):
            missing = max(n - self.last - 1, 0)
            if gone and not place:
                self.evicted += missing
            else:
                self.lost += missing
            self._number(n)
        self.seq = max(self.seq, seq)

    def _number(self, n: int) -> None:
        if n in self._seen:
            self.repeated += 1
            return
        self._seen.add(n)
        self.logged += 1
        self.disordered += n < self._by_device.get(n % DEVICES, 0)
        self._by_device[n % DEVICES] = max(n, self._by_device.get(n % DEVICES, 0))
        self.last = max(self.last, n)


def judge(layout: Layout, source: Source, *, real: bool) -> dict[str, int]:
    """Read the whole log and compare it with what the source said."""
    lanes = {lane: Verdict() for lane in LANES}
    pictures: Counter[str] = Counter()
    for record in Reader(layout.log(SHARD)):
        if record.kind == Kind.FRAME:
            head = frame_head(record.payload)
            numbers = [round(value) for value in frame_arrays(record.payload, head)[1].tolist()]
            lanes[head.lane].message(head.seq, numbers)
        elif record.kind == Kind.CONTROL and decode_control(record.payload).what == "evidence":
            pictures[decode_control(record.payload).content] += 1
    due = [blob_sha256(picture(n)) for n in range(1, source.said[Lane.BLOB] + 1)]
    whole = sum(1 for sha256 in due if pictures[sha256])
    missing = len(due) - whole
    blobs = lanes[Lane.BLOB]
    readings = [lanes[lane] for lane in READING_LANES]
    for lane in READING_LANES:  # what is missing behind the last message
        lanes[lane].lost += source.said[lane] - lanes[lane].last
    if real:  # a gap between numbers where the seqs have none was never committed; a gap between seqs is a loss
        lost, uncommitted = sum(verdict.seqs_gone for verdict in readings), sum(verdict.lost for verdict in readings)
    else:
        unexplained = sum(max(lanes[lane].seqs_gone - source.evicted[lane], 0) for lane in LANES)
        lost = sum(verdict.lost for verdict in readings) + max(missing - blobs.seqs_gone, 0) + unexplained
        uncommitted = 0
    doubled = sum(max(n - 1, 0) for n in pictures.values())
    evicted = 0 if real else sum(verdict.evicted for verdict in readings) + min(missing, blobs.seqs_gone)
    return {
        "produced": sum(source.said.values()) - uncommitted,
        "logged": sum(verdict.logged for verdict in readings) + whole,
        "lost": lost,
        "repeated": sum(verdict.repeated for verdict in readings) + doubled,
        "repeated_pictures": doubled,
        "disordered": sum(verdict.disordered for verdict in readings),
        "evicted": evicted,
        "uncommitted": uncommitted,
    }


def run(root: Path, seed: int, kills: int, full_disks: int, cuts: int, pause_s: float, *, real: bool) -> dict[str, Any]:
    """Run everything, drain, judge."""
    rng = random.Random(seed)
    card = Path(os.environ.get(MOUNTED, root / "card"))
    card.mkdir(exist_ok=True)
    full_disks = full_disks if MOUNTED in os.environ and not real else 0
    source = Lines(RATES) if real else Source(RATES)
    platform = Platform(root, card, source.port, registry(), real=real)
    if isinstance(source, Lines):
        source.look = Tail(platform.layout).look
    accidents = Accidents(platform, source, rng, pause_s)
    begun_s = time.monotonic()
    try:
        platform.start()
        source.start()
        platform.spawn("gateway")
        wait(lambda: source.progress()[Lane.TELEMETRY] > 0, "a first acknowledgement")
        accidents.run(kills, full_disks, cuts)
        source.quiet()
        drained_s = wait(source.done, "everything committed and acknowledged", 120)
    finally:
        source.stop()
        platform.stop()
    return {
        "kills": kills,
        **judge(platform.layout, source, real=real),
        "full_disks": full_disks,
        "cuts": cuts,
        "recovery_s_max": round(max(accidents.recovery_s, default=0.0), 2),
        "drained_s": round(drained_s, 2),
        "said_again": source.said_again,
        "victims": dict(accidents.victims),
        "seconds": round(time.monotonic() - begun_s, 1),
    }


def with_a_card(words: list[str]) -> int:
    """Run this again in a name space where the gateway's disk is a small one; return its exit code."""
    with tempfile.TemporaryDirectory(prefix="card-") as card:
        script = f'mount -t tmpfs -o size={CARD_BYTES} tmpfs "$0" && exec "$@"'
        argv = ["unshare", "-Urm", "sh", "-c", script, card, sys.executable, "-m", "benchmarks.gateway_chaos", *words]
        return subprocess.run(argv, env={**os.environ, MOUNTED: card}, check=False).returncode


def may_mount() -> bool:
    """Return whether this machine lets us mount a disk of our own."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gateway_chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--full-disks", type=int, default=20)
    parser.add_argument("--cuts", type=int, default=20)
    parser.add_argument("--pause-s", type=float, default=0.5, help="mean pause between accidents")
    parser.add_argument(
        "--real", action="store_true", help="`citybrain gateway run` instead of a gateway that confirms"
    )
    parser.add_argument("--drain-days", type=float, default=0.0, help="instead: how long the gateway was offline")
    parser.add_argument("--dense", action="store_true", help="of --drain-days: 64 points at 1 Hz, told by exception")
    parser.add_argument("--data", type=Path, help="keep the data here (default: a folder that is removed)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if mosquitto() is None:
        raise SystemExit("mosquitto is not installed: no fault test runs on another broker")
    if options.full_disks and not (options.drain_days or options.real) and MOUNTED not in os.environ and may_mount():
        return with_a_card(sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="gateway-chaos-") as folder:
        root = options.data or Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        if options.drain_days:
            from benchmarks.gateway_chaos.drain import drain  # noqa: PLC0415  it needs this module

            result = drain(root, options.seed, options.drain_days, dense=options.dense)
        else:
            result = run(
                root, options.seed, options.kills, options.full_disks, options.cuts, options.pause_s, real=options.real
            )
    print(json.dumps(result) if options.json else "\n".join(f"{k:16} {v}" for k, v in result.items()))
    return 1 if any(result[key] for key in ("lost", "repeated", "disordered")) else 0
