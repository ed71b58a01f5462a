"""The latest value of every series: a projection of the log that the API keeps for itself, and may lose at any time.

It starts from the newest engine snapshot, where there is one, and follows the log from there. Times are the engine's:
observed, but at most `received_at` + 2 s. Arrays are by series number of the registry in force in that shard.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from citybrain.counters import Counters
from citybrain.errors import CityBrainError, NotFound
from citybrain.layout import Layout
from citybrain.model import Device, Gateway, Registry
from citybrain.segments import Record
from streams.engine import latest_from_snapshot
from streams.handover import shared_series
from streams.log import F64, I64, U32, Control, Kind, decode_control, frame_arrays, frame_head
from streams.logs import LogReader, LogStore, SegmentStore
from streams.registry import METRIC_NAMES, Index, decode_registry
from streams.runtimes.snapshots import snapshot_paths

FUTURE_MS = 2000  # a sensor's clock may run ahead of ours by this much
FRAME, CONTROL = int(Kind.FRAME), int(Kind.CONTROL)  # once a record: an enum is slow to compare
NEVER = np.iinfo(np.int64).min


class Value(msgspec.Struct, frozen=True):
    """The latest value of one series, in the metric's unit, and its time (Unix ms)."""

    value: float
    at: int


class Seen(msgspec.Struct, frozen=True):
    """What a gateway last did: time of its last message's arrival, and of its newest value (Unix ms), None if never."""

    received_at: int | None
    observed_at: int | None


EMPTY = Index(Registry((), ()), "")


class Frame(NamedTuple):
    """One frame's values; `at`: observed, but no later than the platform can have received it."""

    gateway: int
    received_at: int
    at: I64
    value: F64
    series: U32


class Shard:
    """The latest values of one shard under one registry, and where in the log they stand."""

    def __init__(self, number: int, reader: LogReader) -> None:
        self.number = number
        self.index = EMPTY
        self.time: I64 = np.empty(0, np.int64)
        self.value: F64 = np.empty(0, np.float64)
        self.gateway_received: I64 = np.empty(0, np.int64)
        self.reader = reader

    def adopt(self, index: Index) -> None:
        """Go over to another registry; values of series that both know are kept."""
        before, time, value = self.index, self.time, self.value
        received = self.gateway_received
        self.index = index
        self.time = np.full(index.n_series, NEVER, np.int64)
        self.value = np.zeros(index.n_series, np.float64)
        self.gateway_received = np.full(len(index.gateways), NEVER, np.int64)
        for name, new in index.gateway_index.items():
            if name in before.gateway_index:
                self.gateway_received[new] = received[before.gateway_index[name]]
        olds, news = shared_series(before, index)
        self.time[news], self.value[news] = time[olds], value[olds]

    def frames(self, frames: list[Frame]) -> None:
        """Take frames: of several values of a series the newest stays, of equally old ones the last."""
        if not frames:
            return
        for frame in frames:
            heard = self.gateway_received[frame.gateway]
            self.gateway_received[frame.gateway] = max(heard, frame.received_at)
        at = np.concatenate([frame.at for frame in frames])
        value = np.concatenate([frame.value for frame in frames])
        series = np.concatenate([frame.series for frame in frames])
        order = np.argsort(at, kind="stable")
        at, value, series = at[order], value[order], series[order]
        newer = at >= self.time[series]
        self.time[series[newer]] = at[newer]
        self.value[series[newer]] = value[newer]

    def open(self, record: Record) -> Frame:
        """Return a frame record's values; raises struct.error, ValueError or CityBrainError where it is none."""
        head = frame_head(record.payload)
        observed_at, value, series = frame_arrays(record.payload, head)
        if head.gateway >= len(self.gateway_received) or series.max(initial=0) >= max(len(self.time), 1):
            raise NotFound(f"gateway {head.gateway}, or one of its series: not in the registry in force")
        at = np.minimum(observed_at, record.received_at + FUTURE_MS)
        return Frame(head.gateway, record.received_at, at, value, series)

    def of(self, device: Device) -> dict[str, Value]:
        """Return the latest values of a device, by metric."""
        number = self.index.device_index.get(device.id)
        if number is None:
            return {}
        found = {}
        for metric, series in zip(METRIC_NAMES, self.index.series_of[number], strict=True):
            if series >= 0 and self.time[series] != NEVER:
                found[metric] = Value(float(self.value[series]), int(self.time[series]))
        return found

    def seen(self, gateway: str) -> Seen:
        """Return when a gateway of this shard was last heard."""
        number = self.index.gateway_index.get(gateway)
        if number is None:
            return Seen(None, None)
        newest = int(self.time[self.index.series_of_gateway(number)].max(initial=NEVER))
        received = int(self.gateway_received[number])
        return Seen(received if received != NEVER else None, newest if newest != NEVER else None)


class Latest:
    """The latest values of all shards. `follow` is called by one thread; everything else may be called by any."""

    def __init__(self, layout: Layout, shards: int, counters: Counters, logs: LogStore | None = None) -> None:
        self.layout = layout
        self.counters = counters
        store = logs or SegmentStore(layout)
        self._shards = tuple(Shard(number, store.reader("log", number)) for number in range(shards))
        self._lock = threading.Lock()
        self._indexes: dict[str, Index] = {"": EMPTY}

    def start(self) -> None:
        """Begin at the newest snapshot of every shard that can be read; without one, at the log's beginning."""
        for shard in self._shards:
            self._restore(shard)

    def follow(self) -> int:
        """Take what has been committed to the logs since the last call; return the number of records."""
        taken = 0
        for shard in self._shards:
            records = shard.reader.read()
            with self._lock:
                self._take(shard, records)
            taken += len(records)
        self.counters.add("received_total", taken)
        return taken

    @property
    def registry(self) -> Registry:
        """The registry in force."""
        return self._newest().registry

    def device(self, name: str) -> Device:
        """Return a device of the registry in force; raises NotFound."""
        return self._newest().device(name)

    def find(self, name: str) -> Device | None:
        """Return a device of the registry in force, None where there is none."""
        index = self._newest()
        number = index.device_index.get(name)
        return None if number is None else index.devices[number]

    def means(self, subject: str) -> bool:
        """Return whether an override's subject is a device of the registry in force, or an area with one."""
        return len(self._newest().under(subject)) > 0

    def gateway(self, name: str) -> Gateway:
        """Return a gateway of the registry in force; raises NotFound."""
        index = self._newest()
        if name not in index.gateway_index:
            raise NotFound(f"gateway {name!r}: not in the registry")
        return index.gateways[index.gateway_index[name]]

    def values(self, device: Device) -> dict[str, Value]:
        """Return the latest values of a device, by metric."""
        with self._lock:
            return self._shard_of(device.gateway).of(device)

    def seen(self, gateway: str) -> Seen:
        """Return when a gateway was last heard."""
        with self._lock:
            return self._shard_of(gateway).seen(gateway)

    def _newest(self) -> Index:
        """The control record that brings a registry reaches the shards one after the other; the first has it first."""
        return self._shards[0].index if self._shards else EMPTY

    def _shard_of(self, gateway: str) -> Shard:
        number = self.gateway(gateway).shard
        return self._shards[number]

    def _restore(self, shard: Shard) -> None:
        for path in reversed(snapshot_paths(self.layout.engine(shard.number))):
            try:
                name, offset, time, value = latest_from_snapshot(path.read_bytes())
                index = self._index(name)
            except CityBrainError as error:
                self.counters.add("errors_total", stage="snapshot")
                self.counters.warn(f"{path}: {error}; an older one is tried")
                continue
            if len(time) != index.n_series:
                self.counters.warn(f"{path}: {len(time)} series, its registry has {index.n_series}")
                continue
            shard.adopt(index)
            shard.time[:], shard.value[:] = time, value
            shard.reader.offset = offset
            return

    def _take(self, shard: Shard, records: Sequence[Record]) -> None:
        """Take records; one that cannot be used is counted and left out, the rest goes on."""
        frames: list[Frame] = []
        for record in records:
            try:
                if record.kind == FRAME:
                    frames.append(shard.open(record))
                elif record.kind == CONTROL:
                    shard.frames(frames)
                    frames = []
                    self._control(shard, decode_control(record.payload))
            except (CityBrainError, msgspec.DecodeError, struct.error, ValueError) as error:
                self.counters.add("errors_total", stage="readings")
                self.counters.warn(f"log {shard.number} offset {record.offset}: {error}")
        shard.frames(frames)

    def _control(self, shard: Shard, control: Control) -> None:
        if control.what == "registry":
            shard.adopt(self._index(control.content))

    def _index(self, name: str) -> Index:
        if name not in self._indexes:
            self._indexes[name] = Index(decode_registry(self.layout.get_blob(name)), name)
        return self._indexes[name]
