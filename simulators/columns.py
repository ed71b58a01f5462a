"""Readings by the thousand: what sensors say, as columns, from the generator to the body of a frame.

`Columns` hold the readings of devices of one kind and lane. Sorted together they are either readings for an
`edge.agent`, or, for a simulation that is in a hurry, cut into bodies of the wire (`Frames`) without a Python object a
reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isnan

import msgspec
import numpy as np
import numpy.typing as npt

from citybrain.model import Lane, Reading
from citybrain.wire import BODY
from simulators.noise import F64, I64

U16 = npt.NDArray[np.uint16]
Emitted = tuple[Lane, Reading]

MISSED, REPEATED = 0.015, 0.005  # shares of telemetry reports; events are confirmed and come
MOST_VALUES = 8000  # of a body: half of what a message holds
MOST_NAMED = 100  # more devices than this, and a frame names only those that speak in it


class Columns(msgspec.Struct, frozen=True, eq=False):
    """Readings of one lane. `device` [n] indexes `names`; `values` [n, metrics] is NaN where a reading says nothing."""

    lane: Lane
    names: tuple[str, ...]
    metrics: tuple[str, ...]
    device: I64
    at: I64
    values: F64

    def rows(self, keep: npt.NDArray[np.bool_] | I64) -> Columns:
        """Return some of the readings."""
        return msgspec.structs.replace(self, device=self.device[keep], at=self.at[keep], values=self.values[keep])


def grid(phase_ms: I64, period_ms: int, from_ms: int, to_ms: int) -> tuple[I64, I64]:
    """Return (device, time) of everything that happens each `period_ms` within [from, to), by device."""
    first = from_ms + (phase_ms - from_ms) % period_ms
    most = max(-(-(to_ms - from_ms) // period_ms), 0)
    times = first[:, None] + period_ms * np.arange(most, dtype=np.int64)
    device, place = np.nonzero(times < to_ms)
    return device, times[device, place]


def by_luck(luck: F64, missed: float | F64 = MISSED, repeated: float = REPEATED) -> I64:
    """Return the rows that are reported, in order: some are missed, some come twice."""
    times = np.where(luck < missed, 0, np.where(luck > 1.0 - repeated, 2, 1))
    return np.repeat(np.arange(len(luck)), times)


def from_events(lane: Lane, names: tuple[str, ...], metrics: tuple[str, ...], events: Sequence[Event]) -> Columns:
    """Return columns of readings that were made one by one."""
    place = {metric: number for number, metric in enumerate(metrics)}
    values = np.full((len(events), len(metrics)), np.nan)
    for row, event in enumerate(events):
        for metric, value in event.values.items():
            values[row, place[metric]] = value
    device = np.array([event.device for event in events], np.int64)
    return Columns(lane, names, metrics, device, np.array([event.at for event in events], np.int64), values)


class Event(msgspec.Struct, frozen=True):
    """One reading of an event: a device's number in its group, Unix ms, what it says."""

    device: int
    at: int
    values: Mapping[str, float]


def only(columns: Columns, spoken: npt.NDArray[np.bool_]) -> Columns:
    """Return what is left where `spoken` [devices, metrics] says which device has which metric."""
    values = np.where(spoken[columns.device], columns.values, np.nan)
    kept = msgspec.structs.replace(columns, values=values)
    return kept.rows(np.flatnonzero((~np.isnan(values)).any(axis=1)))


def readings_of(blocks: Sequence[Columns], shift_ms: int = 0) -> list[Emitted]:
    """Return readings in order of their time, stamped `shift_ms` later; of equal times in the order of `blocks`."""
    order = np.argsort(np.concatenate([block.at for block in blocks]), kind="stable").tolist() if blocks else []
    items = [item for block in blocks for item in _readings(block, shift_ms)]
    return [items[place] for place in order]


def _readings(block: Columns, shift_ms: int) -> list[Emitted]:
    found: list[Emitted] = []
    for device, at, values in zip(
        block.device.tolist(), (block.at + shift_ms).tolist(), block.values.tolist(), strict=True
    ):
        said = {name: value for name, value in zip(block.metrics, values, strict=True) if not isnan(value)}
        found.append((block.lane, Reading(block.names[device], at, said)))
    return found


class Frames:
    """The readings of one gateway and lane over a while, ready to be cut into bodies of the wire.

    Stamped `shift_ms` later than they say. arrivals: for each block when its readings get to the gateway, where that is
    not at once; they are in order of that.
    """

    def __init__(self, blocks: Sequence[Columns], shift_ms: int = 0, arrivals: Sequence[I64] = ()) -> None:
        names = list(dict.fromkeys(name for block in blocks for name in block.names))
        metrics = list(dict.fromkeys(name for block in blocks for name in block.metrics))
        parts = [_entries(block, names, metrics) for block in blocks]
        row, at, device, metric, value = (np.concatenate(part) for part in zip(*parts, strict=True))
        first = np.cumsum([0, *(len(block.at) for block in blocks)])[:-1]
        row += np.repeat(first, [len(part[0]) for part in parts])
        arrival = np.concatenate(list(arrivals))[row] if arrivals else at
        order = np.argsort(arrival, kind="stable")
        self.arrival: I64 = arrival[order]
        self.at: I64 = at[order] + shift_ms
        self.value: F64 = value[order]
        self._device: U16 = device[order].astype(np.uint16)
        self._metric: U16 = metric[order].astype(np.uint16)
        self._reading: I64 = np.cumsum(np.diff(row[order], prepend=-1) != 0)
        self._names = names
        self._metrics = metrics
        self._packed = _packed(names, metrics) if len(names) <= MOST_NAMED else b""

    def cut(self, times_ms: I64) -> list[int]:
        """Return for each true time how many values had arrived before it."""
        found: list[int] = np.searchsorted(self.arrival, times_ms).tolist()
        return found

    def places(self, metric: str) -> I64:
        """Return where in `value` the values of a metric stand."""
        if metric not in self._metrics:
            return np.empty(0, np.int64)
        return np.flatnonzero(self._metric == self._metrics.index(metric))

    def readings(self, start: int, end: int) -> int:
        """Return how many readings the values [start, end) are."""
        return int(self._reading[end - 1] - self._reading[start]) + 1 if end > start else 0

    def bodies(self, start: int, end: int) -> Iterator[tuple[bytes, int]]:
        """Return the values [start, end) as columns bodies (docs/wire.md), and how many readings each holds."""
        while start < end:
            stop = end
            if end - start > MOST_VALUES:  # never within a reading
                stop = int(np.searchsorted(self._reading, self._reading[start + MOST_VALUES]))
            yield self._body(start, stop), self.readings(start, stop)
            start = stop

    def _body(self, start: int, end: int) -> bytes:
        device, names, packed = self._device[start:end], self._names, self._packed
        if not packed:
            spoken, place = np.unique(device, return_inverse=True)
            names = [names[number] for number in spoken.tolist()]
            device, packed = place.astype(np.uint16), _packed(names, self._metrics)
        at = self.at[start:end]
        base = int(at.min())
        head = BODY.pack(len(names), len(self._metrics), end - start, len(packed), 0, base)
        value, metric = self.value[start:end], self._metric[start:end]
        after = (at - base).astype(np.uint32)
        return b"".join((head, packed, value.tobytes(), after.tobytes(), device.tobytes(), metric.tobytes()))


def _packed(names: Sequence[str], metrics: Sequence[str]) -> bytes:
    joined = "\n".join([*names, *metrics]).encode()
    return joined + b"\0" * (-len(joined) % 8)


def _entries(block: Columns, names: list[str], metrics: list[str]) -> tuple[I64, I64, I64, I64, F64]:
    """Return (reading, time, device, metric, value) of each value of a block, numbered by `names` and `metrics`."""
    place = {name: number for number, name in enumerate(names)}
    device_of = np.array([place[name] for name in block.names], np.int64)
    metric_of = np.array([metrics.index(name) for name in block.metrics], np.int64)
    row, column = np.nonzero(~np.isnan(block.values))
    return row, block.at[row], device_of[block.device[row]], metric_of[column], block.values[row, column]
