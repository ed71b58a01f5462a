"""The boxes as the centre knows them: heard or not, what runs on them, until when they may speak, where they stand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal

import msgspec
from sqlalchemy import Connection, select

from api.assets.coordinates import distance_m
from api.assets.store import version_of
from api.health import LIMITS, Ending, Late, Limits, Misplaced
from api.problem import Problem
from api.processes import role_of
from api.readings import Latest, Seen, Value
from citybrain.clock import DAY_MS, Clock
from citybrain.counters import Counters, Heartbeat
from citybrain.db.schema import assets, timeline
from citybrain.errors import CityBrainError
from citybrain.model import Gateway, Place
from streams.ingest import GatewayStatus

if TYPE_CHECKING:
    from api.pki.ca import Authority
    from api.pki.journal import Issued

Want = Literal["offline", "certificate", "drivers", "clock", "backlog", "place"]
PLACE_M = 100.0  # [U] our choice: the far side of a crossing; a receiver between houses is off by less


class Commissioned(msgspec.Struct, frozen=True):
    """A box's last commissioning: when (Unix ms), by whom, its sheet's hash, and where that says it stands (WGS-84).

    accuracy_m: how far the position may be off, as the sheet says; 0 where it says nothing.
    """

    at: int
    technician: str
    sheet: str
    lon: float
    lat: float
    accuracy_m: float = 0.0

    def away_m(self, place: Place) -> float | None:
        """Return how far that is from a place, None where the ledger holds none (0, 0).

        The ledger holds CGCS2000, which agrees with WGS-84 within a metre (api.assets.coordinates).
        """
        if place.lon == place.lat == 0.0:
            return None
        return distance_m((self.lon, self.lat), (place.lon, place.lat))

    def misplaced(self, place: Place) -> bool:
        """Return whether that is farther from a place than `PLACE_M` and the position's own uncertainty."""
        away_m = self.away_m(place)
        return away_m is not None and away_m > PLACE_M + self.accuracy_m


class Box(msgspec.Struct, frozen=True):
    """All that is known of one. values: its own latest readings. certificate_ends: Unix ms, real time."""

    gateway: Gateway
    online: bool
    seen: Seen
    status: GatewayStatus | None = None
    values: Mapping[str, Value] = {}
    certificate_ends: int | None = None
    commissioned: Commissioned | None = None

    @property
    def since(self) -> int | None:
        """Since when (Unix ms) it is online, or when it was last heard; None where nobody knows."""
        if not self.online:
            return self.seen.received_at
        return (self.status.since or None) if self.status is not None and self.status.online else None

    @property
    def spooled(self) -> int | None:
        """How many messages its spool held when it last said so, None where it never did."""
        found = self.value("spooled")
        return None if found is None else int(found)

    def value(self, metric: str) -> float | None:
        """Return what it last said of itself."""
        found = self.values.get(metric)
        return None if found is None else found.value


def wants(box: Box, now_ms: int, limits: Limits = LIMITS) -> list[Want]:
    """Return why somebody should care for a box, nothing where nobody has to. now_ms: real time."""
    left_ms = None if box.certificate_ends is None else box.certificate_ends - now_ms
    clock_s, quality = box.value("clock_offset_s") or 0.0, box.value("quality") or 0.0
    found: dict[Want, bool] = {
        "offline": not box.online,
        "certificate": left_ms is not None and left_ms < limits.certificate_days * DAY_MS,
        "drivers": box.status is not None and bool(box.status.about.failing),
        "clock": abs(clock_s) > limits.clock_s or quality != 0.0,  # a box's own quality only says CLOCK_UNSET
        "backlog": box.online and (box.spooled or 0) > limits.backlog,
        "place": box.commissioned is not None and box.commissioned.misplaced(box.gateway.place),
    }
    return [why for why, holds in found.items() if holds]


class Fleet:
    """Looks at all boxes of a site. Sheets are read again when the ledger's version has changed, else remembered."""

    def __init__(
        self,
        latest: Latest,
        clock: Clock,
        counters: Counters,
        database: Callable[[], AbstractContextManager[Connection]],
        authority: Callable[[], Authority | None],
    ) -> None:
        self._latest = latest
        self._clock = clock
        self._counters = counters
        self._database = database
        self._authority = authority
        self._sheets: tuple[int, dict[str, Commissioned]] = (0, {})

    def boxes(self, beats: Mapping[str, Heartbeat]) -> list[Box]:
        """Return the gateways of the registry in force, in the order of their ids."""
        latest, sheets = self._latest, self.sheets()
        statuses, issued, now_ms = statuses_of(beats), self._issued(), self._clock.now_ms()
        found = []
        for gateway in sorted(latest.registry.gateways, key=lambda one: one.id):
            own, seen = latest.find(gateway.id), latest.seen(gateway.id)
            values = latest.values(own) if own is not None else {}
            online = now_ms - newest_of(seen) <= LIMITS.gateway_silent_ms
            ends = certificate_ends(values.get("certificate_days"), issued.get(gateway.id))
            status, sheet = statuses.get(gateway.id), sheets.get(gateway.id)
            found.append(Box(gateway, online, seen, status, values, ends, sheet))
        return found

    def endings(self, now_ms: int) -> list[Ending]:
        """Return what of the authority ends when; nothing where there is none. now_ms: real time."""
        authority = self._authority()
        if authority is None:
            return []
        from api.pki.endings import endings  # noqa: PLC0415  few runs have one

        try:
            return endings(authority, now_ms)
        except CityBrainError as error:
            self._unreadable(error)
            return []

    def sheets(self) -> dict[str, Commissioned]:
        """Return the last commissioning of each gateway; nothing while there is no database."""
        try:
            with self._database() as db:
                version = version_of(db)
                if version != self._sheets[0]:
                    self._sheets = version, read_sheets(db)
        except Problem:
            return {}
        return self._sheets[1]

    def _issued(self) -> Mapping[str, Issued]:
        authority = self._authority()
        try:
            return authority.book().latest("gateway") if authority is not None else {}
        except CityBrainError as error:
            self._unreadable(error)
            return {}

    def _unreadable(self, error: CityBrainError) -> None:
        """Say that the authority cannot be read; whoever asks how the run does is answered without it."""
        self._counters.add("errors_total", stage="boxes")
        self._counters.warn(f"certificate authority: {error}")


_SHEETS = (
    select(assets.c.code, timeline.c.at, timeline.c.actor, timeline.c.details)
    .join(assets, assets.c.id == timeline.c.entity_id)
    .where(timeline.c.entity == "asset", assets.c.kind == "gateway", timeline.c.details.contains('"sheet"'))
    .order_by(timeline.c.id)
)


class _Details(msgspec.Struct):
    sheet: str
    lon: float
    lat: float
    accuracy_m: float = 0.0


def read_sheets(connection: Connection) -> dict[str, Commissioned]:
    """Return the last commissioning of each gateway that the ledger's history tells of."""
    told = ((row.code, _sheet(row.at, row.actor, row.details)) for row in connection.execute(_SHEETS))
    return {code: sheet for code, sheet in told if sheet is not None}


def _sheet(at: int, actor: str, details: str) -> Commissioned | None:
    try:
        said = msgspec.json.decode(details, type=_Details)
    except msgspec.DecodeError:  # of another step
        return None
    return Commissioned(at, actor, said.sheet, said.lon, said.lat, said.accuracy_m)


def newest_of(seen: Seen) -> int:
    """Return when a gateway was last heard (Unix ms, platform time), 0 where it never was."""
    return max(seen.received_at or 0, seen.observed_at or 0)


def late_of(boxes: Iterable[Box], now_ms: int) -> list[Late]:
    """Return the boxes that are not heard, the longest silent first. now_ms: platform time."""
    silent = ((box, newest_of(box.seen)) for box in boxes if not box.online)
    found = [
        Late(box.gateway.id, round((now_ms - newest) / 1000, 1) if newest else None, box.spooled)
        for box, newest in silent
    ]
    return sorted(found, key=lambda late: (late.late_s is not None, -(late.late_s or 0.0), late.id))


def statuses_of(beats: Mapping[str, Heartbeat]) -> dict[str, GatewayStatus]:
    """Return what gateways last said of themselves, as the ingests' heartbeats have it; the newer heartbeat counts."""
    found: dict[str, GatewayStatus] = {}
    for beat in sorted(beats.values(), key=lambda one: one.at):
        if role_of(beat.process) == "ingest":
            try:
                found |= msgspec.convert(beat.details.get("gateways", {}), dict[str, GatewayStatus])
            except msgspec.ValidationError:  # an ingest of another release, in a run that is being updated
                continue
    return found


def certificate_ends(said: Value | None, issued: Issued | None) -> int | None:
    """Return until when a box's certificate holds (Unix ms), None where it has none, or its last one is revoked.

    What the box says counts, as only it knows which one it shows, unless a newer one has been signed since it spoke.
    """
    if issued is not None and issued.revoked_ms is not None:
        return None
    if said is not None and (issued is None or said.at >= issued.from_ms):
        return said.at + int(said.value * DAY_MS)
    return issued.until_ms if issued is not None else None


def endings_of(boxes: Iterable[Box], now_ms: int) -> list[Ending]:
    """Return when the boxes' certificates end. now_ms: real time."""
    known = ((box.gateway.id, box.certificate_ends) for box in boxes)
    return [Ending("gateway", id, (ends - now_ms) / 1000) for id, ends in known if ends is not None]


def misplaced_of(boxes: Iterable[Box]) -> list[Misplaced]:
    """Return the boxes whose sheet contradicts the ledger."""
    found = []
    for box in boxes:
        place, sheet = box.gateway.place, box.commissioned
        if sheet is not None and sheet.misplaced(place):
            found.append(Misplaced(box.gateway.id, round(sheet.away_m(place) or 0.0, 1)))
    return found
