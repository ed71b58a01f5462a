"""The registry compiled to numbers: strings become integers here, once.

Devices are numbered by (gateway, id), series (device, metric) contiguously within a gateway: neighbours in time are
neighbours in memory (measured: worth 8 times, docs/measurements.md).
"""

from __future__ import annotations

import msgspec
import numpy as np

from citybrain.errors import ConfigError, NotFound
from citybrain.model import Device, Registry
from citybrain.units import METRICS

METRIC_NAMES: tuple[str, ...] = tuple(METRICS)
METRIC_INDEX: dict[str, int] = {name: index for index, name in enumerate(METRIC_NAMES)}


class Index:
    """A registry with numbers. All arrays are indexed by series number unless they say otherwise.

    gateways, devices: in order of their numbers. `series_of[device, metric]` is -1 where a device has no such metric.
    `series_lane` is 0 telemetry, 1 event.
    """

    def __init__(self, registry: Registry, name: str) -> None:
        self.registry = registry
        self.name = name  # the registry's content hash
        self.gateways = tuple(sorted(registry.gateways, key=lambda g: (g.shard, g.id)))
        self.gateway_index = {gateway.id: index for index, gateway in enumerate(self.gateways)}
        _check(registry, self.gateway_index)
        self.devices = tuple(sorted(registry.devices, key=lambda d: (self.gateway_index[d.gateway], d.id)))
        self.device_index = {device.id: index for index, device in enumerate(self.devices)}
        self.wire_index = {device.wire_id: index for index, device in enumerate(self.devices)}  # by what the wire says
        rows = [
            (d, METRIC_INDEX[name], lane)
            for d, device in enumerate(self.devices)
            for lane, names in enumerate((device.metrics, device.event_metrics))
            for name in names
        ]
        self.device_gateway = np.array([self.gateway_index[d.gateway] for d in self.devices], np.int32)
        self.series_device = np.array([row[0] for row in rows], np.int32)
        self.series_metric = np.array([row[1] for row in rows], np.int32)
        self.series_lane = np.array([row[2] for row in rows], np.int8)
        self.series_of = np.full((len(self.devices), len(METRIC_NAMES)), -1, np.int32)
        self.series_of[self.series_device, self.series_metric] = np.arange(len(rows), dtype=np.int32)

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
        return msgspec.json.decode(content, type=Registry)
    except msgspec.DecodeError as error:
        raise ConfigError("registry", str(error)) from None
