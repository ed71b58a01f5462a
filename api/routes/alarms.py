"""Alarms and incidents, as the desk has decided them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from sqlalchemy import ColumnElement, Connection, RowMapping, Table, select

from api.routes import answers, rows
from api.routes.devices import Cursor, Limit
from api.site import Here, Site
from citybrain.db.schema import alarms, cases, incidents

router = APIRouter(prefix="/v1", tags=["alarms and incidents"])

State = Annotated[Literal["open", "all"], Query(description="`open`: only what is not finished")]
Urgency = Annotated[Literal["life", "urgent", "normal", "watch"] | None, Query(description="only of this urgency")]
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
