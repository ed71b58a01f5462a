"""`gateway.yaml`: who the gateway is, where its broker stands, and what hangs on its lines. Strict (docs/gateway.md).

Every driver's section is checked by the driver's own `Config`, whose module is only imported where it is named.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import os
import re
from pathlib import Path
from typing import Any

import msgspec

from citybrain.config import Duration, Lines, convert, parse_yaml, read_bytes, text_of
from citybrain.errors import ConfigError
from edge.drivers import DRIVERS
from edge.host import Configured
from edge.limits import Limit
from edge.report import Report

FILE = "gateway.yaml"
LEAST_SPOOL_MB = 8
LEAST_AGE_MS = 3_600_000  # an age of seconds would throw away what only waits for its acknowledgement
MOST_DEVICE = 128
ANY_DRIVER = ("driver", "report", "limits")  # what any driver may be told; the rest is its own
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Tls(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The files of mutual TLS (PEM), relative to the data folder."""

    ca: str
    certificate: str
    key: str

    def under(self, folder: Path) -> Tls:
        """Return the same with paths below `folder`, unless they are absolute."""
        return Tls(str(folder / self.ca), str(folder / self.certificate), str(folder / self.key))


class BrokerPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the broker is. Without `tls` only loopback is allowed."""

    host: str
    port: int = 8883
    tls: Tls | None = None


class SpoolPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much may wait for the platform, how long, and how often telemetry is synced (events are at once)."""

    limit_mb: int = 512
    age: Duration = Duration(30 * 86_400_000)
    commit_every: Duration = Duration(10_000)


class GatewayConfig(msgspec.Struct, frozen=True):
    """The whole file. sha256: of its bytes, in hex; "" of a text that is in no file."""

    gateway: str
    shard: int
    broker: BrokerPart
    spool: SpoolPart = SpoolPart()
    drivers: tuple[Configured, ...] = ()
    sha256: str = ""


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    gateway: str
    shard: int
    broker: BrokerPart
    spool: SpoolPart = SpoolPart()
    drivers: dict[str, dict[str, Any]] = {}


def read_config(path: Path) -> GatewayConfig:
    """Read and check the file; raises ConfigError with file, line and field."""
    if not path.exists():
        raise ConfigError(str(path), "there is none: `citybrain gateway enrol` writes it")
    content = read_bytes(path)
    config = parse_config(text_of(content, str(path)), str(path))
    return msgspec.structs.replace(config, sha256=hashlib.sha256(content).hexdigest())


def parse_config(text: str, file: str = FILE) -> GatewayConfig:
    """Check a configuration's text; raises ConfigError with line and field."""
    value, lines = parse_yaml(text, file)
    raw = convert(value, _File, lines)
    _check(raw, lines)
    drivers = tuple(_driver(name, section, lines) for name, section in raw.drivers.items())
    _one_owner(raw.gateway, drivers, lines)
    _one_user(drivers, lines)
    return GatewayConfig(raw.gateway, raw.shard, raw.broker, raw.spool, drivers)


def _check(raw: _File, lines: Lines) -> None:
    if not _NAME.fullmatch(raw.gateway):
        raise ConfigError(lines.where("gateway"), f"{raw.gateway[:80]!r}: want letters, digits, and . _ - inside")
    if raw.shard < 0:
        raise ConfigError(lines.where("shard"), f"expected 0 or more, got {raw.shard}")
    if not 0 < raw.broker.port < 65_536:
        raise ConfigError(lines.where("broker.port"), f"expected 1 to 65535, got {raw.broker.port}")
    if not raw.broker.host.strip():
        raise ConfigError(lines.where("broker.host"), "expected the broker's name or address, got nothing")
    if raw.broker.tls is None and not loopback(raw.broker.host):
        raise ConfigError(lines.where("broker"), f"{raw.broker.host!r} is not this machine: `tls` must be given")
    if raw.spool.limit_mb < LEAST_SPOOL_MB:
        raise ConfigError(lines.where("spool.limit_mb"), f"expected {LEAST_SPOOL_MB} or more, got {raw.spool.limit_mb}")
    if raw.spool.age < LEAST_AGE_MS:
        raise ConfigError(lines.where("spool.age"), "expected 1h or more")
    if not 0 < raw.spool.commit_every <= 60_000:
        raise ConfigError(lines.where("spool.commit_every"), "expected more than 0 and at most 1min")
    for name in raw.drivers:
        if not _NAME.fullmatch(name):
            raise ConfigError(lines.where(f"drivers.{name}"), "a driver's name: want letters, digits, and . _ - inside")


def loopback(host: str) -> bool:
    """Return whether `host` names this machine."""
    return host in ("localhost", "::1") or host.startswith("127.")


def _driver(name: str, section: dict[str, Any], lines: Lines) -> Configured:
    path = f"drivers.{name}"
    kind = section.get("driver")
    if not isinstance(kind, str) or kind not in DRIVERS:
        raise ConfigError(lines.where(f"{path}.driver"), _unknown(kind))
    own = {key: value for key, value in section.items() if key not in ANY_DRIVER}
    config = convert(own, _module(kind, lines.where(f"{path}.driver")).Config, lines, path)
    report = convert(section["report"], Report, lines, f"{path}.report") if "report" in section else None
    limits = convert(section.get("limits", []), tuple[Limit, ...], lines, f"{path}.limits")
    return Configured(name, kind, config, report, limits)


def _unknown(kind: object) -> str:
    if kind is None:
        return f"missing: which driver it is, one of {', '.join(DRIVERS)}"
    close = difflib.get_close_matches(str(kind), list(DRIVERS), 1)
    meant = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(DRIVERS)}"
    return f"no driver {str(kind)[:80]!r}; {meant}"


def _module(kind: str, where: str) -> Any:
    try:
        return importlib.import_module(DRIVERS[kind])
    except ImportError as error:
        raise ConfigError(where, f"driver {kind!r} cannot be loaded here: {error}") from None


def _one_owner(gateway: str, drivers: tuple[Configured, ...], lines: Lines) -> None:
    """Refuse a device that two drivers speak for, or the box itself: its readings would contradict each other."""
    owner = {gateway: "the gateway itself"}
    for one in drivers:
        for device in one.config.devices():  # type: ignore[attr-defined]
            where = lines.where(f"drivers.{one.name}")
            if not device.strip() or len(device) > MOST_DEVICE or not device.isprintable():
                raise ConfigError(
                    where, f"device {device[:80]!r}: want a name of 1 to {MOST_DEVICE} visible characters"
                )
            if device in owner:
                raise ConfigError(where, f"device {device!r} belongs to {owner[device]} already")
            owner[device] = repr(one.name)


def _one_user(drivers: tuple[Configured, ...], lines: Lines) -> None:
    """Refuse a port that is no path, or that two drivers would open, under whatever names it has now."""
    user: dict[str | int, str] = {}
    for one in drivers:
        port, listen = getattr(one.config, "port", None), getattr(one.config, "listen", None)
        if isinstance(port, str) and port and not port.startswith("/"):
            want = "want its path, such as /dev/serial/by-id/…, which stays the same whichever socket it is in"
            raise ConfigError(lines.where(f"drivers.{one.name}.port"), f"{port!r}: {want}")
        named = {"port": os.path.realpath(port) if isinstance(port, str) and port else None, "listen": listen}
        for field, place in named.items():
            if place in user:
                what = f"{place} belongs to driver {user[place]!r} already: one driver a port"
                raise ConfigError(lines.where(f"drivers.{one.name}.{field}"), what)
            if place is not None:
                user[place] = one.name
