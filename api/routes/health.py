"""Is it alive, how does it do: /healthz, /metrics, /v1/status."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from fastapi import APIRouter, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from sqlalchemy import Connection, func, select

from api.routes import answers, rows
from api.site import PIPELINE, Here, Problem, Site, in_force, not_live, ready
from api.status import run_name
from citybrain.clock import real_unix_ms
from citybrain.counters import Heartbeat
from citybrain.db.schema import alarms, cases, incidents, outbox

router = APIRouter(tags=["health"])

GATEWAY_SILENT_MS = 90_000  # as the rule gateway_offline has it
OURS = (*PIPELINE, "api")
_LABELLED = re.compile(r"^(?P<name>\w+)\{(?P<label>\w+)=(?P<value>.*)\}$")
PREFIX = "citybrain_"


@router.get("/healthz", response_model=answers.Health, responses={503: {"model": answers.Health}})
def healthz(site: Here, response: Response) -> answers.Health:
    """Return 200 while ingest (with its broker), worker and desk are alive and ready, 503 otherwise."""
    beats, now_ms = site.heartbeats(), real_unix_ms()
    missing = not_live(beats, now_ms, site.run.shards)
    response.status_code = 503 if missing else 200
    return answers.Health(live=not missing, missing=missing, processes=processes(beats, now_ms))


@router.get("/metrics", response_class=Response)
def metrics(site: Here) -> Response:
    """Return every component's counters and gauges, and what the database holds, as Prometheus text."""
    registry = CollectorRegistry()
    registry.register(_Collected(_metrics(site)))
    return Response(generate_latest(registry), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/status")
def status(site: Here) -> answers.Status:
    """Return the whole run in one object; it answers also while the run is not live and says why."""
    beats, now_ms = site.heartbeats(), real_unix_ms()
    missing = not_live(beats, now_ms, site.run.shards)
    counts = database_counts(site)
    return answers.Status(
        live=not missing,
        missing=missing,
        run=run_name(site.run),
        at=site.clock.now_ms(),
        speed=site.run.clock.speed,
        readings=sum(beat.counters.get("readings_total", 0) for beat in ours(beats, site.run.shards, "ingest")),
        dropped=dropped(ours(beats, site.run.shards)),
        lag_s=lag_s(ours(beats, site.run.shards)),
        gateways=gateways(site),
        processes=processes(beats, now_ms),
        **counts,
    )


def ours(beats: Mapping[str, Heartbeat], shards: int, *roles: str) -> list[Heartbeat]:
    """Return our own processes that have the shards now, of these roles or of all."""
    return [beat for role in roles or OURS for beat in in_force(beats, role, shards)]


def dropped(beats: Iterable[Heartbeat]) -> dict[str, int]:
    """Return what our own processes did not use, by reason."""
    found: dict[str, int] = {}
    for beat in beats:
        for key, amount in beat.counters.items():
            match = _LABELLED.match(key)
            if match and match["name"] == "dropped_total" and amount:
                found[match["value"]] = found.get(match["value"], 0) + amount
    return dict(sorted(found.items()))


def lag_s(beats: Iterable[Heartbeat]) -> float:
    """Return how far the slowest of our processes is behind, in platform seconds."""
    return round(max((beat.gauges.get("lag_s", 0.0) for beat in beats), default=0.0), 3)


def processes(beats: Mapping[str, Heartbeat], now_ms: int) -> dict[str, answers.Process]:
    """Return every process by its last heartbeat."""
    return {
        name: answers.Process(
            pid=beat.pid,
            live=beat.live(now_ms),
            ready=beat.live(now_ms) and ready(beat),
            age_s=round((now_ms - beat.at) / 1000, 1),
            started=beat.started,
            warnings=beat.warnings[-5:],
        )
        for name, beat in sorted(beats.items())
    }


def gateways(site: Site) -> answers.Gateways:
    """Return how many gateways are heard, and which are not."""
    all_ids = [gateway.id for gateway in site.latest.registry.gateways]
    offline = [gateway for gateway in all_ids if not online(site, gateway)]
    return answers.Gateways(online=len(all_ids) - len(offline), total=len(all_ids), offline=offline)


def online(site: Site, gateway: str) -> bool:
    """Return whether a message of the gateway came in the last 90 s of platform time."""
    seen = site.latest.seen(gateway)
    newest = max(seen.received_at or 0, seen.observed_at or 0)
    return site.clock.now_ms() - newest <= GATEWAY_SILENT_MS


def database_counts(site: Site) -> dict[str, int]:
    """Return the status's counts of rows; zeros while the desk has not made its database."""
    try:
        with site.database() as db:
            return _counts(db)
    except Problem:
        return dict.fromkeys(_COUNTS, 0)


_COUNTS = {
    "alarms_open": select(func.count()).where(alarms.c.open == 1),
    "incidents_open": select(func.count()).where(incidents.c.open == 1),
    "cases": select(func.count()).select_from(cases),
    "rescues": select(func.count()).where(cases.c.kind == "rescue"),
    "rescues_open": select(func.count()).where(cases.c.kind == "rescue", rows.OPEN),
    "maintenance": select(func.count()).where(cases.c.kind == "maintenance"),
    "cases_open": select(func.count()).where(cases.c.closed_at.is_(None)),
    "closed": select(func.count()).where(cases.c.closed_at.is_not(None)),
    "delivered": select(func.count()).where(outbox.c.state == "delivered"),
    "undelivered": select(func.count()).where(outbox.c.state != "delivered"),
}


def _counts(db: Connection) -> dict[str, int]:
    return {name: int(db.execute(query).scalar_one()) for name, query in _COUNTS.items()}


class _Collected:
    """What `generate_latest` asks: families made for this one answer."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


def _metrics(site: Site) -> list[Metric]:
    beats, now_ms = site.heartbeats(), real_unix_ms()
    up = GaugeMetricFamily(PREFIX + "up", "1 while the process is alive and ready", labels=["component"])
    age = GaugeMetricFamily(PREFIX + "heartbeat_age_seconds", "since the last heartbeat", labels=["component"])
    for name, beat in sorted(beats.items()):
        up.add_metric([name], float(beat.live(now_ms) and ready(beat)))
        age.add_metric([name], (now_ms - beat.at) / 1000)
    rows = GaugeMetricFamily(PREFIX + "rows", "what the desk's database holds", labels=["what"])
    for name, count in database_counts(site).items():
        rows.add_metric([name], count)
    return [up, age, rows, *_counter_families(beats), *_gauge_families(beats)]


def _counter_families(beats: Mapping[str, Heartbeat]) -> list[Metric]:
    """One family a counter name; components may give it different labels, so all of them stand on every sample."""
    samples: dict[str, list[tuple[str, str, str, int]]] = {}
    for component, beat in sorted(beats.items()):
        for key, amount in beat.counters.items():
            match = _LABELLED.match(key)
            name, label, value = (match["name"], match["label"], match["value"]) if match else (key, "", "")
            samples.setdefault(name.removesuffix("_total"), []).append((component, label, value, amount))
    found: list[Metric] = []
    for name, taken in sorted(samples.items()):
        labels = sorted({label for _, label, _, _ in taken if label})
        family = CounterMetricFamily(PREFIX + _safe(name), f"{name}, by component", labels=["component", *labels])
        for component, label, value, amount in taken:
            family.add_metric([component, *(value if each == label else "" for each in labels)], amount)
        found.append(family)
    return found


def _gauge_families(beats: Mapping[str, Heartbeat]) -> list[Metric]:
    names = sorted({name for beat in beats.values() for name in beat.gauges})
    found: list[Metric] = []
    for name in names:
        family = GaugeMetricFamily(PREFIX + _safe(name), f"{name}, by component", labels=["component"])
        for component, beat in sorted(beats.items()):
            if name in beat.gauges:
                family.add_metric([component], beat.gauges[name])
        found.append(family)
    return found


def _safe(name: str) -> str:
    return re.sub(r"\W", "_", name, flags=re.ASCII)
