"""From rows of the desk's database to what the API answers, and the paging they share."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Connection, RowMapping, Table, and_, func, or_, select

from api.platforms.events import PLACE
from api.problem import Problem
from api.routes import answers
from api.site import Site
from citybrain.db.schema import alarms, cases, timeline
from citybrain.errors import ConfigError
from citybrain.i18n import catalogue
from citybrain.model import Evidence
from citybrain.units import METRICS
from streams.ruleset import Rule, kind_of

Where = Sequence[ColumnElement[bool]]
MOST = 200
# A rescue whose owner closed it while the sensors still say trapped stays in sight until they do not.
TRAPPED = and_(
    cases.c.kind == "rescue", cases.c.rescued_at.is_(None), func.coalesce(cases.c.verdict, "confirmed") == "confirmed"
)
OPEN = or_(cases.c.closed_at.is_(None), TRAPPED)


def cursor_of(value: int | str) -> str:
    """Return an opaque cursor that stands behind `value`."""
    return base64.urlsafe_b64encode(str(value).encode()).decode().rstrip("=")


def cursor_text(cursor: str) -> str:
    """Return what a cursor stands behind; raises Problem 400 where it is none of ours."""
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        return base64.b64decode(padded, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise _bad_cursor(cursor) from None


def cursor_id(cursor: str) -> int:
    """Return the id that a cursor stands behind; raises Problem 400."""
    text = cursor_text(cursor)
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise _bad_cursor(cursor)
    return int(text)


def _bad_cursor(cursor: str) -> Problem:
    return Problem(400, "bad_cursor", "query cursor", f"{cursor[:40]!r} is not a `next_cursor` of this API")


def page(
    connection: Connection, table: Table, where: Where, cursor: str | None, limit: int
) -> tuple[list[RowMapping], str | None]:
    """Return one page of a table, newest id first, and the cursor of the next one."""
    query = select(table).where(*where).order_by(table.c.id.desc()).limit(limit + 1)
    if cursor is not None:
        query = query.where(table.c.id < cursor_id(cursor))
    rows = list(connection.execute(query).mappings())
    return rows[:limit], cursor_of(rows[limit - 1]["id"]) if len(rows) > limit else None


def one(connection: Connection, table: Table, column: ColumnElement[Any], value: object, what: str) -> RowMapping:
    """Return the row whose `column` is `value`; raises Problem 404."""
    row = connection.execute(select(table).where(column == value)).mappings().first()
    if row is None:
        raise not_found(what, value)
    return row


def not_found(what: str, name: object) -> Problem:
    """Return the refusal for something that is not there."""
    return Problem(404, "not_found", f"{what} {name}", f"there is no {what} {name}")


def steps(connection: Connection, entity: str, number: int) -> list[answers.TimelineEntry]:
    """Return the timeline of an alarm, incident or case, oldest first."""
    query = select(timeline).where(timeline.c.entity == entity, timeline.c.entity_id == number).order_by(timeline.c.id)
    return [
        answers.TimelineEntry.model_validate({**row, "details": parsed(row["details"])})
        for row in connection.execute(query).mappings()
    ]


def parsed(text: str) -> Any:
    """Return the value of a json column; text that is none is given as it stands."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


def both(key: str) -> answers.Text | None:
    """Return a text of the catalogue in both languages, None where it has none."""
    found = catalogue().get(key)
    return None if found is None else answers.Text(zh=found.zh, en=found.en)


def named(key: str, code: str) -> answers.Text:
    """Return the catalogue's text for `key.code`, the code itself where it has none."""
    return both(f"{key}.{code}") or answers.Text(zh=code, en=code)


def alarm(site: Site, row: RowMapping) -> answers.Alarm:
    """Return an alarm with its device's name, its rule's title and an explanation."""
    device = site.latest.find(row["subject"])
    rule = site.rule(row["ruleset"], row["rule"])
    evidence = msgspec.json.decode(row["evidence"], type=Evidence)
    facts = {
        **row,
        "title": title(rule, row["rule"]),
        "name": device.name or device.id if device else row["subject"],
        "address": device.place.address if device else "",
        "why_text": named("why", row["why"]) if row["why"] else answers.Text(zh="", en=""),
        "evidence": msgspec.to_builtins(evidence),
        "explanation": explanation(rule, evidence),
    }
    return answers.Alarm.model_validate(facts)


def alarms_where(site: Site, connection: Connection, *where: ColumnElement[bool]) -> list[answers.Alarm]:
    """Return alarms, oldest first."""
    rows = connection.execute(select(alarms).where(*where).order_by(alarms.c.id)).mappings()
    return [alarm(site, row) for row in rows]


def title(rule: Rule | None, name: str) -> answers.Text:
    """Return a rule's title, its id where the rule is not to be had."""
    return answers.Text(zh=rule.title.zh, en=rule.title.en) if rule else answers.Text(zh=name, en=name)


def explanation(rule: Rule | None, evidence: Evidence) -> answers.Text:
    """Return why, in a sentence: the rule kind's own words, or the bare numbers where the rule is not to be had."""
    if rule is not None:
        try:
            kind, parameters = kind_of(rule)
        except ConfigError:
            return _numbers(evidence)
        zh, en = (kind.explain(parameters, evidence, language) for language in ("zh", "en"))
        return answers.Text(zh=zh, en=en)
    return _numbers(evidence)


def _numbers(evidence: Evidence) -> answers.Text:
    metric = METRICS.get(evidence.metric)
    unit = metric.suffix if metric else ""
    value = "?" if evidence.value is None else f"{evidence.value:g}{unit}"
    limit = "?" if evidence.limit is None else f"{evidence.limit:g}{unit}"
    text = catalogue()["alarm.numbers"]
    zh, en = (metric.zh, metric.en) if metric else (evidence.metric, evidence.metric)
    return answers.Text(
        zh=text("zh", metric=zh, value=value, limit=limit), en=text("en", metric=en, value=value, limit=limit)
    )


def unit(site: Site, code: str) -> answers.Named:
    """Return a unit with its names, its code where the registry does not know it."""
    for known in site.latest.registry.units:
        if known.code == code:
            return answers.Named(code=code, zh=known.zh, en=known.en)
    return answers.Named(code=code, zh=code, en=code)


def is_open(row: RowMapping) -> bool:
    """Return what `OPEN` says of a row."""
    trapped = row["kind"] == "rescue" and row["rescued_at"] is None and row["verdict"] in (None, "confirmed")
    return row["closed_at"] is None or trapped


def case(site: Site, row: RowMapping) -> dict[str, Any]:
    """Return what `answers.Case` is made of."""
    return {
        **row,
        "title": {"zh": row["title_zh"], "en": row["title_en"]},
        "place": {name: row[name] for name in PLACE},
        "unit": unit(site, row["unit"]),
        "area_owner": unit(site, row["area_owner"]),
        "open": is_open(row),
        "evidence": parsed(row["evidence"]),
    }
