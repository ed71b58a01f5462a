"""The vocabulary: frozen values that parts hand to each other.

Times are Unix ms UTC; `observed_at` is the sensor's, `received_at` the platform's, and they are never mixed.
"""

from __future__ import annotations

import enum
from typing import Literal

import msgspec


class Lane(enum.IntEnum):
    """An uplink lane. Telemetry is FIFO; event overtakes it; blob (evidence, in chunks) waits for both.

    A series belongs to telemetry or event (`READING_LANES`).
    """

    TELEMETRY = 0
    EVENT = 1
    BLOB = 2

    @property
    def topic(self) -> str:
        return self.name.lower()


READING_LANES = (Lane.TELEMETRY, Lane.EVENT)
CLOUD_PREFIX = "cloud-"  # what the id of an operator's virtual gateway begins with; every other gateway is a box


class Reading(msgspec.Struct, frozen=True):
    """One device's values at one time. `values` maps metric names to numbers in their canonical units."""

    device: str
    observed_at: int
    values: dict[str, float]


class Place(msgspec.Struct, frozen=True):
    """Where something stands: degrees (CGCS2000), the code of its unit grid cell, and of the road it stands at."""

    lon: float
    lat: float
    cell: str
    address: str = ""
    road: str = ""


class Gateway(msgspec.Struct, frozen=True):
    """A gateway belongs to one shard, set when it is provisioned."""

    id: str
    shard: int
    place: Place


class Device(msgspec.Struct, frozen=True):
    """A sensor-bearing asset: the subject of alarms and cases. `metrics` go up the telemetry lane, `event_metrics` up
    the event lane.

    sensor: what the wire calls it, its id where empty. Another sensor on the same asset changes nothing else, so its
    series, alarms and history go on. mode: while `commissioning` its alarms show and become no cases. maintainer: the
    unit under contract for this very asset.
    """

    id: str
    kind: str
    gateway: str
    place: Place
    metrics: tuple[str, ...]
    event_metrics: tuple[str, ...] = ()
    zone: str = ""  # pressure zone
    building: str = ""
    name: str = ""
    tags: tuple[str, ...] = ()
    sensor: str = ""
    mode: Literal["active", "commissioning"] = "active"
    maintainer: str = ""

    @property
    def wire_id(self) -> str:
        """The name under which its readings come."""
        return self.sensor or self.id


class Cell(msgspec.Struct, frozen=True):
    """A unit grid cell (万米网格单元): its 15-digit code, and the areas it lies in by their codes."""

    code: str
    grid: str
    street: str
    workstation: str = ""
    community: str = ""


class Area(msgspec.Struct, frozen=True):
    """An area that somebody answers for: a street, block workstation, responsibility grid or residential area.

    `parent` is the code of the next larger one.
    """

    code: str
    kind: Literal["street", "workstation", "grid", "community"]
    zh: str
    en: str = ""
    parent: str = ""


class Road(msgspec.Struct, frozen=True):
    """A road with its chief (路长): of level 1 on main roads, of level 2 on the others."""

    code: str
    zh: str
    en: str = ""
    level: Literal[1, 2] = 2
    chief: str = ""


class Unit(msgspec.Struct, frozen=True):
    """A responsible unit (责任单位).

    With `street` alone it is the street's own office, which leads there. With `department` it does that unit's work:
    stationed in `street` where one is given (派驻机构), else a contractor for the assets that name it as maintainer.
    """

    code: str
    zh: str
    en: str
    street: str = ""
    department: str = ""


class Registry(msgspec.Struct, frozen=True):
    """Everything provisioned: content-addressed, named by hash in the log's control records."""

    gateways: tuple[Gateway, ...]
    devices: tuple[Device, ...]
    cells: tuple[Cell, ...] = ()
    units: tuple[Unit, ...] = ()
    areas: tuple[Area, ...] = ()
    roads: tuple[Road, ...] = ()


class Edge(enum.StrEnum):
    """What a rule instance did: its condition began to hold, or ended."""

    RAISE = "raise"
    CLEAR = "clear"


class Evidence(msgspec.Struct, frozen=True):
    """Why a transition happened, in numbers: what was measured against which limit, since when, how often."""

    metric: str
    value: float | None
    limit: float | None
    since_ms: int
    count: int = 1


class Transition(msgspec.Struct, frozen=True):
    """One step of one rule instance, as the engine writes it.

    `source` is the offset of the log record that caused it and `index` its place among that record's transitions:
    (shard, source, index) names it for ever. `at_ms` is event time.
    """

    shard: int
    source: int
    index: int
    rule: str
    subject: str
    edge: Edge
    at_ms: int
    received_at: int
    evidence: Evidence
    ruleset: str  # hash of the rule set that decided
