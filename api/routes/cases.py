"""Cases, rescues and maintenance orders with their timeline, evidence and deliveries."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from sqlalchemy import ColumnElement, not_, select

from api.routes import answers, rows
from api.routes.alarms import MISSING
from api.routes.devices import Cursor, Limit
from api.site import Here
from citybrain.db.schema import alarms, cases, outbox

router = APIRouter(prefix="/v1", tags=["cases"])


@router.get("/cases")
def list_cases(
    site: Here,
    *,
    kind: Annotated[Literal["case", "rescue", "maintenance"] | None, Query(description="only of this kind")] = None,
    stage: Annotated[str | None, Query(description="only at this stage")] = None,
    state: Annotated[
        Literal["open", "closed", "all"], Query(description="`open`: not closed yet, or the sensors still say trapped")
    ] = "all",
    cursor: Cursor = None,
    limit: Limit = 50,
) -> answers.Page[answers.Case]:
    """Return cases, newest first."""
    where: list[ColumnElement[bool]] = []
    if kind is not None:
        where.append(cases.c.kind == kind)
    if stage is not None:
        where.append(cases.c.stage == stage)
    if state != "all":
        where.append(rows.OPEN if state == "open" else not_(rows.OPEN))
    with site.database() as db:
        found, further = rows.page(db, cases, where, cursor, limit)
    items = [answers.Case.model_validate(rows.case(site, row)) for row in found]
    return answers.Page(items=items, next_cursor=further)


@router.get("/cases/{number}", responses=MISSING)
def get_case(site: Here, number: str) -> answers.CaseDetail:
    """Return one case with its timeline, its evidence, its incident's alarms and its deliveries."""
    with site.database() as db:
        row = rows.one(db, cases, cases.c.number, number, "case")
        sent = db.execute(select(outbox).where(outbox.c.case_id == row["id"]).order_by(outbox.c.n)).mappings()
        return answers.CaseDetail(
            **rows.case(site, row),
            alarms=rows.alarms_where(site, db, alarms.c.incident == row["incident"]),
            timeline=rows.steps(db, "case", row["id"]),
            deliveries=[answers.Delivery.model_validate(dict(each)) for each in sent],
        )
