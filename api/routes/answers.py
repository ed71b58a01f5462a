"""What the API answers: the shapes of its JSON. Times are Unix ms UTC (platform time), `None` where not yet."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from pydantic import BaseModel, Field

T = TypeVar("T")


class Text(BaseModel):
    """A text in both languages."""

    zh: str
    en: str


class Named(Text):
    """Something with a code and a name."""

    code: str


class Refusal(BaseModel):
    """RFC 9457 problem details (`application/problem+json`): `error` is a code, `where` the part of the request."""

    type: str = Field(examples=["urn:citybrain:problem:not_found"])
    title: str
    status: int
    detail: str
    error: str = Field(examples=["not_found"])
    where: str = Field(examples=["case 2026-000123"])
    what: str = Field(description="what is wrong and what to do; the same as `detail`")


class Page(BaseModel, Generic[T]):
    """A part of a list. Ask again with `cursor=next_cursor` for what follows; it is null on the last page."""

    items: list[T]
    next_cursor: str | None = Field(description="opaque; null on the last page")


class Place(BaseModel):
    """Where something stands."""

    lon: float = Field(description="degrees, CGCS2000")
    lat: float = Field(description="degrees, CGCS2000")
    cell: str = Field(description="15-digit code of the unit grid cell")
    address: str


class CasePlace(Place):
    """Where a case is, and whose area that is."""

    grid: str = Field(description="responsibility grid")
    street: str = Field(description="street digits")
    workstation: str = Field(default="", description="block workstation; empty where the district has none")
    community: str = Field(default="", description="residential area")
    road: str = Field(default="", description="code of the road")
    road_chief: str = Field(default="", description="who answers for the road (路长)")


class Latest(BaseModel):
    """The latest value of one series."""

    value: float = Field(description="in `unit`")
    unit: str
    at: int = Field(description="Unix ms; the sensor's time, at most 2 s ahead of its arrival")
    name: Text


class Device(BaseModel):
    """A device and its latest values, by metric."""

    id: str
    kind: str
    gateway: str
    zone: str
    building: str
    name: str
    tags: list[str]
    sensor: str = Field(default="", description="its name on the wire")
    mode: str = Field(default="active", description="active | commissioning: its alarms open no case")
    place: Place
    values: dict[str, Latest]


class Commissioned(BaseModel):
    """A gateway's last commissioning sheet."""

    at: int = Field(description="Unix ms")
    technician: str
    sheet: str = Field(description="SHA-256 of the signed sheet")
    lon: float = Field(description="where the technician stood, degrees, WGS-84")
    lat: float = Field(description="degrees, WGS-84")
    accuracy_m: float = Field(description="how far that may be off; 0 where the sheet does not say")
    distance_m: float | None = Field(description="from where the ledger has the gateway; null where it has no place")


class Gateway(BaseModel):
    """A gateway: online when a message of its came in the last 90 s of platform time."""

    id: str
    shard: int
    place: Place
    devices: int
    online: bool
    since: int | None = Field(description="since when it is online, else when it was last heard, Unix ms")
    received_at: int | None = Field(description="arrival of its last message, Unix ms")
    observed_at: int | None = Field(description="time of its newest value, Unix ms")
    version: str = Field(description="of its software; empty where it does not say")
    config: str = Field(description="SHA-256 of the gateway.yaml in force; empty where it does not say")
    failing: dict[str, str] = Field(description="drivers that do not work, with why")
    spooled: int | None = Field(description="messages in its spool, as it last said")
    clock_offset_s: float | None = Field(description="its clock minus its system's, as it last said")
    certificate_ends_at: int | None = Field(description="Unix ms, real time; null where it has none that is valid")
    certificate_days: float | None = Field(description="until then; below 0 afterwards")
    commissioned: Commissioned | None = Field(description="its last commissioning; null where there was none")
    wants: list[Named] = Field(
        description="why somebody should care for it: offline, certificate, drivers, clock, backlog, place"
    )


class Evidence(BaseModel):
    """What was measured against which limit, since when (Unix ms), how often."""

    metric: str
    value: float | None
    limit: float | None
    since_ms: int
    count: int


class Picture(BaseModel):
    """A picture that an alarm rests on."""

    at: int = Field(description="time of the reading that names it")
    name: str = Field(description="its SHA-256, the first 13 digits of it while nothing of it has arrived")
    complete: bool = Field(description="all of it is here: `/v1/evidence/{name}` shows it")
    unmasked: bool = Field(description="persons may be recognised in it: it is shown for a reason only")


class Pictures(BaseModel):
    """The pictures that an alarm rests on, the latest first."""

    items: list[Picture]


class Alarm(BaseModel):
    """An alarm: one rule's condition on one device."""

    id: int
    rule: str
    ruleset: str = Field(description="hash of the rule set that decided")
    title: Text
    subject: str = Field(description="device id")
    name: str = Field(description="the device's name")
    address: str
    state: str = Field(description="state of the ISA-18.2 life cycle")
    open: bool
    active: bool = Field(description="whether the condition holds now")
    urgency: str = Field(description="life | urgent | normal | watch")
    raised_at: int = Field(description="event time")
    received_at: int
    opened_at: int
    last_at: int
    cleared_at: int | None
    acknowledged_at: int | None
    acknowledged_by: str | None
    count: int = Field(description="how often it was raised while open")
    incident: int | None
    why: str = Field(description="reason code of its membership in the incident")
    why_text: Text
    evidence: Evidence
    explanation: Text


class TimelineEntry(BaseModel):
    """One step of a life cycle: who did what, when, why."""

    at: int
    event: str
    before: str
    after: str
    reason: str
    actor: str
    details: Any


class Incident(BaseModel):
    """Alarms that share a cause."""

    id: int
    state: str
    open: bool
    kind: str = Field(description="what it can become: case | maintenance")
    cause: str
    by: str = Field(description="what its members share: device | zone | building | gateway")
    key: str = Field(description="the shared device, zone, building or gateway")
    title: Text = Field(description="of its first alarm's rule")
    urgency: str
    members: int
    cases: list[str] = Field(description="numbers of its cases, rescues and maintenance orders")
    opened_at: int
    last_at: int
    due_at: int | None = Field(description="when the confirmation policy looks again")
    confirmed_at: int | None
    confirmed_by: str | None
    reason: str


class IncidentDetail(Incident):
    """An incident with its members, each saying why it belongs."""

    alarms: list[Alarm]
    timeline: list[TimelineEntry]


class Case(BaseModel):
    """A work order (`case`), a rescue of one car's passengers (`rescue`) or a device's care (`maintenance`)."""

    number: str
    kind: str
    incident: int
    alarm: int = Field(description="the alarm that leads")
    subject: str
    category: str
    edition: str
    code: str = Field(description="class code in `edition`, empty where it has none")
    title: Text
    urgency: str
    place: CasePlace
    unit: Named = Field(description="handling unit")
    area_owner: Named
    stage: str
    owner_system: str = Field(description="native | external: only the owner moves stages")
    external_id: str | None
    observed_at: int
    opened_at: int
    deadline: int
    rescued_at: int | None = Field(description="when the passengers were out")
    closed_at: int | None
    open: bool
    verdict: str | None = Field(description="confirmed | false_alarm | duplicate")
    verdict_reason: str | None


class Delivery(BaseModel):
    """One webhook of a case on its way to the grid platform."""

    id: str = Field(description="the webhook-id")
    type: str
    state: str = Field(description="pending | delivered | dead")
    attempts: int
    created_at: int
    next_at: int = Field(description="real time of the next attempt, Unix ms")
    delivered_at: int | None
    last_error: str | None


class CaseDetail(Case):
    """A case with all that is known of it."""

    evidence: Any = Field(description="its members with reasons, as they were when it was opened")
    alarms: list[Alarm]
    timeline: list[TimelineEntry]
    deliveries: list[Delivery]


class Order(Case):
    """A maintenance order."""

    gateway: str = Field(description="of the device, its own id for a gateway; empty where the device is gone")
    overdue: bool


class Round(BaseModel):
    """Orders that stand close together: of one gateway in one street. The one that is due first comes first."""

    street: str
    gateway: str
    overdue: int
    orders: list[Order]


class Contractor(BaseModel):
    """The orders of one unit."""

    unit: Named
    orders: int
    overdue: int
    rounds: list[Round]


class Maintenance(BaseModel):
    """Maintenance orders by contractor and round."""

    contractors: list[Contractor]
    total: int
    left_off: int = Field(description="how many there are beyond `limit`; those that are due later")


class Accepted(BaseModel):
    """A command that is stored; ask `/v1/commands/{command}` what became of it."""

    command: str
    state: str = "pending"


class CommandState(BaseModel):
    """What became of a command: pending | applied | refused."""

    command: str
    state: str
    kind: str | None = None
    actor: str | None = None
    at: int | None = None
    applied_at: int | None = None
    message: str = ""
    reason: str = ""


class Process(BaseModel):
    """One process, by its last heartbeat."""

    role: str = Field(description="what it does; of several with one role each has a part of the shards")
    pid: int
    live: bool
    ready: bool
    standby: bool = Field(description="a desk that waits for the one that works to fall silent")
    age_s: float
    started: int = Field(description="real time, Unix ms")
    restarts: int = Field(description="how often it had to be started again")
    warnings: list[str]


class LateGateway(BaseModel):
    """A gateway of which nothing was heard for 90 s of platform time."""

    id: str
    late_s: float | None = Field(description="platform seconds since it was heard; null: never")
    spooled: int | None = Field(description="messages that waited in its spool when it last said so")


class Gateways(BaseModel):
    """How many gateways are heard."""

    online: int
    total: int
    offline: list[str]
    late: list[LateGateway] = Field(description="those that are not, the longest silent first")
    spooled: int = Field(description="messages that wait in all gateways' spools, as they last said")


class Stage(BaseModel):
    """How far a stage is behind, by the slowest of its processes; real seconds."""

    now_s: float
    p50_s: float = Field(description="of the last 5 minutes")
    p99_s: float = Field(description="of the last 5 minutes")
    process: str
    up_s: float | None = Field(description="how long that process is up; null: there is none")


class HealthReason(BaseModel):
    """One thing that is not as it should be."""

    level: str = Field(description="degraded | down")
    code: str
    text: Text


class Condition(BaseModel):
    """How the pipeline does, and why; the most pressing reason first."""

    level: str = Field(description="well | degraded | down")
    text: Text
    reasons: list[HealthReason]


class Quarantine(BaseModel):
    """Messages of devices that nobody has provisioned; they are used once their device is adopted."""

    messages: int
    devices: dict[str, int] = Field(description="`gateway/device` and its messages, those with most first")


class DiskState(BaseModel):
    """The disk that the data folder is on. Days are real ones."""

    total_bytes: int
    free_bytes: int
    used_share: float
    data_bytes: int = Field(description="what the data folder takes")
    grows_bytes_per_day: float | None = Field(description="null until it has been watched for 5 minutes")
    full_in_days: float | None = Field(description="if it goes on like this; null where it does not grow")


class OutboxState(BaseModel):
    """What is on its way to the grid platform."""

    waiting: int
    oldest_s: float = Field(description="how long the oldest message waits, real seconds")
    dead: int = Field(description="given up: the platform refused them for good")


class Status(BaseModel):
    """The whole run in one object; `citybrain status --json` prints it."""

    health: Condition
    live: bool
    missing: list[str] = Field(description="why it is not live")
    run: str = Field(description="what tells this run from another")
    at: int = Field(description="platform time")
    speed: float = Field(description="platform seconds per real second")
    readings: int = Field(description="readings accepted by ingest since the first start")
    readings_per_s: float = Field(description="in the last minute, real time")
    dropped: dict[str, int] = Field(description="what was not used since the first start, by reason")
    dropped_per_min: dict[str, float] = Field(description="what was not used in the last minute, by reason")
    alarms_open: int
    incidents_open: int
    cases: int = Field(description="all cases, rescues and maintenance orders ever opened")
    rescues: int
    rescues_open: int
    maintenance: int
    maintenance_open: int
    maintenance_overdue: int
    cases_open: int
    delivered: int
    undelivered: int
    closed: int
    lag_s: float = Field(description="how far the slowest process is behind, platform seconds")
    lag: dict[str, Stage] = Field(description="ingest, worker, desk, outbox")
    gateways: Gateways
    quarantine: Quarantine
    disk: DiskState | None = Field(description="null where it cannot be read")
    outbox: OutboxState
    restarts: dict[str, int] = Field(description="how often a process had to be started again")
    processes: dict[str, Process]


class Health(BaseModel):
    """Whether every process is alive."""

    live: bool
    missing: list[str]
    processes: dict[str, Process]
