"""What a gateway's spool costs its SD card, and how long it takes to open.

    python -m benchmarks.spool --json

Each case is an hour of 64 points through the real agent and spool, on a virtual clock, acknowledged a second later:

syncs_per_h   fdatasync, fsync and folder syncs together: what an SD card wears by
bytes_per_h   what the program wrote; marks (8 bytes, never synced) included
card_mb_per_h an estimate of what reaches the card: 4 KiB pages touched by each sync, and 12 KiB of ext4's journal [U]
open_s        processor seconds until a spool of `--messages` messages is recovered and knows what to ask
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from citybrain.model import Lane, Reading
from citybrain.storage import OsFiles, OsHandle
from edge.agent import Agent
from gateway.pace import Paced
from gateway.spool import Spool

POINTS = 64
HOUR_S = 3600
PAGE = 4096
JOURNAL = 3 * PAGE
BORN_MS = 1_767_225_600_000
EVENTS_PER_H = 12


class Counted(OsFiles):
    """The real disk, and what was asked of it."""

    def __init__(self) -> None:
        self.did: Counter[str] = Counter()

    def append(self, path: Path) -> OsHandle:
        self._synced(0 if path.exists() else 1, 0)
        return CountedHandle(super().append(path), self.did)

    def make(self, folder: Path) -> None:
        self._synced(1, 0)
        super().make(folder)

    def replace(self, path: Path, data: bytes) -> None:
        self._synced(2, len(data))
        super().replace(path, data)

    def mark(self, path: Path, value: int) -> None:
        self.did["marks"] += 1
        self.did["bytes"] += 8
        super().mark(path, value)

    def _synced(self, times: int, size: int) -> None:
        self.did["syncs"] += times
        self.did["bytes"] += size
        self.did["card"] += times * JOURNAL + -(-size // PAGE) * PAGE


class CountedHandle(OsHandle):
    """A file of `Counted`."""

    def __init__(self, handle: OsHandle, did: Counter[str]) -> None:
        self._handle = handle
        self._did = did
        self._size = self._synced_to = 0

    def write(self, data: bytes) -> None:
        self._did["bytes"] += len(data)
        self._size += len(data)
        self._handle.write(data)

    def sync(self) -> None:
        self._did["syncs"] += 1
        pages = -(-self._size // PAGE) - self._synced_to // PAGE
        self._did["card"] += pages * PAGE + JOURNAL
        self._synced_to = self._size
        self._handle.sync()

    def truncate(self, size: int) -> None:
        self._handle.truncate(size)

    def close(self) -> None:
        self._handle.close()


class Points:
    """64 points, each every `each_s`, spread over it; and an event now and then."""

    def __init__(self, each_s: int) -> None:
        self._each_s = each_s

    def poll(self, now_ms: int) -> list[tuple[Lane, Reading]]:
        at_s = (now_ms - BORN_MS) // 1000
        found = [
            (Lane.TELEMETRY, Reading(f"hyd-{n:06d}", now_ms, {"pressure_mpa": 0.3, "flow_lps": 1.0}))
            for n in range(POINTS)
            if (at_s + n) % self._each_s == 0
        ]
        if at_s % (HOUR_S // EVENTS_PER_H) == 0:
            found.append((Lane.EVENT, Reading("hyd-000001", now_ms, {"tilt_deg": 30.0})))
        return found


def hour(folder: Path, each_s: int, commit_every_s: float) -> dict[str, Any]:
    """Return what an hour costs."""
    files, now_s = Counted(), 0.0
    spool = Spool(folder, "board", files)
    spool.start()
    paced = Paced(spool, lambda: now_s, commit_every_s)
    agent = Agent([Points(each_s)], paced)
    files.did.clear()
    for second in range(HOUR_S):
        now_s = float(second)
        for lane in Lane:
            spool.acknowledged(lane, spool.next_seq(lane) - 1)
        agent.step(BORN_MS + second * 1000)
        paced.commit()
    spool.close()
    did = files.did
    return {
        "each_s": each_s,
        "commit_every_s": commit_every_s,
        "syncs_per_h": did["syncs"],
        "marks_per_h": did["marks"],
        "bytes_per_h": did["bytes"],
        "card_mb_per_h": round(did["card"] / 1e6, 1),
    }


def opening(folder: Path, messages: int) -> dict[str, Any]:
    """Return what it takes to open a large spool."""
    for _ in _filled(folder, messages):
        pass
    spool = Spool(folder, "board", limit_bytes=1 << 40)
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    spool.start()
    found = {"open_s": round(time.process_time() - cpu_s, 3), "open_wall_s": round(time.perf_counter() - wall_s, 3)}
    assert spool.spooled() == messages
    assert spool.earliest(Lane.TELEMETRY, messages) == 1
    spool.close()
    return {"messages": messages, "segments": len(list((folder / "telemetry").glob("*.seg"))), **found}


def _filled(folder: Path, messages: int) -> Iterator[int]:
    """Spool so many messages of 8 readings, a thousand at a sync."""
    spool = Spool(folder, "board", limit_bytes=1 << 40)
    spool.start()
    body = [Reading(f"hyd-{n:06d}", BORN_MS, {"pressure_mpa": 0.3}) for n in range(8)]
    spool.append(Lane.TELEMETRY, body, BORN_MS)
    spool.commit()
    packed = spool.body(Lane.TELEMETRY, 1)
    assert packed is not None
    for number in range(2, messages + 1):
        spool.append_body(Lane.TELEMETRY, packed, 8, BORN_MS + number)
        if number % 1000 == 0 or number == messages:
            spool.commit()
            yield number
    spool.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="spool-") as folder:
        cases = [(60, 1.0), (60, 10.0), (1, 1.0), (1, 10.0)]
        hours = [hour(Path(folder) / f"{number}", *case) for number, case in enumerate(cases)]
        result = {"hours": hours, **opening(Path(folder) / "large", options.messages)}
    print(json.dumps(result) if options.json else "\n".join(f"{key:12} {value}" for key, value in result.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
