"""The registry compiled to numbers: strings become integers here, once.

Devices are numbered by (gateway, id), series (device, metric) contiguously within a gateway: neighbours in time are
neighbours in memory (measured: worth 8 times, docs/measurements.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from citybrain.errors import ConfigError, NotFound
from citybrain.model import Cell, Device, Registry
from citybrain.units import METRICS

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
METRIC_NAMES: tuple[str, ...] = tuple(METRICS)
METRIC_INDEX: dict[str, int] = {name: index for index, name in enumerate(METRIC_NAMES)}


# What a device can be selected by; `tag` is among its tags, the areas are those of its cell.
FIELDS: dict[str, Callable[[Device, dict[str, Cell]], object]] = {
    "kind": lambda device, _: device.kind,
    "tag": lambda device, _: device.tags,
    "zone": lambda device, _: device.zone,
    "building": lambda device, _: device.building,
    "device": lambda device, _: device.id,
    "gateway": lambda device, _: device.gateway,
    "grid": lambda device, cells: cells[device.place.cell].grid if device.place.cell in cells else "",
    "street": lambda device, cells: cells[device.place.cell].street if device.place.cell in cells else "",
}
SHARED = ("kind", "gateway", "metrics", "event_metrics", "zone", "building", "tags", "maintainer")
AREAS = ("grid", "zone", "building", "street", "gateway")  # of an override's subject `grid:CODE`


class Index:
    """A registry with numbers. All arrays are indexed by series number unless they say otherwise.

    gateways, devices: in order of their numbers. `series_of[device, metric]` is -1 where a device has no such metric.
    `series_lane` is 0 telemetry, 1 event. By device: `device_gateway`, `is_gateway` (it is one itself),
    `telemetry_series` (how many it has).
    """

    def __init__(self, registry: Registry, name: str) -> None:
        self.registry = registry
        self.name = name  # the registry's content hash
        self.gateways = tuple(sorted(registry.gateways, key=lambda g: (g.shard, g.id)))
        self.gateway_index = {gateway.id: index for index, gateway in enumerate(self.gateways)}
        _check(registry, self.gateway_index)
        number = self.gateway_index
        self.devices = tuple(sorted(registry.devices, key=lambda d: (number[d.gateway], d.id)))
        self.device_index = {device.id: index for index, device in enumerate(self.devices)}
        count = len(self.devices)
        self.device_gateway = np.fromiter((number[d.gateway] for d in self.devices), np.int32, count)
        self.is_gateway = np.fromiter((d.id in number for d in self.devices), np.bool_, count)
        self.telemetry_series = np.fromiter((len(d.metrics) for d in self.devices), np.int16, count)
        event_series = np.fromiter((len(d.event_metrics) for d in self.devices), np.int16, count)
        each = self.telemetry_series + event_series
        self.series_device = np.repeat(np.arange(count, dtype=np.int32), each)
        metrics = (METRIC_INDEX[name] for d in self.devices for names in (d.metrics, d.event_metrics) for name in names)
        self.series_metric = np.fromiter(metrics, np.int16, len(self.series_device))
        place = np.arange(len(self.series_device)) - np.repeat(np.cumsum(each) - each, each)
        self.series_lane = (place >= self.telemetry_series[self.series_device]).astype(np.int8)
        self._areas: dict[str, I64] = {}  # devices by subject of an override
        self._labels: dict[str, tuple[I32, dict[Any, int]]] = {}

    @cached_property
    def wire_index(self) -> dict[str, int]:
        """Device number by what the wire calls it."""
        return {device.wire_id: index for index, device in enumerate(self.devices)}

    @cached_property
    def series_of(self) -> I32:
        """Series number by [device, metric]."""
        found = np.full((len(self.devices), len(METRIC_NAMES)), -1, np.int32)
        found[self.series_device, self.series_metric] = np.arange(self.n_series, dtype=np.int32)
        return found

    def series_having(self, metric: str) -> I32:
        """Return, by device, the number of its series of a metric, -1 where it has none."""
        found = np.full(len(self.devices), -1, np.int32)
        series = np.flatnonzero(self.series_metric == METRIC_INDEX[metric])
        found[self.series_device[series]] = series
        return found

    def series_of_gateway(self, number: int) -> slice:
        """Return which series are a gateway's; they stand together."""
        devices = np.searchsorted(self.device_gateway, [number, number + 1])
        low, high = np.searchsorted(self.series_device, devices)
        return slice(int(low), int(high))

    def having(self, field: str, wanted: str) -> Mask:
        """Return, by device, whether its field (one of FIELDS) has this value."""
        if field == "device":
            mask = np.zeros(len(self.devices), np.bool_)
            mask[[self.device_index[wanted]] if wanted in self.device_index else []] = True
            return mask
        codes, names = self.label(field)
        if field == "tag":
            return np.isin(codes, [code for tags, code in names.items() if wanted in tags])
        return np.asarray(codes == names.get(wanted, -1))

    def under(self, subject: str) -> I64:
        """Return the devices, ascending, that an override's subject means: one by its id, or those of an area."""
        if subject in self.device_index:
            return np.array([self.device_index[subject]], np.int64)
        if subject not in self._areas:
            field, _, code = subject.partition(":")
            known = field in AREAS and code
            self._areas[subject] = np.flatnonzero(self.having(field, code)) if known else np.zeros(0, np.int64)
        return self._areas[subject]

    def label(self, field: str) -> tuple[I32, dict[Any, int]]:
        """Return the field's values as numbers by device, and which value has which number."""
        if field not in self._labels:
            cells = {cell.code: cell for cell in self.registry.cells}
            value, names = FIELDS[field], dict[Any, int]()
            codes = (names.setdefault(value(device, cells), len(names)) for device in self.devices)
            self._labels[field] = np.fromiter(codes, np.int32, len(self.devices)), names
        return self._labels[field]

    @property
    def n_series(self) -> int:
        return len(self.series_device)

    def series(self, device: str, metric: str) -> int:
        """Return the number of a series; raises NotFound."""
        index = self.device_index.get(device)
        number = -1 if index is None or metric not in METRIC_INDEX else int(self.series_of[index, METRIC_INDEX[metric]])
        if number < 0:
            raise NotFound(f"series ({device}, {metric}): not in the registry")
        return number

    def device(self, name: str) -> Device:
        """Return a device by id; raises NotFound."""
        try:
            return self.devices[self.device_index[name]]
        except KeyError:
            raise NotFound(f"device {name!r}: not in the registry") from None


def _check(registry: Registry, gateways: dict[str, int]) -> None:
    seen: set[str] = set()
    sensors: dict[str, str] = {}
    for device in registry.devices:
        where = f"registry device {device.id!r}"
        if device.id in seen or (device.id in gateways and device.kind != "gateway"):
            raise ConfigError(where, "this id is given twice")
        seen.add(device.id)
        if device.wire_id in sensors:
            raise ConfigError(where, f"its sensor {device.wire_id!r} is that of {sensors[device.wire_id]!r} too")
        sensors[device.wire_id] = device.id
        if device.gateway not in gateways:
            raise ConfigError(where, f"its gateway {device.gateway!r} is not in the registry")
        both = set(device.metrics) & set(device.event_metrics)
        if both:
            raise ConfigError(where, f"a series belongs to one lane: {sorted(both)} stand in both")
        for name in (*device.metrics, *device.event_metrics):
            if name not in METRIC_INDEX:
                raise ConfigError(where, f"unknown metric {name!r}")


def encode_registry(registry: Registry) -> bytes:
    """Return the registry's canonical bytes; their SHA-256 is its name."""
    return msgspec.json.encode(registry, order="deterministic")


def decode_registry(content: bytes) -> Registry:
    """Return a registry from its canonical bytes; raises ConfigError."""
    try:
        registry = msgspec.json.decode(content, type=Registry)
    except msgspec.DecodeError as error:
        raise ConfigError("registry", str(error)) from None
    _share(registry.devices)
    return registry


def _share(devices: Iterable[Device]) -> None:
    """Let equal texts and lists of metrics of a city's devices be one object each: they are a third of its memory."""
    known: dict[Any, Any] = {}
    one, put = known.setdefault, msgspec.structs.force_setattr
    for device in devices:
        for field in SHARED:
            value = getattr(device, field)
            put(device, field, one(value, value))
