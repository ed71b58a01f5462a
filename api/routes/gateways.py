"""The boxes at a glance: which are heard, what runs on them, and which want care."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, Query

from api.fleet import Box, Want, wants
from api.routes import answers
from api.routes.devices import Cursor, Limit
from api.routes.rows import cursor_of, cursor_text, named
from api.site import Here
from citybrain.clock import DAY_MS, real_unix_ms

router = APIRouter(prefix="/v1", tags=["devices"])

Wanted = Annotated[Want | Literal["care"] | None, Query(description="those that want care, of any kind or of this one")]


@router.get("/gateways")
def list_gateways(
    site: Here, *, wants: Wanted = None, cursor: Cursor = None, limit: Limit = 50
) -> answers.Page[answers.Gateway]:
    """Return gateways in the order of their ids: heard or not, release, certificate, drivers, where they stand."""
    after, now_ms = cursor_text(cursor) if cursor is not None else "", real_unix_ms()
    judged = ((box, _wants(box, now_ms)) for box in site.fleet.boxes(site.heartbeats()) if box.gateway.id > after)
    found = [(box, why) for box, why in judged if wants is None or wants in why or (wants == "care" and why)]
    behind: dict[str, int] = {}
    for device in site.latest.registry.devices:
        behind[device.gateway] = behind.get(device.gateway, 0) + (device.kind != "gateway")
    shown = found[:limit]
    further = cursor_of(shown[-1][0].gateway.id) if len(found) > limit else None
    items = [_shown(box, why, now_ms, behind.get(box.gateway.id, 0)) for box, why in shown]
    return answers.Page(items=items, next_cursor=further)


_wants = wants


def _shown(box: Box, why: list[Want], now_ms: int, devices: int) -> answers.Gateway:
    about = box.status.about if box.status is not None else None
    ends = box.certificate_ends
    return answers.Gateway(
        id=box.gateway.id,
        shard=box.gateway.shard,
        place=answers.Place.model_validate(msgspec.to_builtins(box.gateway.place)),
        devices=devices,
        online=box.online,
        since=box.since,
        received_at=box.seen.received_at,
        observed_at=box.seen.observed_at,
        version=about.version if about is not None else "",
        config=about.config if about is not None else "",
        failing=about.failing if about is not None else {},
        spooled=box.spooled,
        clock_offset_s=box.value("clock_offset_s"),
        certificate_ends_at=ends,
        certificate_days=None if ends is None else round((ends - now_ms) / DAY_MS, 1),
        commissioned=_commissioned(box),
        wants=[answers.Named(code=one, **named("wants", one).model_dump()) for one in why],
    )


def _commissioned(box: Box) -> answers.Commissioned | None:
    sheet = box.commissioned
    if sheet is None:
        return None
    away_m = sheet.away_m(box.gateway.place)
    return answers.Commissioned(**msgspec.to_builtins(sheet), distance_m=None if away_m is None else round(away_m, 1))
