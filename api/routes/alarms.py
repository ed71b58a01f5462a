"""Alarms and incidents, as the desk has decided them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Query
from sqlalchemy import ColumnElement, Connection, RowMapping, Table, select

from api.routes import answers, rows
from api.routes.devices import Cursor, Limit
from api.site import Here, Site
from citybrain.clock import DAY_MS
from citybrain.db.schema import alarms, cases, incidents
from citybrain.errors import NotFound
from citybrain.model import Evidence
from streams.evidence import EvidenceStore

router = APIRouter(prefix="/v1", tags=["alarms and incidents"])

State = Annotated[Literal["open", "all"], Query(description="`open`: only what is not finished")]
Urgency = Annotated[Literal["life", "urgent", "normal", "watch"] | None, Query(description="only of this urgency")]
EVIDENCE = "evidence"  # the metric
MOST_VALUES = 10_000  # a scene event is told each 30 s: 2,880 a day
MOST_PICTURES = 20
MISSING: dict[int | str, dict[str, Any]] = {404: {"model": answers.Refusal}}


@router.get("/alarms")
def list_alarms(
    site: Here, state: State = "open", urgency: Urgency = None, cursor: Cursor = None, limit: Limit = 50
) -> answers.Page[answers.Alarm]:
    """Return alarms, newest first, each with an explanation."""
    with site.database() as db:
        found, further = rows.page(db, alarms, _where(alarms, state, urgency), cursor, limit)
        return answers.Page(items=[rows.alarm(site, row) for row in found], next_cursor=further)


@router.get("/alarms/{id}", responses=MISSING)
def get_alarm(site: Here, id: int) -> answers.Alarm:
    """Return one alarm."""
    with site.database() as db:
        return rows.alarm(site, rows.one(db, alarms, alarms.c.id, id, "alarm"))


@router.get("/alarms/{id}/pictures", responses=MISSING)
def get_pictures(site: Here, id: int) -> answers.Pictures:
    """Return the pictures that an alarm of a camera rests on, the latest first; `/v1/evidence/{sha256}` shows one.

    A camera names a picture in the reading that tells its event (metric `evidence`); those told with the alarm's metric
    from a day before it was raised until it ended are its pictures. The latest at or before `raised_at` raised it.
    """
    with site.database() as db:
        row = rows.one(db, alarms, alarms.c.id, id, "alarm")
    metric = msgspec.json.decode(row["evidence"], type=Evidence).metric
    until_ms = 1 + (row["cleared_at"] if row["cleared_at"] is not None else site.clock.now_ms())
    span = (row["raised_at"] - DAY_MS, until_ms, MOST_VALUES)
    named = site.history.chart(row["subject"], EVIDENCE, *span)
    told = set(site.history.chart(row["subject"], metric, *span).at) if named.at else set()
    found = [(at, number) for at, number in zip(named.at, named.value, strict=False) if at in told]
    return answers.Pictures(items=[_picture(site, at, number) for at, number in reversed(found[-MOST_PICTURES:])])


def _picture(site: Site, at_ms: int, number: float) -> answers.Picture:
    """Return what is known of a picture by the number that an event gave it; it may still be on its way."""
    named = f"{int(number):013x}"
    try:
        about = EvidenceStore(site.layout.evidence).find(named)
    except NotFound:
        return answers.Picture(at=at_ms, name=named, complete=False, unmasked=False)
    return answers.Picture(at=at_ms, name=about.sha256, complete=about.complete, unmasked=about.unmasked)


@router.get("/incidents")
def list_incidents(
    site: Here, state: State = "open", urgency: Urgency = None, cursor: Cursor = None, limit: Limit = 50
) -> answers.Page[answers.Incident]:
    """Return incidents, newest first."""
    with site.database() as db:
        found, further = rows.page(db, incidents, _where(incidents, state, urgency), cursor, limit)
        items = [answers.Incident.model_validate(incident(site, db, row)) for row in found]
        return answers.Page(items=items, next_cursor=further)


@router.get("/incidents/{id}", responses=MISSING)
def get_incident(site: Here, id: int) -> answers.IncidentDetail:
    """Return one incident with its members, each saying why it belongs, and its timeline."""
    with site.database() as db:
        facts = incident(site, db, rows.one(db, incidents, incidents.c.id, id, "incident"))
        members = rows.alarms_where(site, db, alarms.c.incident == id)
        return answers.IncidentDetail(**facts, alarms=members, timeline=rows.steps(db, "incident", id))


def incident(site: Site, db: Connection, row: RowMapping) -> dict[str, Any]:
    """Return what `answers.Incident` is made of; it is called after its first alarm's rule."""
    members = db.execute(
        select(alarms.c.rule, alarms.c.ruleset).where(alarms.c.incident == row["id"]).order_by(alarms.c.id)
    ).all()
    numbers = db.execute(select(cases.c.number).where(cases.c.incident == row["id"]).order_by(cases.c.id)).scalars()
    rule = site.rule(members[0].ruleset, members[0].rule) if members else None
    title = rows.title(rule, members[0].rule if members else row["cause"])
    return {**row, "open": bool(row["open"]), "title": title, "members": len(members), "cases": list(numbers)}


def _where(table: Table, state: str, urgency: str | None) -> list[ColumnElement[bool]]:
    where: list[ColumnElement[bool]] = [table.c.open == 1] if state == "open" else []
    return [*where, table.c.urgency == urgency] if urgency else where
