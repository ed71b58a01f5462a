"""What the desk reads and writes inside one transaction. Rows in, rows out; nothing is decided here."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
from sqlalchemy import Connection, Select, Table, and_, exists, func, or_, select, update

from citybrain.db.schema import alarms, cases, incidents, outbox, timeline
from citybrain.machine import Moved
from streams.incidents import Candidate

Row = dict[str, Any]  # one row, by column name


def text(value: object) -> str:
    """Return a value as the JSON text a column holds."""
    return msgspec.json.encode(value, order="deterministic").decode()


class Ledger:
    """One transaction of the desk. `counts`, `drops`, `warnings` become true when it commits."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.counts: Counter[str] = Counter()
        self.drops: Counter[str] = Counter()
        self.warnings: list[str] = []

    def add(self, table: Table, **values: Any) -> int:
        """Insert a row; return its id, given in order."""
        key = self.connection.execute(table.insert().values(**values)).inserted_primary_key
        return int(key[0]) if key is not None else 0

    def set(self, table: Table, id: int, **values: Any) -> None:
        """Change columns of a row."""
        self.connection.execute(update(table).where(table.c.id == id).values(**values))

    def get(self, table: Table, id: int) -> Row | None:
        """Return a row by id."""
        return self._one(select(table).where(table.c.id == id))

    def _one(self, query: Select[Any]) -> Row | None:
        row = self.connection.execute(query).first()
        return row._asdict() if row is not None else None

    def note(self, at: int, entity: str, id: int, moved: Moved, actor: str = "desk", /, **details: Any) -> None:
        """Write a line of an entity's timeline: what happened, why, on whose behalf."""
        self.connection.execute(
            timeline.insert().values(
                at=at,
                entity=entity,
                entity_id=id,
                event=moved.event,
                before=moved.before,
                after=moved.after,
                reason=moved.reason,
                actor=actor,
                details=text(details),
            )
        )

    # --- alarms and incidents

    def open_alarm(self, rule: str, subject: str) -> Row | None:
        """Return the one open alarm of (rule, subject)."""
        where = and_(alarms.c.rule == rule, alarms.c.subject == subject, alarms.c.open == 1)
        return self._one(select(alarms).where(where))

    def members(self, incident: int) -> list[Row]:
        """Return all alarms of an incident, in their order."""
        query = select(alarms).where(alarms.c.incident == incident).order_by(alarms.c.id)
        return [row._asdict() for row in self.connection.execute(query)]

    def candidates(self, cause: str, key: str, subject: str) -> list[Candidate]:
        """Return the open incidents of this cause and key, and those that have an alarm of this subject."""
        active = exists().where(alarms.c.incident == incidents.c.id, alarms.c.active == 1)
        shares = exists().where(alarms.c.incident == incidents.c.id, alarms.c.subject == subject)
        query = (
            select(incidents, active.label("active"), shares.label("shares"))
            .where(incidents.c.open == 1)
            .where(
                or_(
                    and_(incidents.c.cause == cause, incidents.c.key == key),
                    incidents.c.id.in_(select(alarms.c.incident).where(alarms.c.subject == subject)),
                )
            )
            .order_by(incidents.c.id)
        )
        return [
            Candidate(
                row["id"],
                row["kind"],
                row["cause"],
                row["key"],
                row["first_at"],
                row["last_at"],
                bool(row["active"]),
                bool(row["shares"]),
            )
            for row in self.connection.execute(query).mappings()
        ]

    # --- cases and outbox

    def case_of(self, incident: int) -> Row | None:
        """Return the incident's case or maintenance order; a rescue belongs to its alarm."""
        where = and_(cases.c.incident == incident, cases.c.kind != "rescue")
        return self._one(select(cases).where(where))

    def rescue_of(self, alarm: int) -> Row | None:
        """Return the alarm's rescue."""
        where = and_(cases.c.alarm == alarm, cases.c.kind == "rescue")
        return self._one(select(cases).where(where))

    def case_numbered(self, number: str) -> Row | None:
        """Return a case by its number."""
        return self._one(select(cases).where(cases.c.number == number))

    def next_case(self) -> int:
        """Return the id of the next case."""
        return int(self.connection.execute(select(func.coalesce(func.max(cases.c.id), 0))).scalar_one()) + 1

    def next_message(self, case: int) -> tuple[int, int]:
        """Return (number among all messages, number among the case's) of the next message."""
        last = self.connection.execute(select(func.coalesce(func.max(outbox.c.n), 0))).scalar_one()
        of_case = self.connection.execute(
            select(func.count()).select_from(outbox).where(outbox.c.case_id == case)
        ).scalar_one()
        return int(last) + 1, int(of_case) + 1
