"""`benchmarks.gateway_chaos --drain-days`: a gateway that was offline for days comes back, and its backlog drains.

64 points at one reading a minute; or, dense, at 1 Hz told by exception: a value that moved by more than its deadband,
about one in eight [U], and at least every 5 minutes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gateway_chaos.box import SHARD
from benchmarks.gateway_chaos.platform import Platform, registry, wait
from benchmarks.gateway_chaos.source import Source
from benchmarks.ingest import cpu_s
from citybrain.clock import real_unix_ms
from citybrain.layout import Layout
from citybrain.model import Lane, Reading
from citybrain.segments import Reader
from gateway.spool import Spool
from streams.log import Kind, frame_arrays, frame_head

POINTS = 64
BATCH = 100
MOVED = 0.125
HEARTBEAT_S = 300
EVENTS_PER_S = 2.0


def backlog(days: float, seed: int, *, dense: bool) -> Iterator[Reading]:
    """Yield what the points said while the line was down, in order; the value is the reading's number."""
    rng, number = random.Random(seed), 0
    each_s = 1 if dense else 60
    begin_ms = real_unix_ms() - round(days * 86_400_000)
    for at_s in range(0, round(days * 86_400), each_s):
        for point in range(POINTS):
            if dense and rng.random() >= MOVED and (at_s + point) % HEARTBEAT_S:
                continue
            number += 1
            yield Reading(f"meter-{point}", begin_ms + at_s * 1000 + point, {"value": float(number)})


def fill(folder: Path, days: float, seed: int, *, dense: bool) -> tuple[int, int]:
    """Spool the backlog as the gateway did; return (messages, readings)."""
    spool = Spool(folder, "board")
    spool.start()
    readings, batch = 0, list[Reading]()
    for reading in backlog(days, seed, dense=dense):
        batch.append(reading)
        if len(batch) == BATCH:
            spool.append(Lane.TELEMETRY, batch, reading.observed_at)
            readings, batch = readings + BATCH, []
            if readings % (BATCH * 100) == 0:
                spool.commit()
    if batch:
        spool.append(Lane.TELEMETRY, batch, batch[-1].observed_at)
    spool.commit()
    messages = spool.next_seq(Lane.TELEMETRY) - 1
    spool.close()
    return messages, readings + len(batch)


class Delays:
    """How long each event took from when the source said it until its acknowledgement."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._due: dict[int, float] = {}
        self._acked = 0
        self.worst_s = 0.0

    def look(self) -> None:
        """Note what is new; called every few milliseconds."""
        now_s = time.monotonic()
        with self._source.lock:
            said, acked = self._source.said[Lane.EVENT], self._source.acked[Lane.EVENT]
        for n in range(max(self._due, default=0) + 1, said + 1):
            self._due[n] = now_s
        for n in range(self._acked + 1, acked + 1):
            self.worst_s = max(self.worst_s, now_s - self._due.get(n, now_s))
        self._acked = acked


def drain(root: Path, seed: int, days: float, *, dense: bool) -> dict[str, Any]:
    """Fill a spool, let it drain beside live events, compare it with the log."""
    card = root / "card"
    card.mkdir(exist_ok=True)
    messages, readings = fill(card / "spool", days, seed, dense=dense)
    spool_mb = sum(path.stat().st_size for path in (card / "spool").rglob("*.seg")) / 1e6
    source = Source({Lane.EVENT: EVENTS_PER_S})
    platform = Platform(root, card, source.port, registry(POINTS))
    delays = Delays(source)
    try:
        platform.start()
        source.start()
        platform.spawn("gateway")

        def drained() -> bool:
            delays.look()
            return 0 <= source.spooled <= 1 and source.acked[Lane.EVENT] > 0

        took_s = wait(drained, "drained", 900)
        cpu = {name: round(cpu_s(platform.pid(name)), 1) for name in ("gateway", "ingest", "broker")}
        source.quiet()
        wait(source.done, "the last event acknowledged")
    finally:
        source.stop()
        platform.stop()
    return {
        "days": days,
        "dense": dense,
        "messages": messages,
        "readings": readings,
        "spool_mb": round(spool_mb, 1),
        "drain_s": round(took_s, 1),
        "readings_per_s": round(readings / took_s),
        "event_delay_s_max": round(delays.worst_s, 2),
        "cpu_s": cpu,
        **verify(platform.layout, readings),
    }


def verify(layout: Layout, readings: int) -> dict[str, int]:
    """Return what of the backlog is lost, repeated or out of order in the log."""
    last, logged, repeated, disordered = 0, 0, 0, 0
    for record in Reader(layout.log(SHARD)):
        if record.kind != Kind.FRAME:
            continue
        head = frame_head(record.payload)
        if head.lane is not Lane.TELEMETRY:
            continue
        for value in frame_arrays(record.payload, head)[1].tolist():
            repeated += value == last
            disordered += value < last
            logged += value > last
            last = max(last, round(value))
    return {"lost": readings - logged, "repeated": repeated, "disordered": disordered}
