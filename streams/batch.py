"""Frames of the log laid end to end as columns, each value with its gateway's times: what every kernel runs over.

A gateway's *stream time* is the highest time on its telemetry lane, clamped to 2 s behind the platform's receipt, so a
clock in the future cannot run ahead. Its *live time* sums the steps of its stream time, each counted with at most 30 s:
while it is cut off or switched off, none of its devices grows old.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

from citybrain.clock import SECOND_MS
from citybrain.errors import Damaged
from citybrain.model import Lane
from citybrain.segments import Record
from streams.kernels import compiled
from streams.kinds.holding import I8, I32, Batch
from streams.log import F64, I64, U32, FrameHead, frame_arrays, frame_head

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
    """Frames laid end to end: frame f has values `start[f]..start[f+1]`, of `gateway[f]`, received at `received[f]`."""

    start: I64
    gateway: I64
    telemetry: I8
    received: I64
    observed: I64
    value: F64
    series: U32


def open_frame(record: Record) -> tuple[FrameHead, tuple[I64, F64, U32]] | None:
    """Return a frame record's head and arrays, or None where it is not one."""
    try:
        head = frame_head(record.payload)
        return head, frame_arrays(record.payload, head)
    except (struct.error, ValueError, Damaged):
        return None


def lay(frames: list[tuple[int, FrameHead, tuple[I64, F64, U32]]]) -> Frames:
    """Lay frames (received_at, head, arrays) end to end."""
    counts = np.array([head.values for _, head, _ in frames], np.int64)
    return Frames(
        np.concatenate((np.zeros(1, np.int64), np.cumsum(counts))),
        np.array([head.gateway for _, head, _ in frames], np.int64),
        np.array([head.lane == Lane.TELEMETRY for _, head, _ in frames], np.int8),
        np.array([received for received, _, _ in frames], np.int64),
        np.concatenate([arrays[0] for _, _, arrays in frames]),
        np.concatenate([arrays[1] for _, _, arrays in frames]),
        np.concatenate([arrays[2] for _, _, arrays in frames]),
    )


def take(frames: Frames, of_series: I32, device_of: I32, times: Times, batch: Batch, counts: I64) -> None:
    """Write every value's times and whether it is used; move `times` on. A value older than its series' last is late.

    Used values of one device and time that stand together count as one reading.
    """
    for f in range(len(frames.gateway)):
        gateway = frames.gateway[f]
        limit = frames.received[f] + AHEAD_MS
        stream, live = times.stream[gateway], times.live[gateway]
        device_t, device = np.int64(UNKNOWN), np.int64(-1)
        for p in range(frames.start[f], frames.start[f + 1]):
            series = frames.series[p]
            t = min(frames.observed[p], limit)
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
