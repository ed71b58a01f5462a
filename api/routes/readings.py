"""What devices said over time: a chart's data, and exports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from api.problem import Problem
from api.routes import answers
from api.site import Here, Site
from citybrain.clock import DAY_MS
from citybrain.model import Device
from citybrain.units import METRICS

router = APIRouter(prefix="/v1", tags=["readings"])

MOST_POINTS = 10_000
FAR_MS = 2**52
Format = Literal["csv", "parquet", "json"]
From = Annotated[int | None, Query(alias="from", ge=-FAR_MS, le=FAR_MS, description="Unix ms; a day before `to`")]
To = Annotated[int | None, Query(ge=-FAR_MS, le=FAR_MS, description="Unix ms, not included; now")]
Points = Annotated[int, Query(ge=1, le=MOST_POINTS, description="how many values or buckets at most")]
REFUSED: dict[int | str, dict[str, Any]] = {404: {"model": answers.Refusal}, 503: {"model": answers.Refusal}}


class Gap(BaseModel):
    """Draw no line here: between these two times nothing was received."""

    from_ms: int
    until_ms: int
    why: str = Field(description="silent: its gateway said nothing; evicted: dropped at the edge; missing: log damaged")
    messages: int = Field(description="how many messages of its gateway were dropped, if that is known")


class Missing(BaseModel):
    """A file of the history that cannot be read: values of these times may be missing from the answer."""

    file: str
    from_ms: int
    until_ms: int


class Readings(BaseModel):
    """A series over time, as columns. With `bucket_ms` 0 `value` has every value; else each bucket what stands out."""

    device: str
    metric: str
    unit: str
    from_ms: int
    to_ms: int
    bucket_ms: int = Field(description="0: the values themselves")
    values: int = Field(description="how many there are in this time")
    at: list[int] = Field(description="times, or the beginnings of the buckets that hold values")
    value: list[float]
    count: list[int]
    min: list[float]
    max: list[float]
    first: list[float]
    last: list[float]
    gaps: list[Gap]
    missing: list[Missing]


@router.get("/devices/{id}/readings", response_model=Readings, responses=REFUSED)
def get_readings(
    site: Here,
    id: str,
    *,
    metric: Annotated[str, Query(description="such as pressure_mpa")],
    from_ms: From = None,
    to: To = None,
    points: Points = 1000,
    format: Annotated[Format | None, Query(description="an export of all values instead")] = None,
) -> Response:
    """Return a metric of a device over time, down-sampled so that extremes are kept; `format=` streams all values."""
    from_ms, to_ms = _times(site, from_ms, to)
    _check_metric(metric)
    device = site.latest.find(id)
    chart = site.history.chart(id, metric, from_ms, to_ms, points if format is None else 1)
    if not chart.values:  # what is no more in the registry may have a history
        _known(device, id, metric)
    if format is not None:
        return _export(site, [id], (metric,), from_ms, to_ms, format)
    chart.gaps = _gaps(site, device, metric, from_ms, to_ms)
    front = {"device": id, "metric": metric, "unit": METRICS[metric].unit, "from_ms": from_ms, "to_ms": to_ms}
    return Response(msgspec.json.encode(front | msgspec.structs.asdict(chart)), media_type="application/json")


@router.get("/export", responses=REFUSED)
def export(
    site: Here,
    *,
    device: Annotated[list[str] | None, Query(description="ids; may be repeated")] = None,
    kind: Annotated[str | None, Query(description="hydrant, elevator, gateway …")] = None,
    gateway: Annotated[str | None, Query(description="id of their gateway")] = None,
    zone: Annotated[str | None, Query(description="pressure zone")] = None,
    metric: Annotated[list[str] | None, Query(description="may be repeated; all where none is given")] = None,
    from_ms: From = None,
    to: To = None,
    format: Format = "csv",
) -> StreamingResponse:
    """Stream all values of many devices, one device after the other, each by metric and time."""
    from_ms, to_ms = _times(site, from_ms, to)
    for name in metric or ():
        _check_metric(name)
    asked = (("kind", kind), ("gateway", gateway), ("zone", zone))
    if not device and all(value is None for _, value in asked):
        raise Problem(422, "invalid", "query device", "say which devices: `device`, `kind`, `gateway` or `zone`")
    known = {each.id: each for each in site.latest.registry.devices}
    for name in device or ():
        _known(known.get(name), name, None)
    chosen = [
        each.id
        for each in sorted(known.values(), key=lambda each: each.id)
        if (not device or each.id in device)
        and all(value is None or getattr(each, field) == value for field, value in asked)
    ]
    return _export(site, chosen, tuple(metric or ()), from_ms, to_ms, format)


def _times(site: Site, from_ms: int | None, to_ms: int | None) -> tuple[int, int]:
    """Return the asked interval; raises Problem 422 where it is empty."""
    to_ms = site.clock.now_ms() if to_ms is None else to_ms
    from_ms = to_ms - DAY_MS if from_ms is None else from_ms
    if from_ms >= to_ms:
        raise Problem(422, "invalid", "query from", f"`from` {from_ms} must be before `to` {to_ms} (Unix ms)")
    return from_ms, to_ms


def _check_metric(metric: str) -> None:
    if metric not in METRICS:
        what = f"there is no metric {metric!r}; there are {', '.join(sorted(METRICS))}"
        raise Problem(404, "not_found", f"metric {metric}", what)


def _known(device: Device | None, id: str, metric: str | None) -> str:
    """Return the id of a device that has the metric; raises Problem 404."""
    if device is None:
        raise Problem(404, "not_found", f"device {id}", f"there is no device {id}")
    has = (*device.metrics, *device.event_metrics)
    if metric is not None and metric not in has:
        what = f"device {id} has no {metric}; it has {', '.join(has)}"
        raise Problem(404, "not_found", f"device {id} metric {metric}", what)
    return id


def _gaps(site: Site, device: Device | None, metric: str, from_ms: int, to_ms: int) -> list[Any]:
    """Return the gaps of a device's gateway that concern a metric; of a device that is no more, none are known."""
    if device is None:
        return []
    gateway = site.latest.gateway(device.gateway)
    lane = "event" if metric in device.event_metrics else "telemetry"
    found = site.history.gaps(gateway.id, gateway.shard, from_ms, to_ms, site.clock.now_ms())
    return [gap for gap in found if gap.lane == lane or gap.why == "silent"]


def _export(
    site: Site, devices: Sequence[str], metrics: tuple[str, ...], from_ms: int, to_ms: int, format: Format
) -> StreamingResponse:
    from api.history import MEDIA, exported  # noqa: PLC0415  pyarrow is 30 MB: only who exports loads it
    from streams.history.query import Span  # noqa: PLC0415

    spans = [Span(device, metrics or tuple(METRICS), from_ms, to_ms) for device in devices]
    missing = site.history.missing(from_ms, to_ms)
    headers = {
        "content-disposition": f'attachment; filename="readings.{format}"',
        "x-missing-parts": str(len(missing)),
    }
    return StreamingResponse(exported(site.history, spans, format, missing), media_type=MEDIA[format], headers=headers)
