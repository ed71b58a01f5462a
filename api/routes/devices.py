"""Devices with their latest values."""

from __future__ import annotations

from typing import Annotated

import msgspec
from fastapi import APIRouter, Query

from api.routes import answers
from api.routes.rows import MOST, cursor_of, cursor_text, not_found
from api.site import Here, Site
from citybrain.model import Device
from citybrain.units import METRICS

router = APIRouter(prefix="/v1", tags=["devices"])

Cursor = Annotated[str | None, Query(description="`next_cursor` of the page before", max_length=200)]
Limit = Annotated[int, Query(ge=1, le=MOST, description="items on a page")]


@router.get("/devices")
def list_devices(
    site: Here,
    *,
    kind: Annotated[str | None, Query(description="hydrant, elevator, gateway …")] = None,
    gateway: Annotated[str | None, Query(description="id of its gateway")] = None,
    zone: Annotated[str | None, Query(description="pressure zone")] = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> answers.Page[answers.Device]:
    """Return devices in the order of their ids, with the latest value of each metric and its time."""
    after = cursor_text(cursor) if cursor is not None else ""
    asked = (("kind", kind), ("gateway", gateway), ("zone", zone))
    found = [
        device
        for device in sorted(site.latest.registry.devices, key=lambda device: device.id)
        if device.id > after and all(value is None or getattr(device, name) == value for name, value in asked)
    ]
    shown = found[:limit]
    further = cursor_of(shown[-1].id) if len(found) > limit else None
    return answers.Page(items=[_device(site, device) for device in shown], next_cursor=further)


@router.get("/devices/{id}", responses={404: {"model": answers.Refusal}})
def get_device(site: Here, id: str) -> answers.Device:
    """Return one device with the latest value of each metric and its time."""
    device = site.latest.find(id)
    if device is None:
        raise not_found("device", id)
    return _device(site, device)


def _device(site: Site, device: Device) -> answers.Device:
    values = {
        name: answers.Latest(
            value=value.value,
            unit=METRICS[name].unit,
            at=value.at,
            name=answers.Text(zh=METRICS[name].zh, en=METRICS[name].en),
        )
        for name, value in site.latest.values(device).items()
    }
    plain = {name: getattr(device, name) for name in ("id", "kind", "gateway", "zone", "building", "name")}
    place = answers.Place.model_validate(msgspec.to_builtins(device.place))
    plain |= {"sensor": device.wire_id, "mode": device.mode}
    return answers.Device(**plain, tags=list(device.tags), place=place, values=values)
