"""Maintenance orders: a device's own trouble, on its contractor's list with a clock of its own, never a grid case.

The list is made for whoever drives out: by contractor, and within that by street and gateway, so that what stands close
together is done in one round.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field
from sqlalchemy import ColumnElement, RowMapping, func, select

from api.cases.cases import FINISHED, WITH_CONTRACTOR
from api.problem import Problem
from api.routes import answers, rows
from api.routes.commands import REFUSED, Actor, Asked, Rejected, actor_of, put
from api.site import Here, Site
from citybrain.clock import DAY_MS
from citybrain.db.schema import cases

router = APIRouter(prefix="/v1/maintenance", tags=["maintenance"])

ORDER = cases.c.kind == "maintenance"
State = Literal["open", "closed", "all", "dispatched", "taken", "handled", "feedback", "void"]
Due = Literal["overdue", "day", "week"]
WITHIN_MS = {"overdue": 0, "day": DAY_MS, "week": 7 * DAY_MS}


class Done(BaseModel):
    """Who did what."""

    actor: str = Field(default="", max_length=100)
    work: str = Field(min_length=1, max_length=500, description="what was done")
    reason: str = Field(default="", max_length=500)


class Reassigned(Rejected):
    """Who gives the order to which unit, and why."""

    unit: str = Field(max_length=100, description="code of the unit that has it from now on; its clock runs on")


@router.get("")
def list_maintenance(
    site: Here,
    *,
    contractor: Annotated[str | None, Query(description="code of the unit that has the orders")] = None,
    state: Annotated[State, Query(description="`open`, `closed` (or void), `all`, or one stage")] = "open",
    due: Annotated[Due | None, Query(description="overdue, or due within a day or a week (overdue ones too)")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 500,
) -> answers.Maintenance:
    """Return orders by contractor and round; where there are more than `limit`, those that are due first."""
    now_ms = site.clock.now_ms()
    where: list[ColumnElement[bool]] = [ORDER, *_of_state(state)]
    if contractor is not None:
        where.append(cases.c.unit == contractor)
    if due is not None:
        where.append(cases.c.deadline <= now_ms + WITHIN_MS[due])
        where.append(cases.c.closed_at.is_(None))
    with site.database() as db:
        total = int(db.execute(select(func.count()).where(*where)).scalar_one())
        query = select(cases).where(*where).order_by(cases.c.deadline, cases.c.id).limit(limit)
        found = list(db.execute(query).mappings())
    return answers.Maintenance(contractors=_contractors(site, found, now_ms), total=total, left_off=total - len(found))


def _of_state(state: State) -> list[ColumnElement[bool]]:
    if state == "all":
        return []
    if state in ("open", "closed"):
        return [cases.c.closed_at.is_(None) if state == "open" else cases.c.stage.in_(sorted(FINISHED))]
    return [cases.c.stage == state]


def _contractors(site: Site, found: Iterable[RowMapping], now_ms: int) -> list[answers.Contractor]:
    """Group orders that come in the order of their deadlines: the groups then stand in the order of their first."""
    by_unit: dict[str, dict[tuple[str, str], list[answers.Order]]] = {}
    for row in found:
        gateway = _gateway(site, row["subject"])
        order = answers.Order(
            **rows.case(site, row), gateway=gateway, overdue=row["closed_at"] is None and row["deadline"] < now_ms
        )
        by_unit.setdefault(row["unit"], {}).setdefault((row["street"], gateway), []).append(order)
    return [
        answers.Contractor(
            unit=rows.unit(site, unit),
            orders=sum(map(len, rounds.values())),
            overdue=sum(order.overdue for orders in rounds.values() for order in orders),
            rounds=[
                answers.Round(
                    street=street, gateway=gateway, overdue=sum(order.overdue for order in orders), orders=orders
                )
                for (street, gateway), orders in rounds.items()
            ],
        )
        for unit, rounds in by_unit.items()
    ]


def _gateway(site: Site, subject: str) -> str:
    device = site.latest.find(subject)
    return device.gateway if device is not None else ""


@router.post("/{number}/take", status_code=202, responses=REFUSED)
def take(site: Here, number: str, asked: Asked | None = None, x_actor: Actor = None) -> answers.Accepted:
    """The contractor takes the order on."""
    asked = asked or Asked()
    return _ask(site, "take", number, actor_of(x_actor, asked.actor), asked.reason)


@router.post("/{number}/done", status_code=202, responses=REFUSED)
def done(site: Here, number: str, asked: Done, x_actor: Actor = None) -> answers.Accepted:
    """The contractor has done the work; the order closes once the device is well."""
    return _ask(site, "done", number, actor_of(x_actor, asked.actor), asked.reason, work=asked.work)


@router.post("/{number}/not-needed", status_code=202, responses=REFUSED)
def not_needed(site: Here, number: str, asked: Rejected, x_actor: Actor = None) -> answers.Accepted:
    """Nothing needs to be done, because of `reason`: the order is void."""
    return _ask(site, "not_needed", number, actor_of(x_actor, asked.actor), asked.reason)


@router.post("/{number}/reassign", status_code=202, responses=REFUSED)
def reassign(site: Here, number: str, asked: Reassigned, x_actor: Actor = None) -> answers.Accepted:
    """The order goes to another unit, because of `reason`."""
    actor = actor_of(x_actor, asked.actor)
    if asked.unit not in {unit.code for unit in site.latest.registry.units}:
        raise rows.not_found("unit", asked.unit)
    return _ask(site, "reassign", number, actor, asked.reason, unit=asked.unit)


def _ask(site: Site, kind: str, number: str, actor: str, reason: str, **body: Any) -> answers.Accepted:
    with site.database() as db:
        row = rows.one(db, cases, cases.c.number, number, "case")
    if row["kind"] != "maintenance":
        raise Problem(409, "no_maintenance", f"case {number}", f"it is a {row['kind']}, which its grid platform moves")
    if row["stage"] not in WITH_CONTRACTOR:
        raise Problem(409, "over", f"case {number}", f"it is {row['stage']}: nothing is left to do")
    return put(site, site.desk, kind, actor, body={"case": number, **body}, reason=reason)
