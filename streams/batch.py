"""Frames of the log laid end to end as columns, each value with its gateway's times: what every kernel runs over.

A gateway's *stream time* is the highest time on its telemetry lane, clamped to 2 s behind the platform's receipt, so a
clock in the future cannot run ahead. Its *live time* sums the steps of its stream time, each counted with at most 30 s:
while it is cut off or switched off, none of its devices grows old.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from citybrain.clock import SECOND_MS
from citybrain.segments import Record
from streams.kernels import compiled
from streams.kinds.holding import I8, I32, Batch
from streams.log import F64, FRAME_HEAD, I64, U32

U8 = npt.NDArray[np.uint8]

AHEAD_MS = 2 * SECOND_MS
STEP_MS = 30 * SECOND_MS
UNKNOWN = -(2**63)
USED, LATE, FOREIGN, READINGS = range(4)


class Times(NamedTuple):
    """What is remembered of every gateway (stream, live) and series (last time and value), in ms; UNKNOWN before."""

    stream: I64
    live: I64
    last_t: I64
    last_v: F64

    @staticmethod
    def fresh(gateways: int, series: int) -> Times:
        return Times(
            np.full(gateways, UNKNOWN, np.int64),
            np.zeros(gateways, np.int64),
            np.full(series, UNKNOWN, np.int64),
            np.full(series, np.nan),
        )


class Frames(NamedTuple):
    """Frames laid end to end: frame f has values `start[f]..start[f+1]`, of `gateway[f]`, received at `received[f]`.

    `kept[f]`: 0 where the record is no frame, or one of a gateway that is not there; it has no values then.
    """

    kept: I8
    start: I64
    gateway: I64
    telemetry: I8
    received: I64
    observed: I64
    value: F64
    series: U32


def lay(records: Sequence[Record], gateways: int) -> Frames:
    """Lay the frames of these records end to end; `gateways`: how many there are."""
    count = len(records)
    sizes = np.fromiter((len(record.payload) for record in records), np.int64, count)
    room = int(np.maximum(sizes - FRAME_HEAD.size, 0).sum()) // 20
    frames = Frames(
        np.empty(count, np.int8),
        np.zeros(count + 1, np.int64),
        np.empty(count, np.int64),
        np.empty(count, np.int8),
        np.fromiter((record.received_at for record in records), np.int64, count),
        np.empty(room, np.int64),
        np.empty(room, np.float64),
        np.empty(room, np.uint32),
    )
    data = np.frombuffer(b"".join([record.payload for record in records]), np.uint8)
    raw = (frames.observed.view(np.uint8), frames.value.view(np.uint8), frames.series.view(np.uint8))
    compiled(unfold)(data, sizes, gateways, frames, *raw)
    used = frames.start[-1]
    return frames._replace(observed=frames.observed[:used], value=frames.value[:used], series=frames.series[:used])


def unfold(data: U8, sizes: I64, gateways: int, frames: Frames, observed: U8, value: U8, series: U8) -> None:
    """Read every record's head and copy its arrays (`streams.log.pack_frame`); as bytes, since none is aligned."""
    at, k = np.int64(0), np.int64(0)
    for f in range(len(sizes)):
        size = sizes[f]
        n, frames.kept[f] = np.int64(0), 0
        if size >= 40:
            gateway = np.int64(0)
            for b in range(4):
                gateway |= np.int64(data[at + b]) << (8 * b)
                n |= np.int64(data[at + 32 + b]) << (8 * b)
            lane = data[at + 4]
            frames.gateway[f], frames.telemetry[f] = gateway, lane == 0
            if size == 40 + 20 * n and lane <= 2 and gateway < gateways:
                frames.kept[f] = 1
                body = at + 40
                observed[8 * k : 8 * (k + n)] = data[body : body + 8 * n]
                value[8 * k : 8 * (k + n)] = data[body + 8 * n : body + 16 * n]
                series[4 * k : 4 * (k + n)] = data[body + 16 * n : body + 20 * n]
                k += n
        frames.start[f + 1] = k
        at += size


def take(frames: Frames, of_series: I32, device_of: I32, times: Times, batch: Batch, counts: I64) -> None:
    """Write every value's times and whether it is used; move `times` on. A value older than its series' last is late.

    Used values of one device and time that stand together count as one reading.
    """
    for f in range(len(frames.gateway)):
        if frames.kept[f] == 0:
            continue
        gateway = frames.gateway[f]
        limit = frames.received[f] + AHEAD_MS
        stream, live = times.stream[gateway], times.live[gateway]
        device_t, device = np.int64(UNKNOWN), np.int64(-1)
        for p in range(frames.start[f], frames.start[f + 1]):
            series = frames.series[p]
            t = min(frames.observed[p], limit)
            batch.gateway[p] = gateway
            batch.t[p] = t
            batch.used[p] = 0
            if series >= len(of_series) or of_series[series] != gateway:
                counts[FOREIGN] += 1
            elif t < times.last_t[series]:
                counts[LATE] += 1
            else:
                batch.used[p] = 1
                counts[USED] += 1
                times.last_t[series] = t
                times.last_v[series] = frames.value[p]
                if device_of[series] != device or t != device_t:
                    counts[READINGS] += 1
                    device, device_t = np.int64(device_of[series]), t
                if frames.telemetry[f] == 1 and t > stream:
                    live += 0 if stream == UNKNOWN else min(t - stream, STEP_MS)
                    stream = t
            batch.stream[p] = stream
            batch.live[p] = live
        times.stream[gateway], times.live[gateway] = stream, live


def take_batch(frames: Frames, of_series: I32, device_of: I32, times: Times) -> tuple[Batch, I64]:
    """Return the batch of these frames and what was counted (USED, LATE, FOREIGN, READINGS); move `times` on."""
    n = len(frames.value)
    batch = Batch(
        np.empty(n, np.int32),
        np.empty(n, np.int64),
        frames.value,
        frames.series,
        np.empty(n, np.int8),
        np.empty(n, np.int64),
        np.empty(n, np.int64),
    )
    counts = np.zeros(4, np.int64)
    compiled(take)(frames, of_series, device_of, times, batch, counts)
    return batch, counts
