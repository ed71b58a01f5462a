"""Is it alive, how does it do: /healthz, /metrics, /v1/status."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from itertools import accumulate

import msgspec
from fastapi import APIRouter, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from sqlalchemy import Connection, func, select

from api import vitals
from api.disk import Disk
from api.health import LEVELS, Reason, Stage, Vitals, judge, level_of
from api.problem import Problem
from api.processes import not_live, ready, role_of, standing_by
from api.routes import answers, rows
from api.site import Here, Site
from api.status import run_name
from citybrain.clock import real_unix_ms
from citybrain.counters import BOUNDS_S, Heartbeat
from citybrain.db.schema import alarms, cases, incidents, outbox

router = APIRouter(tags=["health"])

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
    known = vitals.gather(site, beats, now_ms, counts["undelivered"])
    readings, per_min = vitals.taken(beats, now_ms)
    waiting, devices = vitals.quarantine(beats)
    return answers.Status(
        health=condition(judge(known)),
        live=not missing,
        missing=missing,
        run=run_name(site.run),
        at=site.clock.now_ms(),
        speed=site.run.clock.speed,
        readings=readings,
        readings_per_s=round(per_min / 60, 1),
        dropped=vitals.dropped(beats),
        dropped_per_min=vitals.dropped_per_min(beats, now_ms),
        lag_s=lag_s(vitals.ours(beats)),
        lag={name: _stage(stage) for name, stage in known.stages.items()},
        gateways=gateways(known),
        quarantine=answers.Quarantine(messages=waiting, devices=devices),
        disk=disk_state(known.disk),
        outbox=answers.OutboxState(
            waiting=counts["undelivered"] - counts["dead"], oldest_s=known.outbox_s, dead=counts.pop("dead")
        ),
        restarts=vitals.restarts(beats),
        processes=processes(beats, now_ms),
        **counts,
    )


def condition(reasons: Iterable[Reason]) -> answers.Condition:
    """Return the judgement in both languages."""
    found = list(reasons)
    level = level_of(found)
    return answers.Condition(
        level=level,
        text=rows.named("health", level),
        reasons=[
            answers.HealthReason(
                level=reason.level, code=reason.code, text=answers.Text(zh=reason.text("zh"), en=reason.text("en"))
            )
            for reason in found
        ],
    )


def _stage(stage: Stage) -> answers.Stage:
    up_s = stage.up_s if math.isfinite(stage.up_s) else None
    return answers.Stage(now_s=stage.now_s, p50_s=stage.p50_s, p99_s=stage.p99_s, process=stage.process, up_s=up_s)


def disk_state(disk: Disk | None) -> answers.DiskState | None:
    """Return what is known of the disk."""
    if disk is None:
        return None
    return answers.DiskState(
        total_bytes=disk.total,
        free_bytes=disk.free,
        used_share=round(disk.used_share, 4),
        data_bytes=disk.data,
        grows_bytes_per_day=disk.grows_per_day,
        full_in_days=disk.full_in_days,
    )


def lag_s(beats: Iterable[Heartbeat]) -> float:
    """Return how far the slowest of our processes is behind, in platform seconds."""
    return round(max((beat.gauges.get("lag_s", 0.0) for beat in beats), default=0.0), 3)


def processes(beats: Mapping[str, Heartbeat], now_ms: int) -> dict[str, answers.Process]:
    """Return every process by its last heartbeat."""
    again = vitals.restarts(beats)
    return {
        name: answers.Process(
            role=role_of(name),
            pid=beat.pid,
            live=beat.live(now_ms),
            ready=beat.live(now_ms) and ready(beat),
            standby=standing_by(beat),
            age_s=round((now_ms - beat.at) / 1000, 1),
            started=beat.started,
            restarts=again.get(name, 0),
            warnings=beat.warnings[-5:],
        )
        for name, beat in sorted(beats.items())
    }


def gateways(known: Vitals) -> answers.Gateways:
    """Return how many gateways are heard, which are not, and what waits in their spools."""
    found = [answers.LateGateway(**msgspec.to_builtins(each)) for each in known.late]
    return answers.Gateways(
        online=known.gateways - len(found),
        total=known.gateways,
        offline=[each.id for each in found],
        late=found,
        spooled=sum(known.spooled.values()),
    )


def database_counts(site: Site) -> dict[str, int]:
    """Return the status's counts of rows; zeros while the desk has not made its database."""
    try:
        with site.database() as db:
            return _counts(db) | {"maintenance_overdue": _overdue(db, site.clock.now_ms())}
    except Problem:
        return dict.fromkeys([*_COUNTS, "maintenance_overdue"], 0)


def _overdue(db: Connection, now_ms: int) -> int:
    where = (cases.c.kind == "maintenance", cases.c.closed_at.is_(None), cases.c.deadline < now_ms)
    return int(db.execute(select(func.count()).where(*where)).scalar_one())


_COUNTS = {
    "alarms_open": select(func.count()).where(alarms.c.open == 1),
    "incidents_open": select(func.count()).where(incidents.c.open == 1),
    "cases": select(func.count()).select_from(cases),
    "rescues": select(func.count()).where(cases.c.kind == "rescue"),
    "rescues_open": select(func.count()).where(cases.c.kind == "rescue", rows.OPEN),
    "maintenance": select(func.count()).where(cases.c.kind == "maintenance"),
    "maintenance_open": select(func.count()).where(cases.c.kind == "maintenance", cases.c.closed_at.is_(None)),
    "cases_open": select(func.count()).where(cases.c.closed_at.is_(None)),
    "closed": select(func.count()).where(cases.c.closed_at.is_not(None)),
    "delivered": select(func.count()).where(outbox.c.state == "delivered"),
    "undelivered": select(func.count()).where(outbox.c.state != "delivered"),
    "dead": select(func.count()).where(outbox.c.state == "dead"),
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
    return [
        up,
        age,
        rows,
        *_counter_families(beats),
        *_gauge_families(beats),
        *_delay_families(beats),
        *_site_families(site, beats, now_ms),
    ]


Sample = tuple[str, str, str, float]  # component, label, its value, amount


def _counter_families(beats: Mapping[str, Heartbeat]) -> list[Metric]:
    found: list[Metric] = []
    for name, samples in _by_name((component, beat.counters) for component, beat in sorted(beats.items())).items():
        bare = name.removesuffix("_total")
        labels = _labels(samples)
        family = CounterMetricFamily(PREFIX + _safe(bare), f"{bare}, by component", labels=["component", *labels])
        _fill(family, samples, labels)
        found.append(family)
    return found


def _gauge_families(beats: Mapping[str, Heartbeat]) -> list[Metric]:
    found: list[Metric] = []
    for name, samples in _by_name((component, beat.gauges) for component, beat in sorted(beats.items())).items():
        labels = _labels(samples)
        family = GaugeMetricFamily(PREFIX + _safe(name), f"{name}, by component", labels=["component", *labels])
        _fill(family, samples, labels)
        found.append(family)
    return found


def _by_name(told: Iterable[tuple[str, Mapping[str, float]]]) -> dict[str, list[Sample]]:
    """Return what components told, by the name before the label."""
    found: dict[str, list[Sample]] = {}
    for component, values in told:
        for key, amount in values.items():
            match = vitals.LABELLED.match(key)
            name, label, value = (match["name"], match["label"], match["value"]) if match else (key, "", "")
            found.setdefault(name, []).append((component, label, value, amount))
    return dict(sorted(found.items()))


def _labels(samples: Iterable[Sample]) -> list[str]:
    return sorted({label for _, label, _, _ in samples if label})


def _fill(family: CounterMetricFamily | GaugeMetricFamily, samples: Iterable[Sample], labels: list[str]) -> None:
    """Add samples; components may give a name different labels, so all of them stand on every sample."""
    for component, label, value, amount in samples:
        family.add_metric([component, *(value if each == label else "" for each in labels)], amount)


def _delay_families(beats: Mapping[str, Heartbeat]) -> list[Metric]:
    """A histogram of every delay, by component."""
    found: list[Metric] = []
    for name in sorted({name for beat in beats.values() for name in beat.delays}):
        words = f"{name} of what was taken, real seconds, by component"
        family = HistogramMetricFamily(
            PREFIX + _safe(f"{name.removesuffix('_s')}_seconds"), words, labels=["component"]
        )
        for component, beat in sorted(beats.items()):
            if name in beat.delays:
                family.add_metric([component], _buckets(beat.delays[name].counts), None)
        found.append(family)
    return found


def _buckets(counts: tuple[int, ...]) -> list[tuple[str, float]]:
    """Return cumulative counts by their upper bound, as Prometheus wants them."""
    bounds = [*(f"{bound:g}" for bound in BOUNDS_S), "+Inf"]
    return list(zip(bounds, map(float, accumulate(counts)), strict=True))


def _site_families(site: Site, beats: Mapping[str, Heartbeat], now_ms: int) -> list[Metric]:
    """What no process counts: the judgement, the gateways, the disk."""
    known = vitals.gather(site, beats, now_ms, 0)
    late = GaugeMetricFamily(PREFIX + "gateway_late_seconds", "platform seconds, of silent ones", labels=["gateway"])
    for each in known.late:
        late.add_metric([each.id], -1.0 if each.late_s is None else each.late_s)
    waiting = GaugeMetricFamily(
        PREFIX + "gateway_spooled", "messages in its spool, as it last said", labels=["gateway"]
    )
    for gateway, amount in known.spooled.items():
        waiting.add_metric([gateway], amount)
    level = LEVELS.index(level_of(judge(known)))
    found: list[Metric] = [GaugeMetricFamily(PREFIX + "health", "0 well, 1 degraded, 2 down", level), late, waiting]
    left = GaugeMetricFamily(PREFIX + "left_seconds", "until a certificate or list ends", labels=["kind", "name"])
    for ending in known.endings:
        left.add_metric([ending.kind, ending.name], ending.left_s)
    found.append(left)
    if known.disk is not None:
        for name, size in (("free", known.disk.free), ("total", known.disk.total), ("data", known.disk.data)):
            found.append(
                GaugeMetricFamily(f"{PREFIX}disk_{name}_bytes", f"{name} bytes of the data folder's disk", size)
            )
    return found


def _safe(name: str) -> str:
    return re.sub(r"\W", "_", name, flags=re.ASCII)
