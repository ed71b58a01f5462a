"""What the desk reads and writes inside one transaction. Rows in, rows out; nothing is decided here.

Every statement is compiled once for the database's dialect and then goes straight to its driver: building it anew each
time costs several times more than running it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec
from sqlalchemy import (
    Connection,
    Dialect,
    Table,
    bindparam,
    exists,
    func,
    insert,
    select,
    union,
    update,
)
from sqlalchemy.sql import ClauseElement

from citybrain.db.schema import alarms, cases, commands, consumed, incidents, journal, meta, outbox, timeline
from citybrain.db.store import upsert
from citybrain.machine import Moved
from streams.incidents import Candidate

Row = dict[str, Any]  # one row, by column name


def text(value: object) -> str:
    """Return a value as the JSON text a column holds."""
    return msgspec.json.encode(value, order="deterministic").decode()


# --- statements, compiled once ----------------------------------------------------------------------------------


@lru_cache(maxsize=512)
def _compiled(dialect: Dialect, statement: ClauseElement) -> tuple[str, tuple[str, ...] | None, dict[str, Any]]:
    """Return SQL, the order of its parameters (None where the driver takes names), and those with a fixed value."""
    compiled = statement.compile(dialect=dialect)
    positions = getattr(compiled, "positiontup", None)
    return str(compiled), tuple(positions) if positions is not None else None, dict(compiled.params)


@lru_cache(maxsize=512)
def _insert(table: Table, columns: tuple[str, ...], back: str) -> ClauseElement:
    statement = insert(table).values({name: bindparam(name) for name in columns})
    return statement.returning(table.c[back]) if back else statement.inline()


@lru_cache(maxsize=512)
def _update(table: Table, key: str, columns: tuple[str, ...]) -> ClauseElement:
    return update(table).where(table.c[key] == bindparam("_key")).values({name: bindparam(name) for name in columns})


@lru_cache(maxsize=64)
def _put(dialect: str, table: Table, columns: tuple[str, ...], *keys: str) -> ClauseElement:
    return upsert(dialect, table, columns, keys).values({name: bindparam(name) for name in columns})


@lru_cache(maxsize=64)
def _row(table: Table, *keys: str) -> ClauseElement:
    return select(table).where(*(table.c[key] == bindparam(f"_{key}") for key in keys))


_OPEN_ALARM = select(alarms).where(
    alarms.c.rule == bindparam("rule"), alarms.c.subject == bindparam("subject"), alarms.c.open == 1
)
_TRIAL_ALARMS = (
    select(alarms)
    .where(alarms.c.subject == bindparam("subject"), alarms.c.incident.is_(None), alarms.c.active == 1)
    .order_by(alarms.c.id)
)
_LIFE_ALARM = select(alarms).where(
    alarms.c.subject == bindparam("subject"), alarms.c.urgency == "life", alarms.c.active == 1
)
_MEMBERS = select(alarms).where(alarms.c.incident == bindparam("incident")).order_by(alarms.c.id)
_ANY_ACTIVE = select(alarms.c.id).where(alarms.c.incident == bindparam("incident"), alarms.c.active == 1).limit(1)
# Two lookups by index, not one condition with OR: that one reads every open incident.
_CANDIDATE_IDS = union(
    select(incidents.c.id).where(
        incidents.c.open == 1, incidents.c.cause == bindparam("cause"), incidents.c.key == bindparam("key")
    ),
    select(alarms.c.incident).where(alarms.c.subject == bindparam("subject")),
)
_CANDIDATES = (
    select(
        *(incidents.c[name] for name in ("id", "kind", "cause", "key", "first_at", "last_at")),
        exists().where(alarms.c.incident == incidents.c.id, alarms.c.active == 1).label("active"),
        exists().where(alarms.c.incident == incidents.c.id, alarms.c.subject == bindparam("subject")).label("shares"),
    )
    .where(incidents.c.open == 1, incidents.c.id.in_(_CANDIDATE_IDS))
    .order_by(incidents.c.id)
)
_CASE_OF = select(cases).where(cases.c.incident == bindparam("incident"), cases.c.kind != "rescue")
_RESCUE_OF = select(cases).where(cases.c.alarm == bindparam("alarm"), cases.c.kind == "rescue")
_RESCUE_FOR = (
    select(cases)
    .where(
        cases.c.kind == "rescue",
        cases.c.alarm.in_(select(alarms.c.id).where(alarms.c.subject == bindparam("subject"))),  # by index
    )
    .order_by(cases.c.id.desc())
    .limit(1)
)
_OPEN_ALARMS = select(alarms).where(alarms.c.subject == bindparam("subject"), alarms.c.open == 1).order_by(alarms.c.id)
_LAST_CASE = select(func.coalesce(func.max(cases.c.id), 0).label("id"))
_MESSAGES = select(
    select(func.coalesce(func.max(outbox.c.n), 0)).scalar_subquery().label("last"),
    select(func.count()).where(outbox.c.case_id == bindparam("case")).scalar_subquery().label("of_case"),
)


class Ledger:
    """One transaction of the desk. `counts`, `drops`, `warnings` become true when it commits."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._dialect = connection.dialect.name
        self._driver = connection.connection.dbapi_connection or connection.connection
        self.counts: Counter[str] = Counter()
        self.drops: Counter[str] = Counter()
        self.warnings: list[str] = []
        self.delivered: list[int] = []  # when the messages were made that have been delivered

    def _run(self, statement: ClauseElement, values: Mapping[str, Any]) -> Any:
        """Send a statement straight to the database's driver; return its cursor."""
        sql, positions, fixed = _compiled(self.connection.dialect, statement)
        filled = {**fixed, **values}
        cursor = self._driver.cursor()
        cursor.execute(sql, filled if positions is None else tuple(filled[name] for name in positions))
        return cursor

    def _one(self, statement: ClauseElement, **values: Any) -> Row | None:
        cursor = self._run(statement, values)
        row = cursor.fetchone()
        return None if row is None else dict(zip((d[0] for d in cursor.description), row, strict=True))

    def _all(self, statement: ClauseElement, **values: Any) -> list[Row]:
        cursor = self._run(statement, values)
        names = [d[0] for d in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    # --- any table

    def add(self, table: Table, **values: Any) -> int:
        """Insert a row; return its id, given in order."""
        row = self._run(_insert(table, tuple(values), "id"), values).fetchone()
        return int(row[0])

    def set(self, table: Table, id: int | str, **values: Any) -> None:
        """Change columns of a row."""
        self._run(_update(table, "id", tuple(values)), {**values, "_key": id})

    def get(self, table: Table, id: int | str) -> Row | None:
        """Return a row by id."""
        return self._one(_row(table, "id"), _id=id)

    def row(self, table: Table, column: str, value: int | str) -> Row | None:
        """Return the row whose `column` is `value`."""
        return self._one(_row(table, column), **{f"_{column}": value})

    def note(self, at: int, entity: str, id: int, moved: Moved, actor: str = "desk", /, **details: Any) -> None:
        """Write a line of an entity's timeline: what happened, why, on whose behalf."""
        values = {
            "at": at,
            "entity": entity,
            "entity_id": id,
            "event": moved.event,
            "before": moved.before,
            "after": moved.after,
            "reason": moved.reason,
            "actor": actor,
            "details": text(details),
        }
        self._run(_insert(timeline, tuple(values), ""), values)

    # --- inputs

    def record(self, at: int, source: str, shard: int | None, offset: int | None, body: str | None) -> None:
        """Write an input into the journal."""
        values = {"at": at, "source": source, "shard": shard, "offset": offset, "body": body}
        self._run(_insert(journal, tuple(values), ""), values)

    def consume(self, shard: int, offset: int, name: tuple[int, int]) -> None:
        """Say which transition of a shard comes next, and the (source, index) of the last."""
        values = {"shard": shard, "offset": offset, "source": name[0], "index": name[1]}
        self._run(_put(self._dialect, consumed, tuple(values), "shard"), values)

    def keep(self, key: str, value: str) -> None:
        """Set a value of `meta`."""
        self._run(_put(self._dialect, meta, ("key", "value"), "key"), {"key": key, "value": value})

    def command(self, id: str) -> Row | None:
        """Return what became of a command."""
        return self._one(_row(commands, "id"), _id=id)

    def decided(self, **values: Any) -> None:
        """Write what became of a command."""
        self._run(_insert(commands, tuple(values), ""), values)

    # --- alarms and incidents

    def open_alarm(self, rule: str, subject: str) -> Row | None:
        """Return the one open alarm of (rule, subject)."""
        return self._one(_OPEN_ALARM, rule=rule, subject=subject)

    def members(self, incident: int) -> list[Row]:
        """Return all alarms of an incident, in their order."""
        return self._all(_MEMBERS, incident=incident)

    def open_alarms(self, subject: str) -> list[Row]:
        """Return a subject's alarms that are not closed, in their order."""
        return self._all(_OPEN_ALARMS, subject=subject)

    def trial_alarms(self, subject: str) -> list[Row]:
        """Return the alarms that hold and that a device raised while it was on trial: no incident has them."""
        return self._all(_TRIAL_ALARMS, subject=subject)

    def life_alarm(self, subject: str) -> Row | None:
        """Return a life-safety alarm of a device that holds now."""
        return self._one(_LIFE_ALARM, subject=subject)

    def any_active(self, incident: int) -> bool:
        """Return whether an alarm of an incident still holds."""
        return self._one(_ANY_ACTIVE, incident=incident) is not None

    def candidates(self, cause: str, key: str, subject: str) -> list[Candidate]:
        """Return the open incidents of this cause and key, and those that have an alarm of this subject."""
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
            for row in self._all(_CANDIDATES, cause=cause, key=key, subject=subject)
        ]

    # --- cases and outbox

    def case_of(self, incident: int) -> Row | None:
        """Return the incident's case or maintenance order; a rescue belongs to its alarm."""
        return self._one(_CASE_OF, incident=incident)

    def rescue_of(self, alarm: int) -> Row | None:
        """Return the rescue that an alarm made."""
        return self._one(_RESCUE_OF, alarm=alarm)

    def rescue_for(self, subject: str) -> Row | None:
        """Return the latest rescue at a subject, whichever of its alarms made it."""
        return self._one(_RESCUE_FOR, subject=subject)

    def case_numbered(self, number: str) -> Row | None:
        """Return a case by its number."""
        return self._one(_row(cases, "number"), _number=number)

    def next_case(self) -> int:
        """Return the id of the next case."""
        row = self._one(_LAST_CASE)
        return int(row["id"]) + 1 if row else 1

    def next_message(self, case: int) -> tuple[int, int]:
        """Return (number among all messages, number among the case's) of the next message."""
        row = self._one(_MESSAGES, case=case)
        return (int(row["last"]) + 1, int(row["of_case"]) + 1) if row else (1, 1)

    def post(self, **values: Any) -> None:
        """Put a message into the outbox."""
        self._run(_insert(outbox, tuple(values), ""), values)
