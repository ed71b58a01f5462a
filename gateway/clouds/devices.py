"""Which devices speak through an operator's cloud: read from the registry in force, and again whenever that changes."""

from __future__ import annotations

import msgspec

from citybrain.counters import Counters
from citybrain.errors import Damaged, NotFound
from citybrain.layout import Layout
from citybrain.model import CLOUD_PREFIX, Gateway, Registry
from citybrain.wire import crc32c


class Devices:
    """The virtual gateways and the devices of one registry. `name` is its content hash, "" before there is one."""

    def __init__(self, name: str = "", registry: Registry | None = None) -> None:
        self.name = name
        found = () if registry is None else registry.gateways
        self.gateways: dict[str, Gateway] = {
            g.id: g for g in sorted(found, key=_by_id) if g.id.startswith(CLOUD_PREFIX)
        }
        devices = () if registry is None else registry.devices
        self._gateway_of = {device.wire_id: device.gateway for device in devices}

    def of(self, prefix: str) -> list[str]:
        """Return the ids of the gateways that begin so."""
        return [gateway for gateway in self.gateways if gateway.startswith(prefix)]

    def route(self, own: list[str], device: str) -> str | None:
        """Return the gateway that carries a device's readings: one of `own`, or None where it belongs to another.

        A device that nobody knows goes up by any of them, always the same, and into quarantine behind it.
        """
        gateway = self._gateway_of.get(device)
        if gateway is None:
            return own[crc32c(device.encode()) % len(own)]
        return gateway if gateway in own else None


def _by_id(gateway: Gateway) -> str:
    return gateway.id


class Watch:
    """Follows `run/active.json`."""

    def __init__(self, layout: Layout, counters: Counters) -> None:
        self._layout = layout
        self._counters = counters
        self._stamp = (0, 0)
        self.devices = Devices()

    def changed(self) -> bool:
        """Read the registry if another one is in force; what cannot be read is said, and the old one stays."""
        path = self._layout.run / "active.json"
        try:
            status = path.stat()
        except FileNotFoundError:
            return False
        stamp = (status.st_ino, status.st_mtime_ns)
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        try:
            active = self._layout.read_active()
            if active is None or active.registry in ("", self.devices.name):
                return False
            content = self._layout.get_blob(active.registry)
            self.devices = Devices(active.registry, msgspec.json.decode(content, type=Registry))
        except (msgspec.DecodeError, NotFound, Damaged) as error:
            self._counters.add("errors_total", stage="registry")
            self._counters.warn(f"{path}: {error}; the registry read before stays in force here")
            return False
        return True
