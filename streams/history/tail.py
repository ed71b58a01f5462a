"""The open tail: what the log holds and no part does yet, for one reader at a time.

It follows the log as it is asked, and keeps what it has read while the compactor has not caught up with it; where that
would be much (the compactor is down), the rest is read from the log each time.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from citybrain.layout import Layout
from citybrain.segments import Record
from streams.history.build import beats, open_frame, registry_of
from streams.history.columns import Series
from streams.history.gaps import Gaps
from streams.history.manifest import Gap, Manifest
from streams.log import F64, I64, U32, Kind
from streams.logs import LogStore, SegmentStore
from streams.logs import records as records_of
from streams.registry import METRIC_INDEX, Index

MOST_BYTES = 32 * 1024 * 1024  # a shard; the compactor leaves a few MB, unless it is down
_GATEWAY = struct.Struct("<I")


class Held(NamedTuple):
    """A record and the registry that is in force behind it."""

    registry: str
    record: Record


class Newest(NamedTuple):
    """Values of the asked series in the tail, as they came; `series` indexes what was asked."""

    series: I64
    observed_at: I64
    value: F64
    offset: I64
    position: I64


class Tail:
    """One shard's tail. `load` returns the index of a registry by its hash. May be used by several threads."""

    def __init__(self, layout: Layout, shard: int, load: Callable[[str], Index], logs: LogStore | None = None) -> None:
        self._shard = shard
        self._logs = logs or SegmentStore(layout)
        self._load = load
        self._lock = threading.Lock()
        self._held: dict[tuple[str, int], deque[Record]] = {}  # frames, by registry and gateway number there
        self._bytes = 0
        self._registry = ""
        self._reader = self._logs.reader("log", shard)  # kept: a new one would begin at its segment's beginning

    @property
    def registry(self) -> str:
        """The registry in force behind what was read last."""
        return self._registry

    def frames(self, manifest: Manifest, gateways: Callable[[str], Collection[int]]) -> list[Held]:
        """Return the frames behind the manifest's parts, in their order; `gateways` says whose, by registry.

        Raises Damaged, StorageError.
        """
        with self._lock:
            self._forget(manifest)
            more = self._follow()
            registry, offset = self._registry, self._reader.offset
            kept = [(key, records) for key, records in self._held.items() if key[1] in gateways(key[0])]
            found = [Held(key[0], record) for key, records in kept for record in records]
        found.sort(key=lambda held: held.record.offset)
        if more:
            following = records_of(self._logs.reader("log", self._shard, offset))
            rest = ((held, _gateway(held.record)) for held in _numbered(following, registry))
            found += [held for held, gateway in rest if gateway >= 0 and gateway in gateways(held.registry)]
        return found

    def _forget(self, manifest: Manifest) -> None:
        """Let go of what is in a part by now."""
        for records in self._held.values():
            while records and records[0].offset < manifest.next:
                self._bytes -= len(records.popleft().payload)
        self._held = {key: records for key, records in self._held.items() if records}
        if self._reader.offset <= manifest.next:
            self._reader.offset, self._registry = manifest.next, manifest.registry

    def _follow(self) -> bool:
        """Take what is new; return whether there is more than we keep."""
        while self._bytes <= MOST_BYTES:
            records = self._reader.read()
            if not records:
                return False
            for registry, record in _numbered(records, self._registry):
                self._registry = registry
                if (gateway := _gateway(record)) >= 0:
                    self._held.setdefault((registry, gateway), deque()).append(record)
                    self._bytes += len(record.payload)
        return True

    # --- what is asked ------------------------------------------------------------------------------------------

    def values(self, manifest: Manifest, asked: Sequence[Series], from_ms: int, to_ms: int) -> Newest:
        """Return the values of the asked series with from_ms <= observed_at < to_ms."""
        found: list[Newest] = []
        numbers: dict[str, tuple[set[int], I64]] = {}

        def asked_in(registry: str) -> tuple[set[int], I64]:
            if registry not in numbers:
                numbers[registry] = self._numbers(registry, asked)
            return numbers[registry]

        for registry, record in self.frames(manifest, lambda registry: asked_in(registry)[0]):
            opened = open_frame(record.payload, self._load(registry))
            if opened is not None:
                found.append(_picked(record.offset, *opened[1], asked_in(registry)[1], from_ms, to_ms))
        if not found:
            none = np.empty(0, np.int64)
            return Newest(none, none, np.empty(0, np.float64), none, none)
        return Newest(*(np.concatenate(columns) for columns in zip(*found, strict=True)))

    def _numbers(self, registry: str, asked: Sequence[Series]) -> tuple[set[int], I64]:
        """Return the gateways that the asked series come from, and by series number its place in `asked` (-1: no)."""
        if not registry:
            return set(), np.empty(0, np.int64)
        index = self._load(registry)
        place = np.full(index.n_series, -1, np.int64)
        gateways = set()
        for at, (device, metric) in enumerate(asked):
            known = index.device_index.get(device, -1)
            number = int(index.series_of[known, METRIC_INDEX[metric]]) if known >= 0 else -1
            if number >= 0:
                place[number] = at
                gateways.add(int(index.device_gateway[known]))
        return gateways, place

    def _number(self, registry: str, gateway: str) -> set[int]:
        """Return the number of a gateway in a registry, if it has one."""
        number = self._load(registry).gateway_index.get(gateway) if registry else None
        return set() if number is None else {number}

    def gaps(self, manifest: Manifest, gateway: str) -> tuple[tuple[Gap, ...], int]:
        """Return the gaps of a gateway in the tail, and the highest time of its telemetry (-1: none yet)."""
        gaps = Gaps({key: each for key, each in manifest.streams.items() if key.rpartition("/")[0] == gateway})
        for registry, record in self.frames(manifest, lambda registry: self._number(registry, gateway)):
            index = self._load(registry)
            opened = open_frame(record.payload, index)
            if opened is not None:
                at = opened[1][0]
                span = (int(at.min()), int(at.max())) if len(at) else None
                gaps.frame(gateway, opened[0], span, beats=beats(index, gateway))
        stream = gaps.streams.get(f"{gateway}/telemetry")
        return gaps.take(), stream.at_ms if stream is not None else -1


def _numbered(records: Iterable[Record], registry: str) -> Iterator[Held]:
    """Yield records with the registry that is in force behind each, `registry` before the first."""
    for record in records:
        if record.kind == Kind.CONTROL:
            registry = registry_of(record.payload) or registry
        yield Held(registry, record)


def _gateway(record: Record) -> int:
    """Return the number of a frame's gateway, -1 where it is no frame."""
    if record.kind != Kind.FRAME or len(record.payload) < _GATEWAY.size:
        return -1
    return int(_GATEWAY.unpack_from(record.payload)[0])


def _picked(offset: int, observed_at: I64, value: F64, series: U32, place: I64, from_ms: int, to_ms: int) -> Newest:
    """Return the values of one frame that are asked for."""
    asked = place[series]
    here = np.flatnonzero((asked >= 0) & (observed_at >= from_ms) & (observed_at < to_ms))
    return Newest(asked[here], observed_at[here], value[here], np.full(len(here), offset, np.int64), here)
