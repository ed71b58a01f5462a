"""Bodies to arrays: every value checked and given its series number.

Columns go through one compiled loop with the names resolved once; JSON of the plain shape through a compiled parser.
Whatever is not plain (an unknown name, an escape, a foreign key, rubbish) takes the general path
over `citybrain.wire.readings_of`, which gives the same results bit for bit and can say what is wrong.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from citybrain import wire
from citybrain.model import Device, Gateway, Lane, Place, Reading, Registry
from citybrain.units import METRICS
from streams.log import F64, I64, U32
from streams.registry import METRIC_INDEX, METRIC_NAMES, Index

if TYPE_CHECKING:
    from types import ModuleType

AHEAD_MS = 2_000
FAR_MS = 10 * 366 * 86_400_000
REASONS = ("", "", "unknown_device", "unknown_metric", "wrong_lane", "not_a_number", "out_of_range", "bad_time")
UNKNOWN_DEVICE, UNKNOWN_METRIC, WRONG_LANE, NOT_A_NUMBER, OUT_OF_RANGE, BAD_TIME = range(2, 8)
MOST_TABLES = 4096
FUTURE = "future"  # not a reason to drop: the time is set back
MOST_LOOKED_AT = 2000
NO_SPANS, NO_NUMBERS = np.empty((0, 2), np.int64), np.empty(0)
LOW = np.array([METRICS[name].low for name in METRIC_NAMES] + [-np.inf])  # the last is for names that are no metric
HIGH = np.array([METRICS[name].high for name in METRIC_NAMES] + [np.inf])
_NUMBERS = re.compile(rb'"(v|epoch|seq|floor|sent_at)"\s*:\s*(-?\d{1,16})(?=\s*[,}])')


class Decoded(msgspec.Struct, frozen=True):
    """What a body holds: the values that are used, in order, and what happened to the others.

    observed_at [n] Unix ms, value [n], series [n]: numbers of the registry's series. `readings` counts runs of one
    device and time among them, `dropped` the values that are not used, by reason, `clamped` those whose time was set
    back. `unknown` holds the readings of devices that this gateway does not have.
    """

    observed_at: I64
    value: F64
    series: U32
    readings: int
    dropped: dict[str, int]
    clamped: int
    unknown: tuple[Reading, ...] = ()


class _Table(msgspec.Struct, frozen=True):
    """The names of a columns body, resolved: series or minus a reason [device, metric], low and high [2, metric]."""

    series: Any
    limits: Any


class Decoder:
    """Decodes bodies under one registry. It keeps the name tables it has resolved, and nothing else."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._tables: dict[tuple[int, int, int, int, bytes], _Table] = {}
        self._names: _Names | None = None
        self._compiled: ModuleType | None = None

    def decode(self, message: wire.Message, gateway: int, lane: Lane, received_at: int) -> Decoded:
        """Decode a message of gateway number `gateway`; raises WireError(`malformed`)."""
        kernels = self._compiled or self._load()
        decode = self._columns if message.columns else self._json
        found = decode(kernels, message.body, gateway, lane, received_at)
        if found is None or found.dropped.get("unknown_device"):
            return decode_readings(wire.readings_of(message), self.index, gateway, lane, received_at)
        return found

    def _load(self) -> ModuleType:
        from streams import decode_kernels  # noqa: PLC0415  numba takes its time: only who decodes waits for it

        self._compiled = decode_kernels
        return decode_kernels

    def _columns(self, kernels: ModuleType, body: bytes, gateway: int, lane: Lane, received_at: int) -> Decoded | None:
        if len(body) < wire.BODY.size:
            return None
        n_devices, n_metrics, n, names_bytes, _, base = wire.BODY.unpack_from(body)
        start = wire.BODY.size + names_bytes
        if names_bytes % 8 or len(body) != start + 16 * n:
            return None
        key = (gateway, lane, n_devices, n_metrics, body[wire.BODY.size : start])
        table = self._tables.get(key) or self._resolve(key, body)
        stats = np.zeros(kernels.STATS, np.int64)
        observed_at, value, series = np.empty(n, np.int64), np.empty(n), np.empty(n, np.uint32)
        shape = (n, n_devices, n_metrics, base, received_at)
        bytes_ = np.frombuffer(body, np.uint8)
        device_of = self.index.series_device
        if kernels.columns(
            bytes_, start, shape, table.series, table.limits, device_of, observed_at, value, series, stats
        ):
            return None
        return _decoded(observed_at, value, series, stats.tolist())

    def _resolve(self, key: tuple[int, int, int, int, bytes], body: bytes) -> _Table:
        """Resolve a columns body's names; raises WireError(`malformed`)."""
        gateway, lane, n_devices, n_metrics, _ = key
        (devices, metrics), _ = wire.columns_of(body)
        numbers = [_device_of(self.index, name, gateway) for name in devices]
        columns = [METRIC_INDEX.get(name, -1) for name in metrics]
        series = np.empty((n_devices, n_metrics), np.int32)
        for d, device in enumerate(numbers):
            for m, metric in enumerate(columns):
                series[d, m] = _series_of(self.index, device, metric, lane)
        if len(self._tables) >= MOST_TABLES:
            self._tables.clear()
        table = self._tables[key] = _Table(series, np.stack((LOW[columns], HIGH[columns])))
        return table

    def _json(self, kernels: ModuleType, body: bytes, gateway: int, lane: Lane, received_at: int) -> Decoded | None:
        names = self._names
        if names is None:
            names = self._names = _Names(kernels, self.index)
        most = len(body) // 6 + 1  # a value takes at least `"n":0,`
        observed_at, value, series = np.empty(most, np.int64), np.empty(most), np.empty(most, np.uint32)
        arguments = (np.frombuffer(body, np.uint8), (int(lane), gateway, received_at), *names.arguments)
        outputs, stats = (observed_at, value, series), np.zeros(kernels.STATS, np.int64)
        found = kernels.json(*arguments, NO_SPANS, NO_NUMBERS, *outputs, stats)
        if found == kernels.HARD:
            spans, stats = np.empty((most, 2), np.int64), np.zeros(kernels.STATS, np.int64)
            found = kernels.json(*arguments, spans, NO_NUMBERS, *outputs, stats)
            noted = spans[: stats[kernels.HARD_NUMBERS]].tolist()
            hard = np.array([float(body[begin:end]) for begin, end in noted])
            if found or not np.isfinite(hard).all():  # JSON's numbers are finite: it is an error
                return None
            stats = np.zeros(kernels.STATS, np.int64)
            found = kernels.json(*arguments, spans, hard, *outputs, stats)
        return None if found else _decoded(observed_at, value, series, stats.tolist())


class _Names:
    """The registry's names as hash tables for the JSON parser; `guess` remembers the order metrics came in."""

    def __init__(self, kernels: ModuleType, index: Index) -> None:
        devices = _hashed(kernels, [device.wire_id for device in index.devices])
        metrics = _hashed(kernels, METRIC_NAMES)
        guess = np.zeros(64, np.int64)  # the parser's set of seen metrics is one word
        limits = np.stack((LOW, HIGH))
        self.arguments = (*devices, index.device_gateway, *metrics, guess, index.series_of, index.series_lane, limits)


def _hashed(kernels: ModuleType, names: Sequence[str]) -> tuple[Any, Any, Any]:
    """Return (names' bytes, where each begins and the last ends, slots of an open-addressing table)."""
    encoded = [name.encode() for name in names]
    ends = np.cumsum([0, *map(len, encoded)]).astype(np.int64)
    slots = np.full(1 << max(4, (2 * len(encoded)).bit_length()), -1, np.int32)
    letters = np.frombuffer(b"".join(encoded) or b"\0", np.uint8)
    kernels.hash_names(letters, ends, slots)
    return letters, ends, slots


def _decoded(observed_at: I64, value: F64, series: U32, stats: list[int]) -> Decoded:
    used, readings = stats[0], stats[1]
    dropped = {REASONS[why]: stats[why] for why in range(2, 8) if stats[why]} if any(stats[2:8]) else {}
    if used < len(value):
        observed_at, value, series = observed_at[:used], value[:used], series[:used]
    return Decoded(observed_at, value, series, readings, dropped, stats[8])


def _device_of(index: Index, name: str, gateway: int) -> int:
    """Return the number of a device of this gateway, or -1: another gateway's device is none of its own."""
    number = index.wire_index.get(name, -1)
    return number if number >= 0 and index.device_gateway[number] == gateway else -1


def _series_of(index: Index, device: int, metric: int, lane: int) -> int:
    """Return a series number, or minus the reason why there is none."""
    if device < 0:
        return -UNKNOWN_DEVICE
    series = int(index.series_of[device, metric]) if metric >= 0 else -1
    if series < 0:
        return -UNKNOWN_METRIC
    return series if int(index.series_lane[series]) == lane else -WRONG_LANE


def _reason(number: float, metric: str, observed_at: int, received_at: int) -> int:
    """Return 0 where a value of a known series is used, or why not."""
    if not wire.finite(number):
        return NOT_A_NUMBER
    known = METRICS[metric]
    if not known.low <= number <= known.high:
        return OUT_OF_RANGE
    return BAD_TIME if observed_at < 0 or abs(observed_at - received_at) > FAR_MS else 0


def decode_readings(readings: Sequence[Reading], index: Index, gateway: int, lane: Lane, received_at: int) -> Decoded:
    """Check readings a value at a time: the general path, and what the compiled ones are tested against."""
    rows: list[tuple[int, float, int]] = []
    dropped: Counter[str] = Counter()
    unknown: list[Reading] = []
    runs = clamped = 0
    last: tuple[int, int] | None = None
    number_of_lane, latest = int(lane), received_at + AHEAD_MS
    for reading in readings:
        device, at = _device_of(index, reading.device, gateway), reading.observed_at
        if device < 0:
            unknown.append(reading)
            dropped["unknown_device"] += len(reading.values)
            continue
        for metric, number in reading.values.items():
            series = _series_of(index, device, METRIC_INDEX.get(metric, -1), number_of_lane)
            why = -series if series < 0 else _reason(number, metric, at, received_at)
            if why:
                dropped[REASONS[why]] += 1
                continue
            runs += last != (device, at)
            last = (device, at)
            clamped += at > latest
            rows.append((min(at, latest), number, series))
    times, values, numbers = zip(*rows, strict=True) if rows else ((), (), ())
    arrays = np.array(times, np.int64), np.array(values, np.float64), np.array(numbers, np.uint32)
    return Decoded(*arrays, runs, dict(+dropped), clamped, tuple(unknown))


def culprit(readings: Sequence[Reading], index: Index, gateway: int, lane: Lane, received_at: int, why: str) -> str:
    """Return the first value that has this reason, for a warning: which device, metric, number and time."""
    values = (
        (one.device, one.observed_at, metric, number) for one in readings for metric, number in one.values.items()
    )
    for device, at, metric, number in islice(values, MOST_LOOKED_AT):
        found = decode_readings([Reading(device, at, {metric: number})], index, gateway, lane, received_at)
        if why in found.dropped or (why == FUTURE and found.clamped):
            return f"{device[:80]} {metric[:80]} = {number:g} at {at}"
    return f"none of the first {MOST_LOOKED_AT} values"


def salvage(payload: bytes) -> wire.Message | None:
    """Return the header of a message whose body is rubbish, with an empty body; None where it has no readable header.

    A message that can never become good must not block its lane for ever: ingest takes its number and nothing else.
    The checksum is that of everything behind the header, which is what a repeat repeats.
    """
    if payload[:1] == bytes((wire.COLUMNS_MAGIC,)):
        if len(payload) < wire.HEAD.size or payload[1] != wire.VERSION:
            return None
        header = wire.Header(*wire.HEAD.unpack_from(payload)[5:])
        rest = payload[wire.HEAD.size :]
    else:
        front, mark, rest = payload[: 4096 + wire.MAX_MESSAGE].partition(b'"readings"')
        found = {key.decode(): int(number) for key, number in _NUMBERS.findall(front[:4096])}
        if not mark or found.get("v") != wire.VERSION or not {"epoch", "seq", "floor"} <= found.keys():
            return None
        header = wire.Header(found["epoch"], found["seq"], found["floor"], found.get("sent_at", 0))
    good = 0 < header.epoch <= wire.MAX_SEQ and 0 < header.floor <= header.seq <= wire.MAX_SEQ
    if not good or abs(header.sent_at) > wire.MAX_SEQ:
        return None
    return wire.Message(header, payload[0] == wire.COLUMNS_MAGIC, b"", wire.crc32c(rest))


def warm() -> None:
    """Compile the loops into numba's cache, so that the first message of a process does not wait for it."""
    place = Place(0.0, 0.0, "0")
    device = Device("d", "hydrant", "g", place, ("pressure_mpa",))
    decoder = Decoder(Index(Registry((Gateway("g", 0, place),), (device,)), "warm"))
    readings = [Reading("d", 0, {"pressure_mpa": 0.3})]
    for columns, body in ((True, wire.columns_body(readings)), (False, wire.json_body(readings))):
        decoder.decode(wire.Message(wire.Header(1, 1, 1, 0), columns, body, 0), 0, Lane.TELEMETRY, 0)
