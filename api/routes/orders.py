"""Orders to gateways: a new configuration, a sample, a frame, a driver's restart; and what came of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Query
from pydantic import BaseModel, Field
from sqlalchemy import RowMapping

from api.routes import answers, rows
from api.routes.commands import REFUSED, Actor, actor_of, put
from api.routes.rows import MOST, not_found
from api.site import Here, Site
from citybrain.clock import SECOND_MS
from citybrain.db.schema import orders
from citybrain.orders import What

router = APIRouter(prefix="/v1", tags=["gateways"])


class Wanted(BaseModel):
    """What the gateway is to do, why, and how long that still makes sense (platform time)."""

    what: What
    body: dict[str, Any] = Field(default={}, description="docs/gateway.md says what each order takes")
    within_s: float = Field(default=600.0, gt=0, le=7 * 86_400)
    reason: str = Field(min_length=1, max_length=500)
    actor: str = Field(default="", max_length=100)


class Order(BaseModel):
    """An order: `asked` until the gateway answers, then `done` or `failed`; `expired` where it did not in time."""

    command: str
    gateway: str
    what: str
    body: dict[str, Any]
    actor: str
    reason: str
    at: int
    until: int
    state: Literal["asked", "done", "failed", "expired"]
    answer: str
    answered_at: int | None


@router.post("/gateways/{id}/commands", status_code=202, responses=REFUSED)
def order(site: Here, id: str, wanted: Wanted, x_actor: Actor = None) -> answers.Accepted:
    """Ask a gateway for something; the desk writes it down and sends it, the gateway does it once."""
    actor = actor_of(x_actor, wanted.actor)
    _known(site, id)
    until = site.clock.now_ms() + round(wanted.within_s * SECOND_MS)
    body = {"gateway": id, "what": wanted.what, "until": until, "body": wanted.body}
    return put(site, site.desk, "gateway_order", actor, body=body, reason=wanted.reason)


@router.get("/gateways/{id}/commands", responses=REFUSED)
def list_orders(
    site: Here,
    id: str,
    cursor: Annotated[str | None, Query(description="`next_cursor` of the page before", max_length=200)] = None,
    limit: Annotated[int, Query(ge=1, le=MOST, description="items on a page")] = 50,
) -> answers.Page[Order]:
    """Return a gateway's orders, the newest first."""
    _known(site, id)
    with site.database() as db:
        found, further = rows.page(db, orders, [orders.c.gateway == id], cursor, limit)
    return answers.Page(items=[_order(row, site.clock.now_ms()) for row in found], next_cursor=further)


def _order(row: RowMapping, now_ms: int) -> Order:
    state = "expired" if row["state"] == "asked" and now_ms > row["until"] else row["state"]
    return Order(**{**row, "state": state, "body": msgspec.json.decode(row["body"])})


def _known(site: Site, id: str) -> None:
    if all(gateway.id != id for gateway in site.latest.registry.gateways):
        raise not_found("gateway", id)
